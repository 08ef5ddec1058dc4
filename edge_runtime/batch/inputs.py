"""Files → items: one for each picture and video, one for each page of a document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from edge_runtime.batch.files import Files
from edge_runtime.batch.items import Asking, Failure, Item
from edge_runtime.errors import EdgeRuntimeError
from edge_runtime.inputs.documents import document_options
from edge_runtime.inputs.image import read_head
from edge_runtime.inputs.messages import DocumentPart, ImagePart
from edge_runtime.inputs.pages import ALL, choose_pages
from edge_runtime.inputs.picture_formats import is_pdf
from edge_runtime.inputs.tiff_directories import HEADS as TIFF_HEADS
from edge_runtime.inputs.workers.opener import WorkerOpener
from edge_runtime.inputs.workers.pool import DecoderPool


class Inputs:
    """Items about files. Made when all names are known to stand for something.

    Parameters
    ----------
    as_part : what a message holds for a file that is no document: a path, or a part for a video.
    pool : opens documents, in processes of their own.

    Raises
    ------
    ImageError
        When a name stands for nothing.
    """

    def __init__(self, files: Files, asking: Asking, as_part: Callable[[Path], Any], pool: DecoderPool) -> None:
        self._files, self._asking, self._as_part, self._pool = files, asking, as_part, pool
        self._asked = asking.fingerprint()
        self._options = {name: value for name, value in asking.options.items() if name != "pages"}
        self._n_files = self._n_documents = 0
        for path in files:
            self._n_files += 1
            self._n_documents += _may_have_pages(path)
        self.total, self._unopened = self._n_files, self._n_documents
        self.left_out = dict(files.left_out)

    @property
    def is_final(self) -> bool:
        """Whether every document has been opened."""
        return self._unopened <= 0

    def __iter__(self) -> Iterator[Item]:
        """Walk through the files; what cannot be opened is an item, too."""
        self.total, self._unopened = self._n_files, self._n_documents
        for path in self._files:
            try:
                pages = self._pages(path)
            except (EdgeRuntimeError, OSError) as error:
                yield replace(self._item(path, None), failure=Failure.of(error))
                pages = []
            self._unopened -= _may_have_pages(path)
            if pages is None:
                yield self._item(path, None)
                continue
            self.total += max(0, len(pages) - 1)
            for number in pages:
                yield self._item(path, number)

    def _item(self, path: Path, page: int | None) -> Item:
        name = os.path.normpath(path).replace(os.sep, "/")
        if page is None:
            messages = self._asking.messages([self._as_part(path)])
            return Item(name, {"input": name}, messages, self._options, self._asked)
        part = DocumentPart(path, pages=[page])
        about = {"input": name, "page": page}
        return Item(f"{name}#page={page}", about, self._asking.messages([part]), self._options, self._asked)

    def _pages(self, path: Path) -> list[int] | None:
        """Numbers of a document's chosen pages; None for anything else."""
        head = read_head(path)
        if not is_pdf(head) and not head.startswith(TIFF_HEADS):
            return None
        how = document_options(self._asking.options)
        with WorkerOpener(self._pool, lambda: None) as opener:
            is_document, pages = opener.part(ImagePart(path), replace(how, pages=None, page_limit=ALL), 1)
        if not is_document:
            return None
        n_pages = len(pages)
        return [index + 1 for index in choose_pages(how.pages, lambda wanted: n_pages, str(path), how.page_limit)]


def _may_have_pages(path: Path) -> bool:
    return path.suffix.lower() in (".pdf", ".tif", ".tiff")
