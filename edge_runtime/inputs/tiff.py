"""TIFF file of several pages → upright RGB pictures, each read when it is used."""

from __future__ import annotations

import io
import threading
import weakref
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from PIL import Image

from edge_runtime.inputs.image import PIXEL_LIMIT, explained, refuse_raw, to_rgb, upright_size
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.repair import open_picture
from edge_runtime.inputs.tiff_directories import pages, read_planes


class TiffFile:
    """An open TIFF file.

    Parameters
    ----------
    source : path, or the file's bytes.
    name : what it is called in errors.

    Raises
    ------
    ImageError
        When it is damaged.
    """

    def __init__(self, source: Path | bytes, name: str) -> None:
        self.name = name
        self._lock = threading.Lock()
        with explained(name, PIXEL_LIMIT, source):
            refuse_raw(source, name)
            self._picture = open_picture(io.BytesIO(source) if isinstance(source, bytes) else source)
            self.close = weakref.finalize(self, self._picture.close)
            """Close the file; its pages cannot be read any more."""
        self._pages = pages(self._picture, name)
        self._places: list[int] = []

    def counted(self, most: int) -> int:
        """Number of pages, without previews, masks and overviews, counted no further than `most`.

        Pillow's own count would follow a chain of directories to its end, however many there are.

        Raises
        ------
        ImageError
            When the file has too many directories, or a damaged one.
        """
        with self._lock, explained(self.name, PIXEL_LIMIT):
            self._places += islice(self._pages, max(0, most - len(self._places)))
            return len(self._places)

    def page(self, index: int) -> TiffPage:
        """A page, counted from 0."""
        return TiffPage(self, index)

    def size(self, index: int, pixel_limit: int) -> tuple[int, int]:
        """(width, height) of a page, upright."""
        with self._lock, explained(self._page_name(index), pixel_limit):
            self._go_to(index)
            return upright_size(self._picture, self._page_name(index), pixel_limit)

    def read(self, index: int, pixel_limit: int) -> Image.Image:
        """A page as an RGB picture."""
        with self._lock, explained(self._page_name(index), pixel_limit):
            self._go_to(index)
            return to_rgb(self._picture, self._page_name(index), pixel_limit)

    def _go_to(self, index: int) -> None:
        self._picture.seek(self._places[index])
        read_planes(self._picture)

    def _page_name(self, index: int) -> str:
        return f"Page {index + 1} of {self.name}"


@dataclass(frozen=True)
class TiffPage(Page):
    """A page of a TIFF file."""

    file: TiffFile
    index: int

    def size(self, pixel_limit: int) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.file.size(self.index, pixel_limit)

    def render(self, pixel_limit: int) -> Image.Image:
        """The page as a picture."""
        return self.file.read(self.index, pixel_limit)
