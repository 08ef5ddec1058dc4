"""Which pages of a document are looked at, and what a page is before it becomes a picture."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image

from edge_runtime.errors import ImageError, MessageError

PAGE_LIMIT = 2000
"""Default for the most pages of one document."""

PageChoice = str | int | Sequence[int]
"""Pages counted from 1: `"1-3,7"`, `"5-"` (to the end), a number, or numbers in order."""

_RANGE = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)


class Page(ABC):
    """A page of a document, which becomes a picture only while it is looked at."""

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


def choose_pages(choice: PageChoice | None, n_pages: int, name: str, page_limit: int) -> list[int]:
    """Indices, counted from 0, of the pages that are wanted, in the order in which they were named.

    Parameters
    ----------
    choice : see `PageChoice`; None takes all.
    n_pages : pages there are.
    name : the document's, for errors.
    page_limit : most pages to be taken.

    Raises
    ------
    MessageError
        When the choice has the wrong form, or names a page that is not there.
    ImageError
        When it has more pages than `page_limit`.
    """
    chosen = range(1, n_pages + 1) if choice is None else _numbers(choice, n_pages)
    found = list(islice(_checked(chosen, n_pages, name), page_limit + 1))
    if len(found) > page_limit:
        count = f"has {n_pages} pages" if choice is None else f"is to be read on more than {page_limit} pages"
        raise ImageError(
            f"{name} {count}, at most {page_limit} are looked at; choose some with --pages, or raise the limit with "
            "--max-pages."
        )
    return found


def _checked(numbers: Iterator[int] | range, n_pages: int, name: str) -> Iterator[int]:
    for number in numbers:
        if not 1 <= number <= n_pages:
            raise MessageError(
                f"Page {number} was asked for, but {name} has {n_pages} {'page' if n_pages == 1 else 'pages'}, which "
                "are counted from 1."
            )
        yield number - 1


def _numbers(choice: PageChoice, n_pages: int) -> Iterator[int]:
    """Numbers that a choice names, one after the other: a range may be as long as it likes."""
    if isinstance(choice, str):
        for part in choice.split(","):
            match = _RANGE.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[3] or n_pages)) if match else (0, 0)
            if match is None or (match[2] and match[3] and last < first):
                raise _wrong(choice)
            yield from range(first, last + 1) if match[2] and last >= first else [first]
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
