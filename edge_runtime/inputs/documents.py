"""Messages with documents → messages with a picture for each page, none of them drawn yet.

A document is a PDF file, or a TIFF file of several pages. Its first bytes distinguish it from a picture, so a path,
bytes or a `data:` URI may be either wherever a picture is accepted. `pdf` and `tiff` turn a page into a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs.image import (
    HEAD_BYTES,
    ImageSource,
    decode_data_uri,
    existing_file,
    name_of,
    read_file_object,
    read_head,
)
from edge_runtime.inputs.messages import DocumentPart, ImagePart, Message, Part
from edge_runtime.inputs.pages import PAGE_LIMIT, Page, PageChoice, choose_pages
from edge_runtime.inputs.pdf import PdfFile, PdfPage, Resolution
from edge_runtime.inputs.picture_formats import PDF_MARK, is_pdf
from edge_runtime.inputs.tiff import TiffFile
from edge_runtime.inputs.tiff_directories import HEADS as TIFF_HEADS
from edge_runtime.system.base64_data import data_uri_head, data_uri_size, is_data_uri
from edge_runtime.weights.config import SlicingConfig

FILE_LIMIT_BYTES = 1 << 30
"""Default for the largest document."""

DETAIL = 2
"""Pixels of a page per pixel of its slices: enough for stretching to whole patches, and no more.

With nine cells an A4 page is drawn at 193 dots per inch; the model's official recipe uses 200."""


@dataclass(frozen=True)
class DocumentOptions:
    """How documents are read, unless a part of a message says otherwise."""

    pages: PageChoice | None = None
    dpi: float | None = None
    """Dots per inch; None takes as many pixels as the slices of a page can use."""
    password: str | None = None
    page_limit: int = PAGE_LIMIT
    file_limit_bytes: int = FILE_LIMIT_BYTES


def open_part(part: ImagePart, options: DocumentOptions, pixels: int) -> tuple[bool, Sequence[ImageSource]]:
    """Open a picture or a document.

    Parameters
    ----------
    pixels : pixels of a PDF page, if no resolution was asked for.

    Returns
    -------
    is_document, sources : the chosen pages; or the picture, not opened yet.

    Raises
    ------
    ImageError, MessageError, BackendUnavailable
        As `with_pages`.
    """
    document = _open(part, options)
    return (False, [part.source]) if document is None else (True, document.chosen(part, options, pixels))


def with_pages(
    conversation: Sequence[Message],
    options: DocumentOptions,
    slicing: SlicingConfig,
    max_slices: int | None = None,
    open_part: Callable[[ImagePart, DocumentOptions, int], tuple[bool, Sequence[ImageSource]]] = open_part,
) -> list[Message]:
    """Replace every document by its pages.

    Parameters
    ----------
    max_slices : maximum number of cells per picture, where a part has no limit of its own; None takes the model's.
    open_part : opens a part.

    Raises
    ------
    ImageError, MessageError
        When a document cannot be opened, is too large, or has no such pages; also when pages were chosen and there
        are pictures, but no document.
    BackendUnavailable
        When a document is a PDF and pypdfium2 is not installed.
    """
    found: list[Message] = []
    n_pictures = n_documents = 0
    for message in conversation:
        parts: list[Part] = []
        for part in message.parts:
            if not isinstance(part, ImagePart):
                parts.append(part)
                continue
            part = read(part, options)
            cells = next(n for n in (part.max_slices, max_slices, slicing.max_slice_nums) if n is not None)
            is_document, sources = open_part(part, options, DETAIL * cells * slicing.scale_resolution**2)
            n_documents += is_document
            n_pictures += not is_document
            parts += [ImagePart(source, part.max_slices) for source in sources]
        found.append(replace(message, parts=tuple(parts)))
    if options.pages is not None and n_pictures and not n_documents:
        raise MessageError(
            "Pages were chosen, but there are only pictures; --pages is for PDF and for TIFF files of several pages."
        )
    return found


def read(part: ImagePart, options: DocumentOptions) -> ImagePart:
    """A part with the bytes of its open file, which may be readable only once; no more bytes than allowed."""
    if isinstance(part.source, Image.Image | str | Path | bytes | Page):
        return part
    data = read_file_object(part.source, options.file_limit_bytes + 1)
    check_file_bytes("The file", len(data), options.file_limit_bytes)
    return replace(part, source=data)


def page_numbers(part: ImagePart, options: DocumentOptions) -> list[int] | None:
    """Numbers, counted from 1, of a document's chosen pages; None for a picture. Errors as `with_pages`."""
    document = _open(part, options)
    return None if document is None else [index + 1 for index in document.indices(part, options)]


def describe(source: Path | bytes, options: Mapping[str, Any]) -> str | None:
    """What a document is, in two words for a person; None for a picture. Errors as `with_pages`.

    Parameters
    ----------
    options : as of `Model.chat`; those of `DocumentOptions` count.
    """
    numbers = page_numbers(ImagePart(source), document_options(options))
    return None if numbers is None else f"{len(numbers)} {'page' if len(numbers) == 1 else 'pages'}"


def last_picture(source: Path | bytes, options: Mapping[str, Any], size: tuple[int, int]) -> Path | bytes | Page:
    """A picture as it is, or the last of a document's chosen pages.

    Parameters
    ----------
    options : as of `Model.chat`; those of `DocumentOptions` count.
    size : (width, height) that the page had, in pixels.
    """
    part, how = ImagePart(source), document_options(options)
    document = _open(part, how)
    return source if document is None else document.chosen(part, how, size[0] * size[1])[-1]


def document_options(options: Mapping[str, Any]) -> DocumentOptions:
    """The options for documents among those of a request."""
    return DocumentOptions(
        **{field.name: options[field.name] for field in fields(DocumentOptions) if field.name in options}
    )


class _Document:
    """An open document."""

    def __init__(self, file: PdfFile | TiffFile) -> None:
        self._file = file

    def indices(self, part: ImagePart, options: DocumentOptions) -> list[int]:
        pages = part.pages if isinstance(part, DocumentPart) and part.pages is not None else options.pages
        return choose_pages(pages, self._file.counted, self._file.name, options.page_limit)

    def chosen(self, part: ImagePart, options: DocumentOptions, pixels: int) -> list[Page]:
        indices, file = self.indices(part, options), self._file
        if isinstance(file, TiffFile):
            return [file.page(index) for index in indices]
        dpi = part.dpi if isinstance(part, DocumentPart) and part.dpi is not None else options.dpi
        resolution = Resolution(pixels, checked_dpi(dpi))
        return [PdfPage(file, index, resolution) for index in indices]


def checked_dpi(dpi: Any) -> float | None:
    """Return a valid resolution, or None.

    Raises
    ------
    MessageError
        When it is not a number from 1 to 4800.
    """
    if dpi is not None and (isinstance(dpi, bool) or not isinstance(dpi, int | float) or not 1 <= dpi <= 4800):
        raise MessageError(f"dpi is {dpi!r}; expected dots per inch from 1 to 4800.")
    return dpi


def _open(part: ImagePart, options: DocumentOptions) -> _Document | None:
    """Open a part if it is a document; None if it is a picture, or unreadable, which is reported later."""
    source = part.source
    must_be_pdf = isinstance(part, DocumentPart) and part.must_be_pdf
    if isinstance(source, Image.Image | Page):
        if must_be_pdf:
            raise MessageError("A part of type 'pdf' holds a picture; expected a path, bytes or a data: URI.")
        return None
    head = _head(source)
    is_document = is_pdf(head) or (must_be_pdf and PDF_MARK in head)
    if not is_document and not head.startswith(TIFF_HEADS):
        if must_be_pdf:
            _, name = _content(source, options.file_limit_bytes)
            raise ImageError(f"{name[:200]} is not a PDF: it does not start like one; expected a PDF file.")
        return None
    content, name = _content(source, options.file_limit_bytes)
    if is_document:
        own = part.password if isinstance(part, DocumentPart) else None
        return _Document(PdfFile(content, name, own if own is not None else options.password))
    file = TiffFile(content, name)
    is_chosen = options.pages is not None or (isinstance(part, DocumentPart) and part.pages is not None)
    if is_chosen or file.counted(2) > 1:
        return _Document(file)
    file.close()
    return None


def _head(source: ImageSource) -> bytes:
    """The first bytes of a file; empty if it cannot be read."""
    if isinstance(source, bytes):
        return source[:HEAD_BYTES]
    if is_data_uri(source):
        return data_uri_head(source, HEAD_BYTES)
    return read_head(source) if isinstance(source, str | Path) else b""


def _content(source: Any, limit: int) -> tuple[Path | bytes, str]:
    """The file or bytes of a document, and its name; refuses those larger than allowed."""
    if is_data_uri(source):
        check_file_bytes("The document", data_uri_size(source), limit)
        source = decode_data_uri(source)
    if isinstance(source, bytes):
        name = name_of(source, "The document")
        check_file_bytes(name, len(source), limit)
        return source, name
    path = existing_file(source, "document")
    check_file_bytes(str(path), path.stat().st_size, limit)
    return path, str(path)


def check_file_bytes(name: str, n_bytes: int, limit: int) -> None:
    """Check the size of a file against the limit."""
    if n_bytes > limit:
        raise ImageError(
            f"{name} has {n_bytes} bytes, at most {limit} are read; split it, or raise file_limit_bytes."
        )
