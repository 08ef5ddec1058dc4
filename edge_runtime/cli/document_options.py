"""Documents and many pictures on the command line: their options, and one answer per page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.command import INTERRUPTED
from edge_runtime.cli.piped import Piped
from edge_runtime.errors import ImageError
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.pages import PAGE_LIMIT

if TYPE_CHECKING:
    from edge_runtime.answers import Answer
    from edge_runtime.model import AnyModel

Asked = str | Path | Piped | VideoPart
"""Text, or something to look at."""

PRESET_NAMES = ("ocr", "markdown", "table", "caption")
"""As in `presets`, which is not imported for the help."""


class SliceLimits(click.ParamType[Any]):
    """A limit for all pictures, or one for each file in order: `9` or `9,1,1`."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Read it."""
        if isinstance(value, list):
            return value
        numbers = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in numbers):
            self.fail(f"{value!r} is neither a positive number nor several separated by commas.", param, ctx)
        return [int(part) for part in numbers]


def document_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options for documents and many pictures."""
    for option in reversed(
        (
            click.option(
                "--preset",
                type=click.Choice(PRESET_NAMES),
                metavar="NAME",
                help="Ask for ocr, markdown, table or caption.",
            ),
            click.option("--pages", metavar="LIST", help="Pages of PDF and TIFF files, such as 1-3,7.  [all]"),
            click.option(
                "--dpi",
                type=click.FloatRange(1, 4800),
                metavar="N",
                help="Resolution of PDF pages.  [what slices can use]",
            ),
            click.option(
                "--password",
                envvar="EDGE_RUNTIME_PASSWORD",
                metavar="TEXT",
                help="Password of encrypted PDF files; also from EDGE_RUNTIME_PASSWORD.",
            ),
            click.option(
                "--max-pages",
                "page_limit",
                type=click.IntRange(1),
                default=PAGE_LIMIT,
                metavar="N",
                help="Maximum pages of a document.  [2000]",
            ),
            click.option("--fit", is_flag=True, help="Cut pictures into fewer slices until they fit the context."),
            click.option(
                "--fit-tokens",
                type=click.IntRange(1),
                metavar="N",
                help="The same, until pictures take at most N tokens.",
            ),
        )
    ):
        command = option(command)
    return command


def take_documents(options: dict[str, Any], content: Sequence[Asked], *, others: bool) -> bool:
    """Translate the options into those of `Model.chat`.

    Parameters
    ----------
    others : whether another option asks about one picture only.

    Returns
    -------
    each_page : whether to ask about each page separately.

    Raises
    ------
    click.UsageError
        When there is no question for that, or something without pages.
    """
    each_page = bool(options.pop("each_page"))
    asks = options["preset"] is not None or any(isinstance(part, str) for part in content)
    if each_page and (others or not asks):
        raise click.UsageError("--each-page needs a question or --preset, and cannot be used with --draw.")
    if each_page and any(isinstance(part, VideoPart) for part in content):
        raise click.UsageError("--each-page asks about pages and pictures; ask about a video separately.")
    options["fit"] = options.pop("fit_tokens") or options["fit"]
    options["file_limit_bytes"] = sys.maxsize  # the user's own files; the limit is for files from others
    return each_page


def limit_slices(content: Sequence[Asked], options: dict[str, Any], *, chatting: bool) -> list[Any]:
    """Give every file its own cell limit if there are several limits; otherwise one applies to all.

    Raises
    ------
    click.UsageError
        When there are not as many limits as files, or a chat would have to remember them.
    """
    limits: list[int] = options.pop("max_slices") or []
    if len(limits) < 2:
        options["max_slices"] = limits[0] if limits else None
        return list(content)
    if chatting:
        raise click.UsageError(
            "--max-slices takes several numbers only with a question; a chat has one for all files."
        )
    n_files = sum(not isinstance(part, str) for part in content)
    if len(limits) != n_files:
        raise click.UsageError(
            f"--max-slices has {len(limits)} numbers for {n_files} files; give one for all or one each."
        )
    options["max_slices"] = None
    left = iter(limits)
    return [part if isinstance(part, str) else _limited(part, next(left)) for part in content]


def _limited(file: Path | Piped | VideoPart, limit: int) -> Any:
    if isinstance(file, VideoPart):
        return replace(file, options=replace(file.options, max_slices=limit))
    return {"type": "image", "image": file, "max_slices": limit}


def note_fitted(fitted_slices: int | None) -> None:
    """Report that pictures were cut into fewer cells than asked for."""
    if fitted_slices is not None:
        from edge_runtime.cli import terminal as console

        cells = "1 cell, so not at all" if fitted_slices == 1 else f"{fitted_slices} cells"
        console.note(f"To make the pictures fit, each was cut into at most {cells}.")


def answer_pages(
    model: AnyModel, before: list[Any], content: Sequence[Any], options: dict[str, Any], *, as_json: bool
) -> None:
    """Ask about every page; print the answers one after another, or as one JSON object.

    Ends the program with 1 when a page could not be read, with 130 when it was stopped.
    """
    from edge_runtime.cli import terminal as console
    from edge_runtime.page_by_page import PageAnswer, asked_options, join_pages, pages_asked, without_fence

    files = [part["image"] if isinstance(part, dict) else part for part in content if not isinstance(part, str)]
    pages: list[PageAnswer] = []
    printed = interrupted = False
    asked = list(pages_asked(content, options))
    for number, page in enumerate(asked, 1):
        where = f"{files[page.file]}, page {page.page}"
        try:
            answer = console.answer(
                model,
                [*before, page.message],
                asked_options(options),
                quiet=True,
                label=f"page {number} of {len(asked)}: ",
            )
        except ImageError as error:
            click.echo(f"edge-runtime: {error}", err=True)
            pages.append(PageAnswer(page.file, page.page, None, str(error)))
            continue
        except KeyboardInterrupt:  # while the page was being rendered
            interrupted = True
            break
        pages.append(PageAnswer(page.file, page.page, answer))
        if answer.finish_reason in ("length", "repetition"):
            console.note(f"{where}: the answer was cut off ({answer.finish_reason}).")
        text = console.printable(without_fence(answer.answer))
        if text and not as_json:
            click.echo(f"\n{text}" if printed else text)
            printed = True
        if answer.finish_reason == "cancelled":
            interrupted = True
            break
    if as_json:
        click.echo(json.dumps(_as_json(pages, files, join_pages([page.text for page in pages])), ensure_ascii=False))
    if interrupted:
        sys.exit(INTERRUPTED)
    if any(page.answer is None for page in pages):
        sys.exit(1)


def _as_json(pages: Sequence[Any], files: Sequence[Path | Piped], text: str) -> dict[str, Any]:
    found = []
    for page in pages:
        entry: dict[str, Any] = {"file": str(files[page.file]), "page": page.page, "error": page.error}
        if page.answer is not None:
            entry |= answer_fields(page.answer)
        found.append(entry)
    return {"pages": found, "text": text}


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer for `--json`, without log probabilities that were not asked for, and what only metrics need."""
    found = asdict(answer)
    unasked = (
        "encoded_slices",
        "prompt_logprobs",
        *(("logprobs", "end_logprobs") if answer.logprobs is None else ()),
    )
    return {name: value for name, value in found.items() if name not in unasked}
