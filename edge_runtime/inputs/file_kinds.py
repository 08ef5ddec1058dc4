"""First and last bytes of a file that Pillow cannot read → what it is, and what to do with it.

An error that says "this is a Git LFS pointer" saves the search that "unknown format" would start. Nothing is decoded,
and nothing here decides whether a file is read.
"""

from __future__ import annotations

import zlib
from contextlib import suppress

SNIFFED_BYTES = 64 * 1024
"""Bytes at each end of a file that may show what it is; archives list their contents at the end."""

_EXPORT = "export it as PNG or JPEG"
_RAW = "develop it, or export it as JPEG or PNG: the preview inside is not used"
_VIDEO = "give it as a video, with a video's suffix (.mp4) or in a part of type 'video'"
_PRINT = "print or export it as PDF, then ask about that"
_UNPACK = "unpack it, and name the files inside"
_AS_TEXT = "put its text into the question, or give a picture"
_AGAIN = "get the file itself"

_HEADS: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"FUJIFILMCCD-RAW", "a raw photograph (RAF)", _RAW),
    (0, b"IIRO", "a raw photograph (ORF)", _RAW),
    (0, b"IIRS", "a raw photograph (ORF)", _RAW),
    (0, b"MMOR", "a raw photograph (ORF)", _RAW),
    (0, b"IIU\0", "a raw photograph (RW2)", _RAW),
    (8, b"CR\x02", "a raw photograph (CR2)", _RAW),
    (6, b"HEAPCCDR", "a raw photograph (CRW)", _RAW),
    (4, b"ftypcrx ", "a raw photograph (CR3)", _RAW),
    (0, b"\0MRM", "a raw photograph (MRW)", _RAW),
    (0, b"FOVb", "a raw photograph (X3F)", _RAW),
    (8, b"IIIITwaR", "a raw photograph (IIQ)", _RAW),
    (0, b"\xff\x0a", "a JPEG XL picture", _EXPORT),
    (4, b"JXL \r\n\x87\n", "a JPEG XL picture", _EXPORT),
    (0, b"II\xbc", "a JPEG XR picture", _EXPORT),
    (0, b"BPG\xfb", "a BPG picture", _EXPORT),
    (0, b"FLIF", "a FLIF picture", _EXPORT),
    (0, b"v/1\x01", "an OpenEXR picture, whose samples have no white", "export it as PNG, exposed as you want it"),
    (
        0,
        b"#?RADIANCE",
        "a Radiance HDR picture, whose samples have no white",
        "export it as PNG, exposed as you want it",
    ),
    (0, b"SIMPLE  =", "a FITS picture, whose samples have no white", "export it as PNG, scaled as you want it"),
    (128, b"DICM", "a DICOM picture", "export it as PNG from a viewer, in the window you want"),
    (0, b"gimp xcf", "a GIMP drawing (XCF)", _EXPORT),
    (0, b"8BPS", "a Photoshop drawing (PSD)", _EXPORT),
    (0, b"8BPB", "a Photoshop drawing (PSB)", _EXPORT),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows drawing (WMF), which has no pixels yet", _EXPORT),
    (40, b" EMF", "a Windows drawing (EMF), which has no pixels yet", _EXPORT),
    (0, b"%!PS", "a PostScript drawing, which has no pixels yet", "export it as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript drawing, which has no pixels yet", "export it as PNG"),
    (0, b"AC10", "a drawing (DWG), which has no pixels yet", _EXPORT),
    (0, b"AT&TFORM", "a DjVu document", _PRINT),
    (0, b"{\\rtf", "a text document (RTF)", _PRINT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document of the old kind (DOC, XLS, PPT)", _PRINT),
    (0, b"GGUF", "a model file (GGUF)", "give it with -m, and a picture here"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video", _VIDEO),
    (0, b"FLV\x01", "a Flash video", _VIDEO),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a Windows Media video", _VIDEO),
    (0, b"\0\0\x01\xba", "an MPEG video", _VIDEO),
    (0, b"\0\0\x01\xb3", "an MPEG video", _VIDEO),
    (0, b"OggS", "an Ogg file (video or sound)", _VIDEO),
    (4, b"moov", "a QuickTime video", _VIDEO),
    (4, b"mdat", "a QuickTime video", _VIDEO),
    (0, b"ID3", "a sound file (MP3)", "give a picture: sound is not supported"),
    (0, b"fLaC", "a sound file (FLAC)", "give a picture: sound is not supported"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (0, b"(\xb5/\xfd", "a Zstandard archive", _UNPACK),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"SQLite format 3\0", "an SQLite database", _AS_TEXT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export the picture inside as PNG"),
    (0, b"CDF\x01", "a NetCDF file", "export the picture inside as PNG"),
    (0, b"\x93NUMPY", "a NumPy array", "open it with numpy.load and give Image.fromarray(...)"),
    (0, b"\x80\x04\x95", "a Python pickle", _AGAIN),
    (0, b"wOF2", "a font", "give a picture of text set in it"),
    (0, b"wOFF", "a font", "give a picture of text set in it"),
    (0, b"OTTO", "a font", "give a picture of text set in it"),
    (0, b"\0\x01\0\0\0", "a font", "give a picture of text set in it"),
    (0, b"\x7fELF", "a program", "give a picture"),
    (0, b"MZ", "a program", "give a picture"),
    (0, b"#!", "a script", _AS_TEXT),
    (0, b"bplist00", "a property list (a link of macOS, or a web archive)", _AGAIN),
    (0, b"L\0\0\0\x01\x14\x02\0", "a link of Windows", _AGAIN),
    (0, b"\0\x05\x16\x07", "what macOS stores next to a file (its name starts with ._)", _AGAIN),
    (0, b"book\0\0\0\0mark", "an alias of macOS", _AGAIN),
    (0, b"[InternetShortcut]", "a link to a web page", "get the picture itself"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the picture", "run 'git lfs pull' to get it"),
    (0, b"/annex/objects/", "a git-annex pointer, not the picture", "run 'git annex get' to get it"),
    (0, b"\x30\x82", "a certificate", _AGAIN),
)
"""(place, bytes, what it is, what to do)."""

_ZIPS: tuple[tuple[bytes, str, str], ...] = (
    (b"word/document", "a Word document (DOCX)", _PRINT),
    (b"xl/workbook", "an Excel workbook (XLSX)", _PRINT),
    (b"ppt/presentation", "a PowerPoint presentation (PPTX)", _PRINT),
    (b"application/epub+zip", "an e-book (EPUB)", _PRINT),
    (b"application/vnd.oasis.opendocument", "an OpenDocument file (ODT, ODS, ODP)", _PRINT),
    (b"mergedimage.png", "a drawing (OpenRaster or Krita)", _EXPORT),
    (b"AndroidManifest.xml", "an Android program", "give a picture"),
    (b"visio/document", "a Visio drawing", _EXPORT),
    (b"Index/Document.iwa", "an iWork document (Pages, Numbers, Keynote)", _PRINT),
)
_PICTURES = ((b"\x89PNG\r\n\x1a\n", "a PNG picture"), (b"\xff\xd8\xff\xe0", "a JPEG picture"))
_VIDEO_BRANDS = (
    *(b"3g", b"M4", b"MSNV", b"XAVC", b"avc", b"dash", b"f4v", b"iso", b"mmp4", b"mp4", b"mp7", b"qt  "),
)
_BOX_KINDS = {b"qt  ": "a QuickTime video", b"M4A ": "a sound file (M4A)", b"M4V ": "an MP4 video"}
_RIFF_KINDS = {b"AVI ": "an AVI video", b"WAVE": "a sound file (WAV)", b"CDR6": "a CorelDRAW drawing"}


def kind_of(head: bytes, tail: bytes = b"") -> tuple[str, str] | None:
    """What a file is, with its article, and what to do with it; None if unknown.

    Parameters
    ----------
    head, tail : its first and last `SNIFFED_BYTES` bytes, or as many as there are; 1024 bytes are enough for most.
    """
    for place, magic, what, advice in _HEADS:
        if head.startswith(magic, place):
            return what, advice
    if head.startswith((b"PK\3\4", b"PK\5\6")):
        return _zip_kind(head + tail)
    if head.startswith(b"\x1f\x8b"):
        return _gzip_kind(head)
    if head[4:8] == b"ftyp" and head[8:12].startswith(_VIDEO_BRANDS):
        return _BOX_KINDS.get(head[8:12], "an MP4 video"), _VIDEO
    if head.startswith(b"RIFF") and head[8:12] in _RIFF_KINDS:
        return _RIFF_KINDS[head[8:12]], _VIDEO
    if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G":
        return "an MPEG transport stream", _VIDEO
    for magic, what in _PICTURES:
        place = head.find(magic, 1, 1024)
        if place > 0:
            return (
                f"{what} after {place} bytes that do not belong to it",
                "cut those off (an upload's head, perhaps)",
            )
    if not head.strip(b"\0"):
        return "nothing but zeros (a download that was cut off leaves such files)", _AGAIN
    return _text_kind(head)


def _zip_kind(data: bytes) -> tuple[str, str]:
    for name, what, advice in _ZIPS:
        if name in data:
            return what, advice
    return "a ZIP archive", _UNPACK


def _gzip_kind(head: bytes) -> tuple[str, str]:
    with suppress(zlib.error):
        start = zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, 4096)
        if b"<svg" in start.lower():
            return "an SVG drawing (SVGZ), which has no pixels yet", "export it as PNG in the size you want"
        if start.startswith(b"\x01\0\0\0") and start[40:44] == b" EMF":
            return "a Windows drawing (EMZ), which has no pixels yet", _EXPORT
    return "a gzip archive", _UNPACK


def _text_kind(head: bytes) -> tuple[str, str] | None:
    """A kind of text; None if it is not text."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    text = head.decode(encoding, "replace").removeprefix("\ufeff")
    odd = sum(character == "\ufffd" or (character < " " and character not in "\t\r\n\f\x1b") for character in text)
    if odd > 1 + len(text) // 200:  # the last character may be cut
        return None
    start = text.lstrip().lower()
    if (
        start.startswith(("<!doctype html", "<html", "<head", "<body", "<script", "<!-- ", "<meta"))
        or "<html" in start
    ):
        return (
            "a web page (HTML), perhaps an error or a login instead of the picture",
            "open it in a browser, and save the picture itself or the page as PDF",
        )
    if start.startswith(("%pdf", "%fdf")):
        return "a form's data (FDF)", _PRINT
    if start.startswith(("<?xml", "<")):
        return "an XML file", _AS_TEXT
    if start.startswith(("{", "[")):
        return "a JSON file, perhaps an error instead of the picture", "look at its text, and get the picture itself"
    if start.startswith(("data:image", "data:application", "ivborw0kggo", "/9j/", "r0lgod", "ukligr", "jvberi0")):
        return "a picture or document written as base64", "decode it, or give its text as a data: URI"
    if start.startswith("-----begin "):
        return "a certificate or key", _AGAIN
    return "a text file", _AS_TEXT
