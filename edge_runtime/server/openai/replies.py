"""Answers of the engine → replies and chunks of OpenAI's chat completions and completions.

Enters: pieces while an answer is generated, `Answer`s when it is finished. Leaves: the dictionaries of `reply_types`.
Knows neither requests nor connections. Source: openai-python's types; the order of chunks is that of OpenAI's own
servers.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from edge_runtime.answers import Answer
from edge_runtime.engine.events import FinishReason as EngineReason
from edge_runtime.generation.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.openai import reply_types as shapes
from edge_runtime.server.reply_parts import arguments_text, new_id
from edge_runtime.structured_output import tools as runtime_tools
from edge_runtime.version import __version__

FINGERPRINT = f"fp_edge_runtime_{__version__}"


def finish_reason(reason: EngineReason, *, has_calls: bool = False) -> shapes.FinishReason:
    """Why an answer ended: repetition and time limits make it incomplete, like the end of the context."""
    if reason != "stop":
        return "length"
    return "tool_calls" if has_calls else "stop"


def usage(answers: Sequence[Answer]) -> shapes.Usage:
    """Tokens of the answers to one prompt."""
    first, n_completion = answers[0], sum(answer.completion_tokens for answer in answers)
    expected = [answer.drafts.get("expected", {}) for answer in answers]
    checked, accepted = (sum(counts.get(name, 0) for counts in expected) for name in ("checked", "accepted"))
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": n_completion,
        "total_tokens": first.prompt_tokens + n_completion,
        "prompt_tokens_details": {"cached_tokens": first.cached_tokens, "image_tokens": first.visual_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": checked - accepted,
        },
    }


def timings(answer: Answer) -> shapes.Timings:
    """How the time of an answer was spent."""
    seconds = answer.timings_s
    prefill_s, decode_s = seconds.get("prefill", 0.0), seconds.get("decode", 0.0)
    n_read, n_cached = answer.prompt_tokens - answer.cached_tokens, answer.cached_tokens
    found: shapes.Timings = {
        **running_timings(n_cached, n_read, prefill_s, answer.completion_tokens, decode_s),
        "image_ms": (seconds.get("image", 0.0) + seconds.get("encode", 0.0)) * 1e3 if answer.pictures else 0.0,
        "first_token_ms": seconds.get("first_token", 0.0) * 1e3,
    }
    if answer.drafts:
        found["draft_n"] = sum(counts["checked"] for counts in answer.drafts.values())
        found["draft_n_accepted"] = sum(counts["accepted"] for counts in answer.drafts.values())
    return found


def running_timings(
    n_cached: int, n_prompt: int, prompt_s: float, n_predicted: int, decode_s: float
) -> shapes.RunningTimings:
    """Times and rates as llama-server reports them.

    The first token comes from the prompt's last logits, so generation rates count one step less.
    """
    n_steps = max(0, n_predicted - 1)
    return {
        "cache_n": n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_s * 1e3,
        "prompt_per_token_ms": _share(prompt_s * 1e3, n_prompt),
        "prompt_per_second": _share(n_prompt, prompt_s),
        "predicted_n": n_predicted,
        "predicted_ms": decode_s * 1e3,
        "predicted_per_token_ms": _share(decode_s * 1e3, n_steps),
        "predicted_per_second": _share(n_steps, decode_s),
    }


def _share(amount: float, parts: float) -> float:
    return amount / parts if parts else 0.0


def add_usage(parts: Sequence[shapes.Usage]) -> shapes.Usage:
    """Tokens of several prompts."""
    prompt, completion = (sum(part[key] for part in parts) for key in ("prompt_tokens", "completion_tokens"))
    details = [part["completion_tokens_details"] for part in parts]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(part["prompt_tokens_details"]["cached_tokens"] for part in parts),
            "image_tokens": sum(part["prompt_tokens_details"]["image_tokens"] for part in parts),
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(part["reasoning_tokens"] for part in details),
            "accepted_prediction_tokens": sum(part["accepted_prediction_tokens"] for part in details),
            "rejected_prediction_tokens": sum(part["rejected_prediction_tokens"] for part in details),
        },
    }


def token_logprobs(scores: Iterable[TokenLogprobs]) -> list[shapes.TokenLogprob]:
    """Log probabilities of the answer's tokens, without those of the reasoning."""
    return [
        {
            "token": score.token,
            "bytes": score.bytes,
            "logprob": score.logprob,
            "top_logprobs": [
                {"token": top.token, "bytes": top.bytes, "logprob": top.logprob} for top in score.top_logprobs
            ],
        }
        for score in scores
        if score.kind == "answer"
    ]


def _logprobs(scores: Iterable[TokenLogprobs]) -> shapes.Logprobs:
    return {"content": token_logprobs(scores), "refusal": None}


def _tool_call(call: runtime_tools.ToolCall) -> shapes.ToolCall:
    return {
        "id": new_id("call_"),
        "type": "function",
        "function": {"name": call.name, "arguments": arguments_text(call)},
    }


def chat_completion(answers: Sequence[Answer], model: str, *, max_calls: int | None = None) -> shapes.ChatCompletion:
    """Whole reply to a chat.

    Parameters
    ----------
    model : as the client called it.
    max_calls : 1 if the client accepts one call at a time.
    """
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
        "choices": [_choice(index, answer, max_calls) for index, answer in enumerate(answers)],
        "usage": usage(answers),
        "timings": timings(answers[0]),
    }


def _choice(index: int, answer: Answer, max_calls: int | None) -> shapes.Choice:
    calls = answer.tool_calls[:max_calls]
    message: shapes.Message = {"role": "assistant", "content": answer.answer, "refusal": None}
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
        message["content"] = answer.answer or None
    if answer.reasoning:
        message["reasoning"] = message["reasoning_content"] = answer.reasoning
    return {
        "index": index,
        "message": message,
        "logprobs": None if answer.logprobs is None else _logprobs(answer.logprobs),
        "finish_reason": finish_reason(answer.finish_reason, has_calls=bool(calls)),
    }


@dataclass
class ChatChunks:
    """Chunks of one streamed chat: `begin`, then `piece` and `end` for each answer, then `usage`."""

    model: str
    n: int = 1
    include_usage: bool = False
    max_calls: int | None = None
    id: str = field(default_factory=lambda: new_id("chatcmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    _calls: dict[int, int] = field(default_factory=dict)
    """Number of an answer → calls sent so far."""

    def begin(self) -> Iterator[shapes.ChatChunk]:
        """Start each answer with its role."""
        return (self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.n))

    def of_prompt(self) -> shapes.ChatChunk:
        """A chunk that reports prompt progress."""
        return self._chunk(0, {})

    def piece(self, index: int, piece: Piece) -> Iterator[shapes.ChatChunk]:
        """Translate a piece; one with nothing to show makes no chunk."""
        scores = _logprobs(piece.logprobs) if piece.logprobs else None
        if scores is not None and not scores["content"]:
            scores = None
        if piece.kind == "reasoning":
            delta: shapes.Delta = {"reasoning": piece.text, "reasoning_content": piece.text}
        elif piece.call is not None:
            number = self._calls.get(index, 0)
            if number == self.max_calls:
                return
            self._calls[index] = number + 1
            delta = {"tool_calls": [{"index": number, **_tool_call(piece.call)}]}
        else:
            delta = {"content": piece.text}
        if piece.text or scores:
            yield self._chunk(index, delta, scores)

    def end(self, index: int, answer: Answer) -> shapes.ChatChunk:
        """Say why an answer ended; add the times if no usage follows."""
        reason = finish_reason(answer.finish_reason, has_calls=index in self._calls)
        chunk = self._chunk(index, {}, reason=reason)
        if not self.include_usage:
            chunk["timings"] = timings(answer)
        return chunk

    def usage(self, answers: Sequence[Answer]) -> Iterator[shapes.ChatChunk]:
        """The token usage, if asked for."""
        if self.include_usage:
            yield self._frame([]) | {"usage": usage(answers), "timings": timings(answers[0])}

    def _chunk(
        self,
        index: int,
        delta: shapes.Delta,
        logprobs: shapes.Logprobs | None = None,
        reason: shapes.FinishReason | None = None,
    ) -> shapes.ChatChunk:
        choice: shapes.ChunkChoice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._frame([choice])

    def _frame(self, choices: list[shapes.ChunkChoice]) -> shapes.ChatChunk:
        chunk: shapes.ChatChunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }
        if self.include_usage:
            chunk["usage"] = None
        return chunk


class _Offsets:
    """Offsets of tokens in a text, whose characters may be split over several tokens."""

    def __init__(self, start: int = 0) -> None:
        self._utf8, self._n = codecs.getincrementaldecoder("utf-8")(errors="replace"), start

    def next(self, data: bytes) -> int:
        """Offset of the next token: the number of complete characters before it."""
        place = self._n
        self._n += len(self._utf8.decode(data))
        return place


def _ending(answer: Answer) -> list[TokenLogprobs]:
    """The token that ended an answer: completions list it, so that all generated tokens are listed."""
    return [] if answer.end_logprobs is None else [answer.end_logprobs]


def _token_text(score: TokenLogprob) -> str:
    """A token's text, or in OpenAI's form its bytes if they are not text, so that different tokens stay different."""
    try:
        return bytes(score.bytes).decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in score.bytes)


def _known(logprob: float) -> float | None:
    return None if math.isnan(logprob) else logprob


@dataclass
class TextCompletions:
    """Replies and chunks of one request for completions; answers are numbered across all its prompts."""

    model: str
    include_usage: bool = False
    n_top: int = 0
    echoed: Sequence[str] = ()
    """The prompt to repeat before each answer of a stream; empty if that was not asked for."""
    id: str = field(default_factory=lambda: new_id("cmpl-"))
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, _Offsets] = field(default_factory=dict)
    """Number of an answer → offset of its next token."""

    def whole(
        self,
        answers: Sequence[Answer],
        prompts: Sequence[str],
        total: shapes.Usage,
        prompt_scores: Mapping[int, Sequence[TokenLogprobs]] | None = None,
    ) -> shapes.TextCompletion:
        """Whole reply.

        Parameters
        ----------
        prompts : one for each answer, to repeat before it; empty if that was not asked for.
        prompt_scores : number of an answer → log probabilities of its prompt's tokens.
        """
        choices: list[shapes.TextChoice] = []
        for index, (answer, prompt) in enumerate(zip(answers, prompts, strict=True)):
            text = prompt + answer.answer
            scores: shapes.TextLogprobs | None = None
            if answer.logprobs is not None:
                of_prompt = (prompt_scores or {}).get(index, [])
                before = self._logprobs(of_prompt, _Offsets())
                after = self._logprobs([*answer.logprobs, *_ending(answer)], _Offsets(len(prompt)))
                scores = {
                    "tokens": before["tokens"] + after["tokens"],
                    "token_logprobs": before["token_logprobs"] + after["token_logprobs"],
                    "top_logprobs": (before["top_logprobs"] or []) + (after["top_logprobs"] or [])
                    if self.n_top
                    else None,
                    "text_offset": [min(at, len(text)) for at in before["text_offset"] + after["text_offset"]],
                }
            choices.append(self._choice(index, text, scores, answer.finish_reason))
        return self._frame(choices) | {"usage": total, "timings": timings(answers[0])}

    def begin(self) -> Iterator[shapes.TextCompletion]:
        """Repeat the prompt, if asked for."""
        for index, prompt in enumerate(self.echoed):
            self._offsets[index] = _Offsets(len(prompt))
            if prompt:
                yield self._chunk(self._choice(index, prompt, None, None))

    def of_prompt(self) -> shapes.TextCompletion:
        """A chunk that reports prompt progress."""
        return self._chunk(self._choice(0, "", None, None))

    def piece(self, index: int, piece: Piece) -> Iterator[shapes.TextCompletion]:
        """Translate a piece; completions have no reasoning."""
        if piece.kind == "answer":
            offsets = self._offsets.setdefault(index, _Offsets())
            scores = self._logprobs(piece.logprobs, offsets) if piece.logprobs else None
            yield self._chunk(self._choice(index, piece.text, scores, None))

    def end(self, index: int, answer: Answer) -> shapes.TextCompletion:
        """Say why an answer ended; add the times if no usage follows."""
        ending = _ending(answer)
        scores = self._logprobs(ending, self._offsets.setdefault(index, _Offsets())) if ending else None
        chunk = self._chunk(self._choice(index, "", scores, answer.finish_reason))
        if not self.include_usage:
            chunk["timings"] = timings(answer)
        return chunk

    def usage(self, answers: Sequence[Answer]) -> Iterator[shapes.TextCompletion]:
        """The token usage, if asked for."""
        if self.include_usage:
            yield self._frame([]) | {"usage": usage(answers), "timings": timings(answers[0])}

    def _choice(
        self, index: int, text: str, logprobs: shapes.TextLogprobs | None, reason: EngineReason | None
    ) -> shapes.TextChoice:
        ended: shapes.TextChoice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if reason is not None:
            ended["finish_reason"] = "stop" if reason == "stop" else "length"
        return ended

    def _logprobs(self, scores: Iterable[TokenLogprobs], offsets: _Offsets) -> shapes.TextLogprobs:
        scores = [score for score in scores if score.kind != "reasoning"]
        return {
            "tokens": [_token_text(score) for score in scores],
            "token_logprobs": [_known(score.logprob) for score in scores],
            "top_logprobs": [self._alternatives(score) for score in scores] if self.n_top else None,
            "text_offset": [offsets.next(bytes(score.bytes)) for score in scores],
        }

    def _alternatives(self, score: TokenLogprobs) -> dict[str, float] | None:
        if _known(score.logprob) is None:
            return None
        return {_token_text(top): top.logprob for top in score.top_logprobs}

    def _chunk(self, choice: shapes.TextChoice) -> shapes.TextCompletion:
        chunk = self._frame([choice])
        if self.include_usage:
            chunk["usage"] = None
        return chunk

    def _frame(self, choices: list[shapes.TextChoice]) -> shapes.TextCompletion:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }
