"""An open PDF file → why its pages are not its content, if that is so.

Two kinds of files have pages that only say "open this in Acrobat": dynamic XFA forms, whose content is an XML
description that a viewer lays out, and portfolios, which are a cover around attached files. Answers from their pages
would be wrong. A static XFA form has its pages and fields in PDF as well, and a document with attachments that is not
a portfolio (an invoice with its XML) is like any other: both are read. Forms say which kind they are
(NeedsRendering); if one does not, a single page without fields that sends its reader to Adobe shows it.

The caller must hold pdfium's lock.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

_PAGES_CHECKED = 20
_MAX_BYTES = 256 << 20
_MAX_UNPACKED = 64 << 20  # bytes of object streams, all together
_COLLECTION = re.compile(rb"/Collection\s*(?:<<|\d+\s+\d+\s+R)")
_OBJECT_STREAM = re.compile(rb"/Type\s*/ObjStm\b")
_STREAM = re.compile(rb"stream\r?\n")


def why_pages_are_not_the_content(document: Any, source: Path | bytes, name: str) -> str | None:
    """The reason as a sentence, or None.

    Parameters
    ----------
    document : pypdfium2's.
    source : the file.
    name : what it is called.
    """
    import pypdfium2.raw as pdfium

    kind = document.get_formtype()
    is_static = kind == pdfium.FORMTYPE_XFA_FOREGROUND
    if kind == pdfium.FORMTYPE_XFA_FULL or (is_static and _is_placeholder(document) and not _has_fields(document)):
        return (
            f"{name} is an XFA form: its content is XML that only Adobe's programs draw, and its pages just say so; "
            "open it in Adobe Reader, print it to PDF, and ask about that."
        )
    n_files = document.count_attachments()
    if n_files and _is_portfolio(source):
        names = [str(document.get_attachment(i).get_name())[:60] for i in range(min(n_files, 3))]
        more = ", ..." if n_files > len(names) else ""
        return (
            f"{name} is a PDF portfolio: a cover around {n_files} attached {'file' if n_files == 1 else 'files'} "
            f"({', '.join(names)}{more}); save them in a PDF viewer, and ask about them."
        )
    return None


def _is_placeholder(document: Any) -> bool:
    """Whether the only page says what Adobe's placeholder says, in any language: it names Adobe Reader."""
    import pypdfium2.raw as pdfium

    page = pdfium.FPDF_LoadPage(document, 0) if len(document) == 1 else None
    if not page:
        return False
    try:
        letters = pdfium.FPDFText_LoadPage(page)
        if not letters:
            return False
        try:
            n_letters = min(pdfium.FPDFText_CountChars(letters), 4000)
            text = "".join(chr(pdfium.FPDFText_GetUnicode(letters, i)) for i in range(n_letters)).lower()
        finally:
            pdfium.FPDFText_ClosePage(letters)
    finally:
        pdfium.FPDF_ClosePage(page)
    return "adobe" in text or "please wait" in text or "pdf viewer" in text


def _has_fields(document: Any) -> bool:
    """Whether one of the first pages shows a form field; a page that cannot be read counts as such."""
    import pypdfium2.raw as pdfium

    for index in range(min(len(document), _PAGES_CHECKED)):
        page = pdfium.FPDF_LoadPage(document, index)
        if not page:
            return True
        try:
            for place in range(pdfium.FPDFPage_GetAnnotCount(page)):
                annotation = pdfium.FPDFPage_GetAnnot(page, place)
                if not annotation:
                    continue
                subtype = pdfium.FPDFAnnot_GetSubtype(annotation)
                pdfium.FPDFPage_CloseAnnot(annotation)
                if subtype == pdfium.FPDF_ANNOT_WIDGET:
                    return True
        finally:
            pdfium.FPDF_ClosePage(page)
    return False


def _is_portfolio(source: Path | bytes) -> bool:
    """Whether the catalog has a collection. pdfium has no function for this, so the file's objects are searched."""
    try:
        data = source if isinstance(source, bytes) else _read(source)
    except OSError:
        return False
    if _COLLECTION.search(data):
        return True
    left = _MAX_UNPACKED
    for found in _OBJECT_STREAM.finditer(data):
        start = _STREAM.search(data, found.end(), found.end() + 4096)
        if start is None or left <= 0:
            continue
        try:
            unpacked = zlib.decompressobj().decompress(data[start.end() : start.end() + left], left)
        except zlib.error:
            continue
        left -= len(unpacked)
        if _COLLECTION.search(unpacked):
            return True
    return False


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES)
