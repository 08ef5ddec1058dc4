"""One question about every page of documents → one answer per page, and their texts joined.

Every page is a separate request, made when the previous one is answered: one page is drawn at a time, and the file is
closed in between, so memory does not grow with the number of pages. A damaged page costs only its own answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from edge_runtime.errors import ImageError, MessageError
from edge_runtime.inputs.documents import document_options, page_numbers, read
from edge_runtime.inputs.image import existing_file
from edge_runtime.inputs.messages import DocumentPart, ImagePart, Message, VideoPart, parse_messages
from edge_runtime.options import GenerationKeywords
from edge_runtime.system.base64_data import is_data_uri

if TYPE_CHECKING:
    from edge_runtime.answers import Answer
    from edge_runtime.model import AnyModel

_FENCED = re.compile(r"\s*```(?:markdown|md)?[ \t]*\n(.*?)\n?```\s*", re.DOTALL)


@dataclass(frozen=True)
class PageAsked:
    """A page, and the message that asks about it."""

    file: int
    """Index of its document or picture in the content, from 0."""
    page: int
    """Counted from 1; a picture has one."""
    message: Message


@dataclass(frozen=True)
class PageAnswer:
    """The answer about one page."""

    file: int
    """Index of its document or picture in the content, from 0."""
    page: int
    """Counted from 1; a picture has one."""
    answer: Answer | None
    """None if the page could not be read."""
    error: str | None = None
    """Why not."""

    @property
    def text(self) -> str:
        """The answer's text; empty if there is none."""
        return "" if self.answer is None else self.answer.answer


def each_page(
    model: AnyModel, content: Any, *, before: Sequence[Any] = (), **options: Unpack[GenerationKeywords]
) -> Iterator[PageAnswer]:
    """Ask the same question about every page.

        for page in each_page(model, [Path("scan.pdf")], preset="markdown"):
            print(page.page, page.text)

    Parameters
    ----------
    content : content of a user message: texts, and the documents or pictures whose pages are asked about.
    before : messages before every question, such as a system prompt.
    options : as of `Model.chat`, see `GenerationOptions`.

    Yields
    ------
    answers : one for each page, in order, as soon as it is available.

    Raises
    ------
    EdgeRuntimeError
        When a document cannot be opened, or the question can never be answered (too long, a wrong option).
    """
    for asked in pages_asked(content, options):
        try:
            (answering,) = model.submit([*before, asked.message], **asked_options(options))
            answer = answering.result()
        except ImageError as error:
            yield PageAnswer(asked.file, asked.page, None, str(error))
        else:
            yield PageAnswer(asked.file, asked.page, answer)


def pages_asked(content: Any, options: Mapping[str, Any]) -> Iterator[PageAsked]:
    """Messages that ask about each page.

    Parameters
    ----------
    content, options : as of `each_page`.

    Raises
    ------
    MessageError, ImageError
        When there is nothing to ask about, there is a video, or a document cannot be opened.
    """
    (message,) = parse_messages([{"role": "user", "content": content}])
    if any(isinstance(part, VideoPart) for part in message.parts):
        raise MessageError("There is a video, which has no pages; ask about it by itself.")
    how = document_options(options)
    # Open files are read once, not once per page.
    parts = [read(part, how) if isinstance(part, ImagePart) else part for part in message.parts]
    places = [i for i, part in enumerate(parts) if isinstance(part, ImagePart)]
    if not places:
        raise MessageError("There is no document and no picture to be asked about; name one.")
    for file, place in enumerate(places):
        part = parts[place]
        assert isinstance(part, ImagePart)
        others = [
            [other for other in side if not isinstance(other, ImagePart)]
            for side in (parts[:place], parts[place + 1 :])
        ]
        numbers = page_numbers(part, how)
        if numbers is None and isinstance(part.source, str | Path) and not is_data_uri(str(part.source)):
            existing_file(part.source)  # a missing file is reported at once
        for number in [1] if numbers is None else numbers:
            page = part if numbers is None else _page_of(part, number)
            yield PageAsked(file, number, replace(message, parts=(*others[0], page, *others[1])))


def asked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the request about one page; its part says which page it is."""
    return {name: value for name, value in options.items() if name != "pages"}


def _page_of(part: ImagePart, number: int) -> DocumentPart:
    if isinstance(part, DocumentPart):
        return replace(part, pages=[number])
    return DocumentPart(part.source, part.max_slices, pages=[number])


def join_pages(texts: Sequence[str]) -> str:
    """Join the texts of pages: blank lines between them, empty pages left out, fences around a whole page removed."""
    bare = (without_fence(text) for text in texts)
    return "\n\n".join(text for text in bare if text)


def without_fence(text: str) -> str:
    """A page's text without blank ends, and without the fence that models like to put around Markdown."""
    match = _FENCED.fullmatch(text)
    if match and "```" not in match[1]:
        text = match[1]
    return text.strip("\n").rstrip()
