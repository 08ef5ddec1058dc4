"""Documents for tests, PDF files with reportlab and TIFF files with Pillow; and the pictures made from them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from reportlab.lib.utils import ImageReader
from reportlab.pdfgen.canvas import Canvas

from edge_runtime.inputs.documents import DocumentOptions, with_pages
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.prompt.build import iter_images
from edge_runtime.weights.config import SlicingConfig

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
COLOURS = [RED, GREEN, BLUE]
SLICING = SlicingConfig(448, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PAGE = (160, 80)  # points; the demo model reads a word of this size


def words_pdf(words: Sequence[str], size: tuple[float, float] = PAGE, **options: Any) -> bytes:
    """One word in large letters on each page."""
    out = io.BytesIO()
    canvas = Canvas(out, pagesize=size, invariant=True, **options)
    for word in words:
        canvas.setFont("Helvetica-Bold", size[1] / 2)
        canvas.drawCentredString(size[0] / 2, size[1] * 0.33, word)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def coloured_pdf(colours: Sequence[tuple[int, int, int]], size: tuple[float, float] = PAGE) -> bytes:
    """Pages of one colour each."""
    out = io.BytesIO()
    canvas = Canvas(out, pagesize=size, invariant=True)
    for colour in colours:
        canvas.setFillColorRGB(*(value / 255 for value in colour))
        canvas.rect(0, 0, *size, stroke=0, fill=1)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def scanned_pdf(n_pages: int, side: int = 300, seed: int = 0) -> bytes:
    """Pages that are different photographs: `side` x `side` pixels of noise, about 90 kB each."""
    generator, out = np.random.default_rng(seed), io.BytesIO()
    canvas = Canvas(out, pagesize=(200, 200), invariant=True)
    for _ in range(n_pages):
        picture = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (side, side, 3), np.uint8)).save(picture, "JPEG", quality=90)
        picture.seek(0)
        canvas.drawImage(ImageReader(picture), 0, 0, 200, 200)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def written_pdf(pages: Sequence[bytes], *, rotate: int = 0, crop: Sequence[int] | None = None) -> bytes:
    """A PDF file written by hand; `pages` are content streams of pages of 200 x 100 points."""
    extra = b"/Rotate %d" % rotate + (b"/CropBox [%d %d %d %d]" % tuple(crop) if crop else b"")
    kids = b" ".join(b"%d 0 R" % (3 + 2 * i) for i in range(len(pages)))
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(pages))]
    for i, content in enumerate(pages):
        objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]/Contents %d 0 R%s>>" % (4 + 2 * i, extra))
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(content), content))
    return assembled_pdf(objects)


def assembled_pdf(objects: Sequence[bytes]) -> bytes:
    """A PDF file of objects, the first of which is its catalog."""
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))
    return out + head + table + tail


def endless_pdf(depth: int = 10, fan: int = 20) -> bytes:
    """A small PDF file whose forms draw each other: to draw its page takes `fan` to the power of `depth` steps."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>",
        b"<</Length 5>>stream\n/F Do\nendstream",
    ]
    form = b"<</Type/XObject/Subtype/Form/BBox[0 0 99 99]/Resources%s/Length %d>>stream\n%s\nendstream"
    for i in range(depth):
        is_last = i == depth - 1
        body = b"0 0 9 9 re f" if is_last else b" ".join([b"/F Do"] * fan)
        objects.append(form % (b"<<>>" if is_last else b"<</XObject<</F %d 0 R>>>>" % (6 + i), len(body), body))
    return assembled_pdf(objects)


def blocks(sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """A picture of one colour in each size."""
    return [Image.new("RGB", size, colour) for size, colour in zip(sizes, COLOURS, strict=True)]


def pages_tiff(pages: Sequence[Image.Image], **options: Any) -> bytes:
    """A TIFF file of several pages."""
    out = io.BytesIO()
    pages[0].save(out, "TIFF", save_all=True, append_images=list(pages[1:]), **options)
    return out.getvalue()


def pictures(content: Any, **options: Any) -> list[Image.Image]:
    """Pictures that a message's content becomes."""
    messages = parse_messages([{"role": "user", "content": content}])
    expanded = with_pages(messages, DocumentOptions(**options), SLICING)
    return [load_image(part.source) for part in iter_images(expanded)]


def colours(found: list[Image.Image]) -> list[tuple[int, ...]]:
    return [picture.getpixel((picture.width // 2, picture.height // 2)) for picture in found]  # type: ignore[misc]
