"""The text of a Modelfile ↔ its contents; back to text for `show`.

Grammar (Ollama's parser/parser.go): KEYWORD value, keywords in any case, `#` starts a comment line; values are bare
to the end of the line, quoted, or in triple quotes over several lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.server.errors import RequestError
from edge_runtime.store.names import visible

KEYWORDS = (
    "FROM",
    "PARAMETER",
    "TEMPLATE",
    "SYSTEM",
    "ADAPTER",
    "LICENSE",
    "MESSAGE",
    "RENDERER",
    "PARSER",
    "REQUIRES",
)
ROLES = ("system", "user", "assistant")
_LISTS = ("stop",)
_WORD = re.compile(r"[ \t]*([A-Za-z_]+)[ \t]*")


@dataclass
class Modelfile:
    """Contents of a Modelfile."""

    sources: list[str] = field(default_factory=list)
    """Values of FROM."""
    adapters: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    template: str = ""
    system: str = ""
    licenses: list[str] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile.

    Raises
    ------
    RequestError
        Names the line that cannot be read.
    """
    found, text = Modelfile(), text.removeprefix("\ufeff")  # Windows' editors write a byte order mark
    position = 0
    while position < len(text):
        end = text.find("\n", position)
        line = text[position : end if end >= 0 else len(text)]
        if not line.strip() or line.lstrip().startswith("#"):
            position += len(line) + 1
            continue
        number = text.count("\n", 0, position) + 1
        word = _WORD.match(text, position)
        keyword = word[1].upper() if word else ""
        if word is None or keyword not in KEYWORDS:
            raise RequestError(
                f"Line {number} of the Modelfile begins with {visible(line.strip())[:40]!r}; expected one of "
                f"{', '.join(KEYWORDS)}."
            )
        name = ""
        position = word.end()
        if keyword in ("PARAMETER", "MESSAGE"):
            second = _WORD.match(text, position)
            if second is None:
                raise RequestError(f"Line {number} of the Modelfile has {keyword} without a name; expected one.")
            name, position = second[1], second.end()
        value, position = _value(text, position, number)
        _take(found, keyword, name, value, number)
    if not found.sources:
        raise RequestError("The Modelfile has no FROM; expected the name of a model, or digests of uploaded files.")
    return found


def _value(text: str, position: int, number: int) -> tuple[str, int]:
    """The value at this position, and the position of the next line."""
    if text.startswith('"""', position):
        end = text.find('"""', position + 3)
        if end < 0:
            raise RequestError(f'Line {number} of the Modelfile opens """ and never closes it; close it.')
        newline = text.find("\n", end)
        return text[position + 3 : end], len(text) if newline < 0 else newline + 1
    end = text.find("\n", position)
    end = len(text) if end < 0 else end
    value = text[position:end].strip()
    if len(value) >= 2 and value[0] == value[-1] == '"':
        value = value[1:-1]
    return value, end + 1


def _take(found: Modelfile, keyword: str, name: str, value: str, number: int) -> None:
    if keyword == "FROM":
        found.sources.append(value)
    elif keyword == "ADAPTER":
        found.adapters.append(value)
    elif keyword == "TEMPLATE":
        found.template = value
    elif keyword == "SYSTEM":
        found.system = value
    elif keyword == "LICENSE":
        found.licenses.append(value)
    elif keyword == "MESSAGE":
        if name.lower() not in ROLES:
            raise RequestError(
                f"Line {number} of the Modelfile has a message of {visible(name)[:40]!r}; expected one of "
                f"{', '.join(ROLES)}."
            )
        found.messages.append({"role": name.lower(), "content": value})
    elif keyword == "PARAMETER":
        if name.lower() in _LISTS:
            found.parameters.setdefault(name.lower(), []).append(value)
        else:
            found.parameters[name.lower()] = _typed(value)


def _typed(value: str) -> Any:
    """A parameter's value: number, boolean, or text."""
    try:
        typed = json.loads(value)
    except ValueError:
        return value
    return typed if isinstance(typed, bool | int | float) else value


def modelfile_of(
    source: str,
    *,
    system: str = "",
    template: str = "",
    license: str = "",
    parameters: Mapping[str, Any],
    messages: tuple[Mapping[str, Any], ...] = (),
) -> str:
    """Write a Modelfile.

    Parameters
    ----------
    source : name of a model, for FROM.
    """
    lines = ["# Modelfile written by edge-runtime", f"FROM {source}"]
    if template:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    given = [(name, value if isinstance(value, list | tuple) else [value]) for name, value in parameters.items()]
    lines += [
        f"PARAMETER {name} {_quoted(item) if isinstance(item, str) else item}"
        for name, items in given
        for item in items
    ]
    lines += [f'MESSAGE {message.get("role")} """{message.get("content", "")}"""' for message in messages]
    if license:
        lines.append(f'LICENSE """{license}"""')
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text as a value; quotes have no escapes."""
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
