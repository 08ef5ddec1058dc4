"""Small files that take for ever, or gigabytes, to decode: one for each kind of decoder that can be stalled."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

from PIL import Image

from support.document_maker import assembled_pdf, endless_pdf


def page(content: bytes, resources: bytes = b"<<>>", extra: Sequence[bytes] = ()) -> bytes:
    """A PDF of one page; `extra` are objects from number 5 on."""
    return assembled_pdf(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources %s>>" % resources,
            b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
            *extra,
        ]
    )


def stream(facts: bytes, data: bytes) -> bytes:
    """An object with data."""
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (facts, len(data), data)


def tiny_tiles() -> bytes:
    """A page filled with tiles of a millionth of a point each."""
    tile = stream(
        b"/Type/Pattern/PatternType 1/PaintType 1/TilingType 1/BBox[0 0 1 1]/XStep 0.001/YStep 0.001/Resources<<>>",
        b"0 0 1 1 re f",
    )
    return page(b"/Pattern cs /P scn 0 0 99 99 re f", b"<</Pattern<</P 5 0 R>>>>", [tile])


def long_function() -> bytes:
    """A shading whose colour is a program of 40,000 steps for each pixel."""
    shading = b"<</ShadingType 1/ColorSpace/DeviceRGB/Domain[0 1 0 1]/Matrix[99 0 0 99 0 0]/Function 6 0 R>>"
    function = stream(b"/FunctionType 4/Domain[0 1 0 1]/Range[0 1 0 1 0 1]", b"{%sdup}" % (b"exch sin " * 40_000))
    return page(b"/S sh", b"<</Shading<</S 5 0 R>>>>", [shading, function])


def many_lines() -> bytes:
    """A path of 800,000 thin lines that all cross each other."""
    return page(b"0.01 w 0 0 m " + b"99 99 l 0 99 l 99 0 l 0 0 l " * 200_000 + b"S")


def large_image() -> bytes:
    """An image of 3.6 billion pixels in a page."""
    facts = b"/Type/XObject/Subtype/Image/Width 60000/Height 60000/ColorSpace/DeviceGray/BitsPerComponent 8"
    image = stream(facts + b"/Filter/FlateDecode", zlib.compress(bytes(100 << 20), 9))
    return page(b"99 0 0 99 0 0 cm /I Do", b"<</XObject<</I 5 0 R>>>>", [image])


def many_scans() -> bytes:
    """A progressive JPEG whose last scan is repeated a thousand times."""
    out = io.BytesIO()
    Image.new("L", (8000, 7900)).save(out, "JPEG", progressive=True, quality=10)
    whole = out.getvalue()
    last = [match.start() for match in re.finditer(b"\xff\xda", whole)][-1]
    return whole[:-2] + whole[last:-2] * 1000 + b"\xff\xd9"


def many_frames(n: int = 20_000) -> bytes:
    """A GIF of frames of sixteen million pixels."""
    frame = b"\x21\xf9\x04\0\1\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x4c\1\0"
    return b"GIF89a" + struct.pack("<HH", 4000, 4000) + b"\x80\0\0\0\0\0\xff\xff\xff" + frame * n + b";"


PICTURES: Mapping[str, Callable[[], bytes]] = {
    "forms that draw each other": endless_pdf,
    "tiny tiles": tiny_tiles,
    "a long function": long_function,
    "many lines": many_lines,
    "a large image": large_image,
    "many scans": many_scans,
}
VIDEOS: Mapping[str, Callable[[], bytes]] = {"many frames": many_frames}
