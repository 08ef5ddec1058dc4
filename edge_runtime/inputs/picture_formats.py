"""First bytes of a file → what to do before Pillow can read it, or why it cannot.

Pillow knows most formats itself. HEIC needs a plugin (the extra `heif`), and some files that people take for pictures
are not pictures.
"""

from __future__ import annotations

from functools import cache

from edge_runtime.errors import BackendUnavailable, ImageError
from edge_runtime.inputs.file_kinds import kind_of

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_SEQUENCE_BRANDS = (b"avis", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
PDF_MARK = b"%PDF-"
PDF_WITHIN = 1024
_PICTURES = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"8BPS")
"""First bytes of pictures that may contain texts, which may mention PDF."""


def prepare_format(head: bytes, name: str) -> None:
    """Register the format of a file with Pillow, where needed.

    Parameters
    ----------
    head : the file's first 1024 bytes, or as many as there are.
    name : the file's name, for errors.

    Raises
    ------
    BackendUnavailable
        When the format needs a library that is not installed.
    ImageError
        When the file is a drawing or a document.
    """
    brands = _brands(head)
    if brands & _HEIF_BRANDS and not brands & _AVIF_BRANDS and not _register_heif():
        raise BackendUnavailable(
            f"{name} is a HEIC picture, which needs pillow-heif, and that is not installed; run "
            "pip install 'edge-runtime[heif]', or save it as JPEG."
        )
    if _is_svg(head):
        raise ImageError(f"{name} is an SVG drawing, which has no pixels yet; export it as PNG in the size you want.")
    if head.startswith(b"\xd7\xcd\xc6\x9a") or head[40:44] == b" EMF":  # Pillow trips over them before it says so
        raise ImageError(unknown_format(head, b"", name))
    if is_pdf(head):
        raise ImageError(f"{name} is a PDF document, expected a picture; ask about it in a message, or name a page.")


def is_pdf(head: bytes) -> bool:
    """Whether a file is a PDF document: its mark is within the first 1024 bytes, with no picture's mark before it.

    Source: ISO 32000-1, annex H.3, note 13: readers accept the mark there, as form data and mail headers precede it.
    """
    place = head[: PDF_WITHIN + len(PDF_MARK)].find(PDF_MARK)
    return place == 0 or (place > 0 and not head.startswith(_PICTURES) and not _brands(head))


def is_sequence(head: bytes) -> bool:
    """Whether a HEIF or AVIF file says that it is primarily a sequence of frames, which is a video."""
    return head[4:8] == b"ftyp" and head[8:12] in _SEQUENCE_BRANDS


def unknown_format(head: bytes, tail: bytes, name: str) -> str:
    """Why Pillow does not know a file; `head` and `tail` are its first and last bytes."""
    if is_sequence(head):
        return (
            f"{name} is not a picture in a known format, but a HEIF or AVIF sequence of frames; give it as a video, "
            "in a part of type 'video'."
        )
    if _brands(head) & _AVIF_BRANDS:
        from PIL import __version__

        return (
            f"{name} is an AVIF picture, or starts like one, which Pillow {__version__} cannot read; install "
            "Pillow 11.3 or newer, or save it as JPEG."
        )
    kind = kind_of(head, tail)
    if name.lower().endswith(".pdf"):
        found = f"; it is {kind[0]}" if kind is not None else ""
        return f"{name} is not a PDF: it does not start like one{found}; get the file again."
    if kind is not None:
        return f"{name} is not a picture in a known format, but {kind[0]}; {kind[1]}."
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return (
            f"{name} is not a picture in a known format, but a TIFF file whose samples or compression Pillow cannot "
            "read, or a damaged one; save it with 8 bits per sample and LZW compression, or as PNG."
        )
    return (
        f"{name} is not a picture in a known format; expected JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, TIFF or another "
        "that Pillow reads."
    )


def _brands(head: bytes) -> set[bytes]:
    """Brands of an ISO base media file (such as HEIC, AVIF and MP4): the major one and the compatible ones."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[i : i + 4] for i in range(16, end - 3, 4))}


def _is_svg(head: bytes) -> bool:
    """Whether XML or a comment leads to an `svg` element; no picture format starts with `<`."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head.decode("utf-16", "replace").encode()
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith(b"<") and b"<svg" in text


@cache
def _register_heif() -> bool:
    """Make pillow-heif a plugin of Pillow; False when it is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True
