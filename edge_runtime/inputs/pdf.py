"""PDF file → number and sizes of its pages, and pages as pictures, one at a time; with pdfium.

Only one thread of a process may use pdfium at a time, whichever file it works on, so every call is made under one
lock, including closing. A page is drawn as it would be printed: with annotations and filled-in form fields, on white.
Scripts in a document are not run, and nothing that it refers to is fetched.
"""

from __future__ import annotations

import atexit
import logging
import math
import threading
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from edge_runtime.errors import BackendUnavailable, ImageError
from edge_runtime.inputs.pages import MAX_TEXT, Page
from edge_runtime.inputs.pdf_forms import why_pages_are_not_the_content

POINTS_PER_INCH = 72
MAX_SIDE = 32_767  # pixels; pdfium's arithmetic is not made for more

_ERR_PASSWORD, _ERR_SECURITY = 4, 5  # FPDF_GetLastError

_pdfium_lock = threading.RLock()
_open_files: weakref.WeakSet[PdfFile] = weakref.WeakSet()


@dataclass(frozen=True)
class Resolution:
    """How large pages become."""

    pixels: int
    """Pixels of a page, whatever its size on paper; used where `dpi` is None."""
    dpi: float | None = None


class PdfFile:
    """An open PDF file.

    Parameters
    ----------
    source : path, or the file's bytes.
    name : what it is called in errors.

    Raises
    ------
    ImageError
        When it is not a PDF, is too damaged to be repaired, or is encrypted and the password does not open it; also
        when its pages only say that it must be opened elsewhere (an XFA form, a portfolio).
    BackendUnavailable
        When pypdfium2 is not installed.
    """

    def __init__(self, source: Path | bytes, name: str, password: str | None = None) -> None:
        self.name = name
        pdfium = _pdfium(name)
        with _pdfium_lock:
            try:
                self._document: Any = pdfium.PdfDocument(source, password=password)
            except pdfium.PdfiumError as error:
                raise ImageError(_why_not_opened(name, error, password)) from None
            # Files that are garbage-collected are closed under the lock, too. At exit that must happen before pdfium
            # itself shuts down.
            self._close = weakref.finalize(self, _close, self._document)
            self._close.atexit = False
            _open_files.add(self)
            try:
                self._document.init_forms()
            except pdfium.PdfiumError:  # a damaged form: the page is drawn without it
                self._document.close_forms()
            self.n_pages = len(self._document)
            reason = why_pages_are_not_the_content(self._document, source, name)
        if reason is not None:
            self.close()
            raise ImageError(reason)

    def counted(self, most: int) -> int:
        """Number of all pages, as a PDF file states it."""
        return self.n_pages

    def size(self, index: int) -> tuple[float, float]:
        """(width, height) of a page in points, upright."""
        with _pdfium_lock:
            try:
                width, height = self._document.get_page_size(index)
            except _pdfium(self.name).PdfiumError:
                raise ImageError(self._unreadable(index)) from None
        return width, height

    def draw(self, index: int, scale: float) -> Image.Image:
        """A page as an RGB picture with `scale` pixels per point, sides rounded up.

        Raises
        ------
        ImageError
            When the page is damaged.
        """
        with _pdfium_lock:
            try:
                page = self._document[index]
            except _pdfium(self.name).PdfiumError:
                raise ImageError(self._unreadable(index)) from None
            try:
                bitmap = page.render(scale=scale, rev_byteorder=True, limit_image_cache=True)
                try:
                    # A copy: pdfium frees the bitmap's memory.
                    return Image.fromarray(bitmap.to_numpy().copy())
                finally:
                    bitmap.close()
            except _pdfium(self.name).PdfiumError:
                raise ImageError(self._unreadable(index)) from None
            finally:
                page.close()

    def text(self, index: int) -> str:
        """A page's text layer, at most `MAX_TEXT` characters; empty where there is none, or it cannot be read."""
        with _pdfium_lock:
            try:
                page = self._document[index]
                try:
                    layer = page.get_textpage()
                    try:
                        found = str(layer.get_text_range(0, min(layer.count_chars(), MAX_TEXT)))
                    finally:
                        layer.close()
                finally:
                    page.close()
            except _pdfium(self.name).PdfiumError:
                return ""
        return found.replace("\r\n", "\n").encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def close(self) -> None:
        """Close the file; its pages cannot be read any more."""
        self._close()

    def _unreadable(self, index: int) -> str:
        return (
            f"Page {index + 1} of {self.name} cannot be read: it is damaged; get the file again, or leave that page "
            "out with --pages."
        )


@dataclass(frozen=True)
class PdfPage(Page):
    """A page of a PDF file, at a resolution."""

    file: PdfFile
    index: int
    resolution: Resolution

    def size(self, pixel_limit: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self._plan(pixel_limit)[1]

    def render(self, pixel_limit: int) -> Image.Image:
        """The page as a picture."""
        return self.file.draw(self.index, self._plan(pixel_limit)[0])

    def text(self) -> str:
        """Its text layer."""
        return self.file.text(self.index)

    def _plan(self, pixel_limit: int) -> tuple[float, tuple[int, int]]:
        """Pixels per point, and (width, height) in pixels."""
        width, height = self.file.size(self.index)
        where = f"Page {self.index + 1} of {self.file.name}"
        if not (math.isfinite(width * height) and width > 0 and height > 0):
            raise ImageError(f"{where} has no size ({width:g} x {height:g} points); leave it out with --pages.")
        dpi = self.resolution.dpi
        pixels = min(self.resolution.pixels, pixel_limit)
        scale = math.sqrt(pixels / (width * height)) if dpi is None else dpi / POINTS_PER_INCH
        if dpi is None:  # the length of a thin strip is limited, too
            scale = min(scale, (MAX_SIDE - 1) / max(width, height))
        size = max(1, math.ceil(width * scale)), max(1, math.ceil(height * scale))
        if dpi is not None and (size[0] * size[1] > pixel_limit or max(size) > MAX_SIDE):
            raise ImageError(
                f"{where} would have {size[0]} x {size[1]} = {size[0] * size[1]} pixels at {dpi:g} dots per inch, at "
                f"most {pixel_limit} (and {MAX_SIDE} a side) are drawn; lower --dpi or raise --max-pixels."
            )
        return scale, size


def _pdfium(name: str) -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise BackendUnavailable(
            f"{name} is a PDF document, which needs pypdfium2, and that is not installed; run "
            "pip install 'edge-runtime[pdf]'."
        ) from None
    # What it logs about XFA in static forms concerns its own build; our sentences report damage.
    logging.getLogger("pypdfium2").setLevel(logging.CRITICAL)
    _close_at_exit()
    return pypdfium2


@cache
def _close_at_exit() -> None:
    """Close open files when the program ends: registered after pypdfium2's own clean-up, so run before it."""
    atexit.register(_close_open_files)


def _close_open_files() -> None:
    for file in list(_open_files):
        file.close()


def _close(document: Any) -> None:
    with _pdfium_lock:
        document.close()


def _why_not_opened(name: str, error: Any, password: str | None) -> str:
    if error.err_code == _ERR_PASSWORD and not password:
        return f"{name} is encrypted; give its password with --password."
    if error.err_code == _ERR_PASSWORD:
        return f"{name} is encrypted, and the password that was given does not open it; check it."
    if error.err_code == _ERR_SECURITY:
        return f"{name} is encrypted in a way that pdfium does not know; save it without encryption."
    return f"{name} is not a readable PDF, or has no pages; it is damaged or cut short: get the file again."
