"""Options of Ollama's requests and Modelfiles → keyword arguments of `Model.submit`. Knows no routes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edge_runtime.server.errors import RequestError

MAX_KEEP_ALIVE_S = 10 * 365 * 86400.0


def format_options(wanted: Any) -> dict[str, Any]:
    """Translate `format`: `json`, or a schema.

    Raises
    ------
    RequestError
        For anything else.
    """
    if wanted in (None, ""):
        return {}
    if wanted == "json":
        return {"json": True}
    if isinstance(wanted, str):  # some clients send the schema as text
        with contextlib.suppress(ValueError, RecursionError):
            wanted = json.loads(wanted)
    if isinstance(wanted, Mapping):
        return {"schema": wanted}
    raise RequestError("format is neither 'json' nor a JSON schema; expected one of them, or nothing.", "format")


_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_seconds(value: float | str | None) -> float | None:
    """Translate `keep_alive`: seconds, or a duration as Go writes it (`5m`, `1h30m`); below 0 is forever.

    Raises
    ------
    RequestError
        When it is neither.
    """
    if value is None or value == "":
        return None
    seconds = _seconds(value)
    if seconds is None or seconds != seconds:
        raise RequestError(
            f"keep_alive is {str(value)[:40]!r}; expected seconds, or a duration such as '5m'; -1 keeps it loaded.",
            "keep_alive",
        )
    return -1.0 if seconds < 0 else min(seconds, MAX_KEEP_ALIVE_S)


def _seconds(value: float | str) -> float | None:
    if not isinstance(value, str):
        return None if isinstance(value, bool) else float(value)
    text = value.strip()
    sign, bare = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if re.fullmatch(r"\d+(\.\d*)?", bare):
        return sign * float(bare)
    parts = _DURATION.findall(bare)
    if not parts or "".join(number + unit for number, unit in parts) != bare:
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)


def parameter_lines(parameters: Mapping[str, Any]) -> str:
    """Parameters as Ollama shows them: one per line, in two columns."""
    lines = []
    for name, value in sorted(parameters.items()):
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            shown = json.dumps(item, ensure_ascii=False) if isinstance(item, str) else str(item)
            lines.append(f"{name:<30} {shown}")
    return "\n".join(lines)
