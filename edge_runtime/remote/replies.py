"""What a server sends back → the pieces and the end of an answer.

Enters: the JSON objects of a stream of chunks, or of one whole reply. Leaves: `Piece`s and `Finished`, as an
engine's. Sources: openai-python's types; `reasoning_content` of SGLang, llama-server, ours and vLLM before 0.12,
`reasoning` of vLLM since; `stop_reason` of vLLM and `matched_stop` of SGLang name the stop string.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.engine.events import Finished, FinishReason
from edge_runtime.errors import EndpointError
from edge_runtime.generation.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.generation.text_stream import Kind, Piece
from edge_runtime.inputs.messages import THINK, THINK_END
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END, MalformedCall, ToolCall

NO_ID = -1
"""Of tokens in log probabilities: OpenAI's API tells their text, not their ids."""
MAX_CALLS = 1024
_ENDS: dict[str, FinishReason] = {
    **dict.fromkeys(("stop", "tool_calls", "function_call"), "stop"),
    "length": "length",
}
SHOWN = 200
"""Characters of an answer's end in an error."""


@dataclass
class _Call:
    """A tool call while its parts arrive."""

    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass
class Usage:
    """Tokens as the server counted them."""

    prompt_tokens: int = 0
    visual_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


class Reader:
    """Reads one answer.

    Parameters
    ----------
    thinking : whether reasoning was asked for. A server without a parser for it sends it as text up to `</think>`;
        such text is held until that is decided.
    stop : the request's stop strings.
    title : of the server, for errors.
    must_call : whether the answer has to be a call of a tool; some servers drop that where a model's template knows
    no
        tools.
    """

    def __init__(self, *, thinking: bool, stop: Sequence[str], title: str, must_call: bool = False) -> None:
        self._stop, self._title, self._must_call = stop, title, must_call
        self._undecided: list[str] | None = [] if thinking else None
        self._calls: dict[int, _Call] = {}
        self._text: list[str] = []
        self._reason: str | None = None
        self._stopped_by: str | None = None
        self._n_pieces = 0
        self._started = time.perf_counter()
        self.first_token_s = 0.0
        """Seconds until the first piece."""
        self.usage = Usage()

    @property
    def received(self) -> str:
        """Text of the answer so far, without its reasoning."""
        return "".join(self._text)

    @property
    def has_begun(self) -> bool:
        """Whether anything of the answer has arrived, its reasoning or a call included."""
        return self._n_pieces > 0 or bool(self._calls) or bool(self._undecided)

    @property
    def has_ended(self) -> bool:
        """Whether the server has said why the answer ended."""
        return self._reason is not None

    @property
    def n_pieces(self) -> int:
        """Pieces so far: about as many as tokens."""
        return self._n_pieces

    def feed(self, chunk: Any) -> Iterator[Piece]:
        """Pieces of one chunk.

        Raises
        ------
        EndpointError
            When it is not what the API says.
        """
        if not isinstance(chunk, Mapping):
            raise self._odd("something that is no JSON object")
        if isinstance(chunk.get("usage"), Mapping):
            self.usage = _usage(chunk["usage"])
        choices = chunk.get("choices") or []
        if not isinstance(choices, list):
            raise self._odd("choices that are no list")
        for choice in choices[:1]:
            if not isinstance(choice, Mapping):
                raise self._odd("a choice that is no JSON object")
            yield from self._choice(choice)

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[Piece]:
        delta = choice.get("delta") or choice.get("message") or {}
        if not isinstance(delta, Mapping):
            raise self._odd("a delta that is no JSON object")
        scores = _scores(choice.get("logprobs"))
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str) and reasoning:
            self._undecided = None
            yield self._piece(reasoning, "reasoning")
        content = delta.get("content")
        if isinstance(content, list):  # parts, as some servers write them
            content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
        refusal = delta.get("refusal")
        content = (content or "") + (refusal if isinstance(refusal, str) else "")
        if content or scores:
            yield from self._content(content, scores)
        for number, call in enumerate(delta.get("tool_calls") or []):
            self._call(call, number)
        if (reason := choice.get("finish_reason")) is not None:
            self._reason = str(reason)
            by = choice.get("stop_reason", choice.get("matched_stop"))
            self._stopped_by = by if isinstance(by, str) and by in self._stop else None

    def _content(self, text: str, scores: tuple[TokenLogprobs, ...]) -> Iterator[Piece]:
        if self._undecided is None:
            yield self._piece(text, "answer", scores)
            return
        self._undecided.append(text)
        if THINK_END not in "".join(self._undecided[-2:]) and THINK_END not in "".join(self._undecided):
            return
        reasoning, answer = "".join(self._undecided).split(THINK_END, 1)
        self._undecided = None
        reasoning = reasoning.lstrip().removeprefix(THINK).strip("\n")
        if reasoning:
            yield self._piece(reasoning, "reasoning")
        if answer.lstrip("\n"):
            yield self._piece(answer.lstrip("\n"), "answer")

    def _piece(self, text: str, kind: Kind, scores: tuple[TokenLogprobs, ...] = ()) -> Piece:
        if not self._n_pieces:
            self.first_token_s = time.perf_counter() - self._started
        self._n_pieces += 1
        if kind == "answer":
            self._text.append(text)
        return Piece(text, kind, scores, n_tokens=self._n_pieces)

    def _call(self, call: Any, number: int) -> None:
        """Add a part of a tool call; parts of one have the same index."""
        function = call.get("function") if isinstance(call, Mapping) else None
        index = call.get("index") if isinstance(call, Mapping) else None
        index = index if isinstance(index, int) else number
        if not isinstance(function, Mapping) or not 0 <= index < MAX_CALLS:
            raise self._odd("a tool call without a function")
        found = self._calls.setdefault(index, _Call())
        found.name = found.name or str(function.get("name") or "")
        arguments = function.get("arguments")
        if isinstance(arguments, Mapping):
            arguments = json.dumps(arguments, ensure_ascii=False)
        found.arguments.append(arguments if isinstance(arguments, str) else "")

    def end(self) -> Iterator[Piece]:
        """What was held until the end: text that turned out to be the answer, and calls.

        Raises
        ------
        EndpointError
            When the answer was refused by a filter, or aborted.
        """
        if self._undecided:
            text, self._undecided = "".join(self._undecided), None
            opened = text.lstrip().startswith(THINK)
            yield self._piece(
                text.lstrip().removeprefix(THINK) if opened else text, "reasoning" if opened else "answer"
            )
        if self._reason is not None and self._reason not in _ENDS:
            what = {"content_filter": "a filter of the server stopped it", "abort": "the server aborted it"}
            raise EndpointError(
                f"The answer of {self._title} is not whole: "
                f"{what.get(self._reason, f'it ended with {self._reason!r}')}"
                f"{self.so_far()}.",
                received=self.received,
            )
        if self._must_call and not self._calls and _ENDS.get(self._reason or "") == "stop":
            raise EndpointError(
                f"{self._title} was told that a tool must be called, but called none{self.so_far()}; does its "
                f"model take "
                "tools, and was it started with them?",
                received=self.received,
            )
        for _, call in sorted(self._calls.items()):
            yield self._finished_call(call)

    def _finished_call(self, call: _Call) -> Piece:
        text = "".join(call.arguments)
        whole = f'{TOOL_CALL}\n{{"name": {json.dumps(call.name)}, "arguments": {text or "{}"}}}\n{TOOL_CALL_END}'
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not call.name or not isinstance(arguments, dict):
            self._text.append(whole)
            reason = "The call has no name." if not call.name else "The arguments are not a JSON object."
            self._n_pieces += 1
            return Piece(whole, "answer", malformed=MalformedCall(whole, reason), n_tokens=self._n_pieces)
        self._n_pieces += 1
        return Piece(whole, "tool_call", call=ToolCall(call.name, arguments), n_tokens=self._n_pieces)

    def finished(self) -> Finished:
        """The last event."""
        decode_s = time.perf_counter() - self._started - self.first_token_s
        return Finished(
            _ENDS.get(self._reason or "stop", "stop"),
            self.usage.completion_tokens,
            self.usage.cached_tokens,
            {"encode": 0.0, "prefill": 0.0, "first_token": self.first_token_s, "decode": max(0.0, decode_s)},
            reasoning_tokens=self.usage.reasoning_tokens,
            stop_string=self._stopped_by,
        )

    def so_far(self) -> str:
        """What has arrived, as the end of a sentence."""
        text = self.received
        if not text:
            return (
                ", before any text of the answer"
                if not self.has_begun
                else ", after reasoning or calls, before any text"
            )
        shown = text if len(text) <= SHOWN else f"...{text[-SHOWN:]}"
        return f", after {len(text)} characters: {shown!r}"

    def _odd(self, what: str) -> EndpointError:
        return EndpointError(
            f"The reply of {self._title} has {what}{self.so_far()}; expected chunks of a chat completion: is it "
            f"a server "
            "with OpenAI's API?",
            received=self.received,
        )


def _usage(found: Mapping[str, Any]) -> Usage:
    prompt, completion = found.get("prompt_tokens_details"), found.get("completion_tokens_details")
    return Usage(
        _count(found.get("prompt_tokens")),
        _count(prompt.get("image_tokens") if isinstance(prompt, Mapping) else 0),
        _count(prompt.get("cached_tokens") if isinstance(prompt, Mapping) else 0),
        _count(found.get("completion_tokens")),
        _count(
            completion.get("reasoning_tokens") if isinstance(completion, Mapping) else found.get("reasoning_tokens")
        ),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _scores(found: Any) -> tuple[TokenLogprobs, ...]:
    """Log probabilities of a chunk's tokens."""
    content = found.get("content") if isinstance(found, Mapping) else None
    if not isinstance(content, list):
        return ()
    return tuple(
        TokenLogprobs(
            **vars(_score(entry)),
            kind="answer",
            top_logprobs=[_score(top) for top in entry.get("top_logprobs") or [] if isinstance(top, Mapping)],
        )
        for entry in content
        if isinstance(entry, Mapping)
    )


def _score(entry: Mapping[str, Any]) -> TokenLogprob:
    token, value, raw = str(entry.get("token", "")), entry.get("logprob"), entry.get("bytes")
    token_id = entry.get("id")  # llama-server tells it
    return TokenLogprob(
        token_id if isinstance(token_id, int) else NO_ID,
        token,
        [*raw] if isinstance(raw, list) else [*token.encode("utf-8", "replace")],
        float(value) if isinstance(value, int | float) else math.nan,
    )
