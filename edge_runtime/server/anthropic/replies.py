"""Answers of the engine → replies and events of Anthropic's messages API.

Enters: pieces while an answer is generated, the `Answer` when it is finished. Leaves: dictionaries.
Knows no connections. Source: anthropic-sdk-python's types, and the order of events that its accumulator expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

from edge_runtime.answers import Answer
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.reply_parts import arguments_text, new_id
from edge_runtime.structured_output import tools as runtime_tools

Event = dict[str, Any]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(TypedDict):
    """Tokens of a request; those that needed no prefill are counted separately, as Anthropic does."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int


class MessageReply(TypedDict):
    """Reply to `POST /v1/messages`."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    """Reply to `POST /v1/messages/count_tokens`."""

    input_tokens: int


class AnthropicError(TypedDict):
    """What went wrong."""

    type: str
    message: str


class AnthropicErrorReply(TypedDict):
    """Reply to a request that failed."""

    type: Literal["error"]
    error: AnthropicError


def _usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int = 0) -> MessageUsage:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": completion_tokens,
    }


def _usage_of(answer: Answer) -> MessageUsage:
    return _usage(answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens)


def _stop_reason(answer: Answer, *, has_calls: bool) -> StopReason:
    if answer.finish_reason != "stop":
        return "max_tokens"
    if answer.stop_string is not None:
        return "stop_sequence"
    return "tool_use" if has_calls else "end_turn"


def _tool_use(call: runtime_tools.ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": new_id("toolu_"), "name": call.name, "input": call.arguments}


def _reply(id_: str, model: str, content: list[dict[str, Any]], usage: MessageUsage) -> MessageReply:
    return {
        "id": id_,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }


def whole_message(
    answer: Answer, model: str, *, max_calls: int | None = None, shows_thinking: bool = True
) -> MessageReply:
    """Whole reply.

    Parameters
    ----------
    model : as the client called it.
    max_calls : 1 if the client accepts one call at a time.
    shows_thinking : whether the reasoning's text is included; otherwise an empty block shows that there was some.
    """
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        shown = answer.reasoning if shows_thinking else ""
        content.append({"type": "thinking", "thinking": shown, "signature": ""})
    if answer.answer:
        content.append({"type": "text", "text": answer.answer})
    content += [_tool_use(call) for call in answer.tool_calls[:max_calls]]
    reply = _reply(new_id("msg_"), model, content, _usage_of(answer))
    reply["stop_reason"] = _stop_reason(answer, has_calls=bool(answer.tool_calls))
    reply["stop_sequence"] = answer.stop_string
    return reply


@dataclass
class MessageEvents:
    """Events of one streamed message: `begin`, then `piece` for each, then `end`."""

    model: str
    max_calls: int | None = None
    shows_thinking: bool = True
    id: str = field(default_factory=lambda: new_id("msg_"))
    _open: str | None = None
    """Type of the block that text is added to."""
    _index: int = -1
    _n_calls: int = 0

    def begin(self, prompt_tokens: int, cached_tokens: int) -> Iterator[Event]:
        """Start the message, with the length of the prompt."""
        usage = _usage(prompt_tokens, cached_tokens)
        yield {"type": "message_start", "message": _reply(self.id, self.model, [], usage)}

    def piece(self, piece: Piece) -> Iterator[Event]:
        """Translate a piece."""
        if piece.call is not None:
            if self._n_calls != self.max_calls:
                self._n_calls += 1
                yield from self._call(piece.call)
        elif piece.text and piece.kind == "reasoning":
            yield from self._begin({"type": "thinking", "thinking": "", "signature": ""})
            if self.shows_thinking:
                yield self._delta({"type": "thinking_delta", "thinking": piece.text})
        elif piece.text:
            yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": piece.text})

    def end(self, answer: Answer) -> Iterator[Event]:
        """Say why the answer ended, and how many tokens it took."""
        yield from self._close()
        reason = _stop_reason(answer, has_calls=bool(self._n_calls))
        delta = {"stop_reason": reason, "stop_sequence": answer.stop_string}
        yield {"type": "message_delta", "delta": delta, "usage": _usage_of(answer)}
        yield {"type": "message_stop"}

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        if self._open == block["type"]:
            return
        yield from self._close()
        self._index += 1
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _call(self, call: runtime_tools.ToolCall) -> Iterator[Event]:
        yield from self._close()
        yield from self._begin(_tool_use(call) | {"input": {}})
        yield self._delta({"type": "input_json_delta", "partial_json": arguments_text(call)})
        yield from self._close()

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Event]:
        if self._open == "thinking":  # Anthropic signs reasoning; nobody checks it here
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._index}
        self._open = None
