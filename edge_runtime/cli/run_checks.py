"""Checks of `edge-runtime run`'s arguments before a model is loaded, and notes before it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.document_options import Asked
from edge_runtime.cli.file_names import find_named
from edge_runtime.cli.piped import STDIN, Piped, read_pipe, waits_unread
from edge_runtime.cli.words import looks_like_file
from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.system.text_files import decode_text, parse_json

if TYPE_CHECKING:
    from edge_runtime.model import AnyModel


def check_stdin(arguments: tuple[str, ...], schema: str | None) -> None:
    """Refuse to read stdin twice."""
    if schema in STDIN and any(word in STDIN for word in arguments):
        raise click.UsageError("stdin can be read once: it is named as an argument and by --schema.")


def check_system(system: str | None) -> None:
    """Refuse a file name in place of its text."""
    if system is not None and not any(c.isspace() for c in system) and looks_like_file(system):
        raise click.UsageError(
            f'--system is the name of a file, {system[:80]!r}, expected the text itself: --system "$(cat FILE)".'
        )


def is_chat(arguments: Sequence[str], content: Sequence[Asked], preset: str | None) -> bool:
    """Whether there is no question, so that a chat starts; refused if it could not read its questions."""
    chatting = not any(isinstance(part, str) for part in content) and preset is None
    if chatting and any(word in STDIN for word in arguments):
        raise click.UsageError("A chat reads its questions from stdin, which '-' uses: add a question.")
    return chatting


def check_output(
    content: Sequence[Asked],
    *,
    chatting: bool,
    as_json: bool,
    logprobs: int | None,
    draw: Path | None,
    storyboard: Path | None,
) -> None:
    """Refuse what cannot be printed or drawn."""
    if as_json and chatting:
        raise click.UsageError("--json needs a question: add it as the last argument.")
    if logprobs is not None and not as_json:
        raise click.UsageError("--logprobs are printed as JSON: add --json.")
    if draw is not None:
        from edge_runtime.generation.grounding import check_drawing

        seen = [part for part in content if not isinstance(part, str)]
        if chatting or not seen or isinstance(seen[-1], VideoPart):
            raise click.UsageError("--draw needs a picture and a question.")
        check_drawing(draw)
    for option, target in (("--draw", draw), ("--storyboard", storyboard)):
        check_kept(option, target, content)


def check_kept(option: str, target: Path | None, content: Sequence[Asked]) -> None:
    """Refuse to overwrite one of the files that are asked about."""
    sources = [part.source if isinstance(part, VideoPart) else part for part in content]
    if target is None or not target.exists():
        return
    if any(isinstance(source, Path) and target.samefile(source) for source in sources):
        raise click.UsageError(f"{option} would replace {target}, which is asked about: name another file.")


def note_before(model: AnyModel, content: list[Any], *, chatting: bool) -> None:
    """Print notes before an answer: that the model is a toy, that stdin was not read."""
    from edge_runtime.answers import TOY_NOTICE
    from edge_runtime.cli import terminal as console

    if model.is_toy and not chatting:
        console.note(TOY_NOTICE)
    if all(isinstance(part, str) for part in content) and not chatting and waits_unread():
        console.note("stdin was not read: name '-' to ask about it.")


def read_schema(source: str) -> Any:
    """Read a JSON schema from its text, a file or a pipe.

    Raises
    ------
    MessageError
        When there is no such file, or what is there is not JSON.
    """
    text, name = source, "--schema"
    if not source.lstrip("\ufeff \t\r\n").startswith("{"):
        name = source
        try:
            text = _schema_file(source)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path, or not text
            reason = getattr(error, "strerror", None) or error
            raise MessageError(
                f"The schema {source[:80]!r} cannot be read: {reason}; give a file, or JSON that starts with '{{'."
            ) from None
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{name} is not valid JSON: {error}; expected a JSON schema.") from None


def _schema_file(source: str) -> str:
    if source in STDIN:
        found = read_pipe(source)
        return decode_text(found) if isinstance(found, Piped) else found
    paths = find_named(source, any_case=True)
    return decode_text((paths[0] if len(paths) == 1 else Path(source)).read_bytes())
