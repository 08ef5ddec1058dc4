"""What stands behind `--schema`: JSON, a file, or a pipe → a JSON schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.file_names import find_named
from edge_runtime.piped import STDIN, Piped, read_pipe
from edge_runtime.text_files import decode_text, parse_json


def read_schema(source: str) -> Any:
    """A JSON schema from its text, from a file, or from a pipe.

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
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path, or no text
            reason = getattr(error, "strerror", None) or error
            raise MessageError(
                f"The schema {source[:80]!r} cannot be read: {reason}; give a file, or JSON that begins with '{{'."
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
