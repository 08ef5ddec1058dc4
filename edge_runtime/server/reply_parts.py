"""Pieces of replies that several protocols write the same way."""

from __future__ import annotations

import json
import secrets

from edge_runtime.structured_output import tools as runtime_tools


def new_id(prefix: str) -> str:
    """An id that nobody had before."""
    return f"{prefix}{secrets.token_hex(12)}"


def arguments_text(call: runtime_tools.ToolCall) -> str:
    """Arguments of a call as OpenAI's APIs carry them: JSON in a string."""
    return json.dumps(call.arguments, ensure_ascii=False)
