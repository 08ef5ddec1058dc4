"""Answers of the engine → the response object and the typed events of OpenAI's responses API.

Enters: pieces while an answer is generated, the finished `Answer`. Leaves: dictionaries, each event with its
`type` and `sequence_number`. A whole reply is the response of the last event, so both are the same. Knows no
connections. Source: openai-python's types, and the order of events that its accumulator expects.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

from edge_runtime.answers import Answer
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.openai.replies import timings, token_logprobs
from edge_runtime.server.openai.reply_types import Timings
from edge_runtime.server.openai.responses_requests import ResponsesRequest
from edge_runtime.server.reply_parts import arguments_text, new_id
from edge_runtime.structured_output import tools as runtime_tools

Event = dict[str, Any]
Item = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete", "failed"]


class InputDetails(TypedDict):
    """Parts of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    """Parts of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseFailure(TypedDict):
    """Why there is no answer."""

    code: str
    message: str


class Response(TypedDict):
    """Reply to `POST /v1/responses`."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    status: Status
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Item]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: str
    metadata: dict[str, str]
    user: str | None
    previous_response_id: str | None
    store: bool
    background: bool
    timings: NotRequired[Timings]
    """Of a finished response; llama-server's, not OpenAI's."""


def _usage(answer: Answer) -> ResponseUsage:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _tool(described: Mapping[str, Any]) -> dict[str, Any]:
    function = described["function"]
    return {
        "type": "function",
        "name": function["name"],
        "description": function.get("description"),
        "parameters": function.get("parameters"),
        "strict": False,
    }


def _choice(request: ResponsesRequest) -> str | dict[str, Any]:
    """The choice of tools in the form that clients parse: a name becomes an object."""
    choice = request.tool_choice
    if isinstance(choice, str) and choice not in ("auto", "none", "required"):
        return {"type": "function", "name": choice}
    if isinstance(choice, Mapping) and isinstance(function := choice.get("function"), Mapping):
        return {"type": "function", "name": function.get("name")}
    return choice or "auto"


def _format(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.format if request.text is not None else None
    if wanted is None:
        return {"format": {"type": "text"}}
    found = wanted.model_dump(by_alias=True, exclude_none=True, include={"type"})
    if wanted.type == "json_schema":
        found |= {"name": wanted.name or "schema", "schema": wanted.schema_, "strict": True}
    return {"format": found}


@dataclass
class ResponseEvents:
    """Events of one response: `begin`, then `piece` for each, then `end` or `fail`."""

    request: ResponsesRequest
    model: str
    """As the client called it."""
    id: str = field(default_factory=lambda: new_id("resp_"))
    created: int = field(default_factory=lambda: int(time.time()))
    _number: int = 0
    _output: list[Item] = field(default_factory=list)
    _open: Item | None = None
    """The item that text is added to."""
    _n_calls: int = 0

    def begin(self) -> Iterator[Event]:
        """Say that work has started."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.response("in_progress"))

    def of_prompt(self) -> Event:
        """An event that reports prompt progress."""
        return self._event("response.in_progress", response=self.response("in_progress"))

    def piece(self, piece: Piece) -> Iterator[Event]:
        """Translate a piece."""
        if piece.call is not None:
            yield from self._call(piece.call)
        elif piece.kind == "reasoning":
            yield from self._text(piece, "reasoning")
        else:
            yield from self._text(piece, "message")

    def end(self, answer: Answer) -> Iterator[Event]:
        """Close what is open and send the whole response; a complete answer without text has one empty message."""
        is_whole = answer.finish_reason == "stop"
        if is_whole and not any(item["type"] != "reasoning" for item in self._output):
            yield from self._text(Piece("", "answer"), "message")
        yield from self._close("completed" if is_whole else "incomplete")
        status: Status = "completed" if is_whole else "incomplete"
        yield self._event(f"response.{status}", response=self.response(status, answer))

    def fail(self, message: str, code: str) -> Iterator[Event]:
        """Report that the answer failed.

        Parameters
        ----------
        code : one that openai-python knows, such as `server_error`.
        """
        yield from self._close("incomplete")
        failed = self.response("failed") | {"error": {"code": code, "message": message}}
        yield self._event("response.failed", response=failed)

    def response(self, status: Status, answer: Answer | None = None) -> Response:
        """The response so far.

        Parameters
        ----------
        answer : the finished answer, if there is one.
        """
        request = self.request
        found: Response = {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.model,
            "output": [*self._output],
            "usage": None if answer is None else _usage(answer),
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "tools": [_tool(tool) for tool in request.offered_tools()[0]],
            "tool_choice": _choice(request),
            "parallel_tool_calls": request.max_calls is None,
            "text": _format(request),
            "reasoning": {"effort": request.effort, "summary": None},
            "truncation": request.truncation or "disabled",
            "metadata": request.metadata or {},
            "user": request.user,
            "previous_response_id": request.previous_response_id,
            "store": request.store is not False,
            "background": False,
        }
        if answer is not None:
            found["completed_at"] = int(time.time())
            found["timings"] = timings(answer)
        return found

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _text(self, piece: Piece, kind: Literal["reasoning", "message"]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close("completed")
            yield from self._begin_text(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += piece.text
        place = {**self._place(), "content_index": 0}
        if kind == "reasoning":
            if piece.text:
                yield self._event("response.reasoning_text.delta", delta=piece.text, **place)
            return
        scores = token_logprobs(piece.logprobs)
        part["logprobs"] += scores
        if piece.text or scores:
            yield self._event("response.output_text.delta", delta=piece.text, logprobs=scores, **place)

    def _begin_text(self, kind: Literal["reasoning", "message"]) -> Iterator[Event]:
        if kind == "reasoning":
            part: Item = {"type": "reasoning_text", "text": ""}
            item: Item = {"id": new_id("rs_"), "type": kind, "summary": [], "content": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": new_id("msg_"), "type": kind, "role": "assistant", "content": []}
        self._output.append(item | {"status": "in_progress"})
        self._open = self._output[-1]
        yield self._event("response.output_item.added", item=_copy(self._open), output_index=len(self._output) - 1)
        self._open["content"] = [part]
        yield self._event("response.content_part.added", part=_copy(part), content_index=0, **self._place())

    def _close(self, status: Literal["completed", "incomplete"]) -> Iterator[Event]:
        """End the open item."""
        if self._open is None:
            return
        item, part = self._open, self._open["content"][0]
        place = {**self._place(), "content_index": 0}
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", text=part["text"], **place)
        else:
            yield self._event("response.output_text.done", text=part["text"], logprobs=[*part["logprobs"]], **place)
        yield self._event("response.content_part.done", part=_copy(part), **place)
        item["status"] = status
        self._open = None
        yield self._event("response.output_item.done", item=_copy(item), output_index=len(self._output) - 1)

    def _call(self, call: runtime_tools.ToolCall) -> Iterator[Event]:
        if self._n_calls and self._n_calls == self.request.max_calls:
            return
        yield from self._close("completed")
        self._n_calls += 1
        arguments = arguments_text(call)
        item: Item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "call_id": new_id("call_"),
            "name": call.name,
            "arguments": "",
            "status": "in_progress",
        }
        self._output.append(item)
        place = self._place()
        yield self._event("response.output_item.added", item=_copy(item), output_index=place["output_index"])
        yield self._event("response.function_call_arguments.delta", delta=arguments, **place)
        item |= {"arguments": arguments, "status": "completed"}
        yield self._event("response.function_call_arguments.done", name=item["name"], arguments=arguments, **place)
        yield self._event("response.output_item.done", item=_copy(item), output_index=place["output_index"])

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}


def _copy(item: Item) -> Item:
    """A copy of an item: it grows after the event that announces it."""
    return {key: [*value] if isinstance(value, list) else value for key, value in item.items()}
