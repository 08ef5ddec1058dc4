"""Which pages of a document are used, and what a page is before it becomes a picture."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice, takewhile

import numpy as np
import numpy.typing as npt
from PIL import Image

from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs.slicing import Size, cut_whole
from edge_runtime.weights.config import SlicingConfig

PAGE_LIMIT = 2000
"""Default for the maximum number of pages of one document."""

PageChoice = str | int | Sequence[int]
"""Pages counted from 1: `"1-3,7"`, `"5-"` (to the end), a number, or numbers in order."""

MAX_TEXT = 100_000
"""Characters of a page's own text."""

ALL = 1 << 31
"""More pages than any document has."""
_RANGE = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)


class Page(ABC):
    """A page of a document, or a picture elsewhere, which is decoded here only while it is used."""

    @abstractmethod
    def size(self, pixel_limit: int) -> tuple[int, int]:
        """(width, height) that the picture will have, without making it.

        Raises
        ------
        ImageError
            When the page cannot be read, or would have more than `pixel_limit` pixels.
        """

    @abstractmethod
    def render(self, pixel_limit: int) -> Image.Image:
        """The page as an upright RGB picture; errors as of `size`."""

    def text(self) -> str:
        """What the page says of its own text, in the order of the file: at most `MAX_TEXT` characters, or nothing."""
        return ""

    def cut(
        self, pixel_limit: int, config: SlicingConfig, max_slices: int | None
    ) -> tuple[Size, list[npt.NDArray[np.uint8]]]:
        """Size of the picture and pixels of its slices, as `slicing.cut_whole`; errors as of `size`, too."""
        picture = self.render(pixel_limit)
        return picture.size, cut_whole(picture, config, max_slices)


def choose_pages(choice: PageChoice | None, counted: Callable[[int], int], name: str, page_limit: int) -> list[int]:
    """Indices, counted from 0, of the chosen pages, in the order in which they were named.

    Parameters
    ----------
    choice : see `PageChoice`; None takes all.
    counted : returns the number of pages. It need not count beyond the number it is given, as counting may mean
        walking through the file.
    name : the document's, for errors.
    page_limit : maximum number of pages.

    Raises
    ------
    MessageError
        When the choice has the wrong form, or names a page that does not exist.
    ImageError
        When it names more pages than `page_limit`.
    """
    chosen = _numbers("1-" if choice is None else choice, counted)
    found = list(islice(_checked(chosen, counted, name), page_limit + 1))
    if len(found) > page_limit:
        what = f"is asked for more than {page_limit} pages"
        if choice is None:
            beyond = page_limit + 2
            n_pages = counted(beyond)
            what = f"has {n_pages if n_pages != beyond else f'more than {page_limit}'} pages"
        raise ImageError(
            f"{name} {what}, at most {page_limit} are read; choose some with --pages, or raise the limit with "
            "--max-pages."
        )
    return found


def _checked(numbers: Iterator[int], counted: Callable[[int], int], name: str) -> Iterator[int]:
    for number in numbers:
        n_pages = counted(number if number > 0 else ALL)
        if not 1 <= number <= n_pages:
            raise MessageError(
                f"Page {number} was asked for, but {name} has {n_pages} {'page' if n_pages == 1 else 'pages'}, which "
                "are counted from 1."
            )
        yield number - 1


def _numbers(choice: PageChoice, counted: Callable[[int], int]) -> Iterator[int]:
    """Numbers that a choice names, one after the other: a range may be of any length."""
    if isinstance(choice, str):
        for part in choice.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None:
                raise _wrong(choice)
            first = int(match[1])
            if match[3] and int(match[3]) < first:
                raise _wrong(choice)
            yield first
            if match[3]:
                yield from range(first + 1, int(match[3]) + 1)
            elif match[2]:
                yield from takewhile(lambda number: number <= counted(number), count(first + 1))
        return
    numbers = [choice] if isinstance(choice, int) else choice
    if not isinstance(numbers, Sequence | range) or not len(numbers):
        raise _wrong(choice)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise _wrong(choice)
        yield number


def _wrong(choice: object) -> MessageError:
    return MessageError(f"The pages are {str(choice)[:40]!r}; expected numbers and ranges such as 1-3,7 or 5-.")
