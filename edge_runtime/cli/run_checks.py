"""Checks of `edge-runtime run`'s arguments before a model is loaded, and notes before it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_runtime.cli.file_names import find_named
from edge_runtime.cli.piped import STDIN, Piped, read_pipe, waits_unread
from edge_runtime.cli.words import looks_like_file
from edge_runtime.errors import MessageError
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.system.text_files import decode_text, parse_json

if TYPE_CHECKING:
    from edge_runtime.model import Model


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


def check_kept(option: str, target: Path | None, content: list[Any]) -> None:
    """Refuse to overwrite one of the files that are asked about."""
    sources = [part.source if isinstance(part, VideoPart) else part for part in content]
    if target is None or not target.exists():
        return
    if any(isinstance(source, Path) and target.samefile(source) for source in sources):
        raise click.UsageError(f"{option} would replace {target}, which is asked about: name another file.")


def note_before(model: Model, content: list[Any], *, chatting: bool) -> None:
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
