"""Bodies of OpenAI's requests, parsed, for tests of what becomes of them."""

from __future__ import annotations

from typing import Any

from edge_runtime.server.openai.requests import ChatCompletionRequest
from edge_runtime.server.openai.responses_requests import ResponsesRequest

TOOL = {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object"}}}
FLAT_TOOL = {"type": "function", "name": "weather", "description": "Now.", "parameters": {"type": "object"}}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
HI = {"role": "user", "content": "Hi"}


def chat(content: Any = "Hi", **fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": content}], **fields}
    )


def responses(given: Any = "Hi", **fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": given, **fields})
