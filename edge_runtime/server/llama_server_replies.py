"""Answers of the engine → replies and chunks of llama-server's own completions. Source: its `server-task.cpp`.

Enters: pieces while an answer is made, `Answer`s when they are finished. Leaves: dictionaries. Knows no connections.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.answers import Answer
from edge_runtime.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.requests import Progress
from edge_runtime.server.openai_replies import timings
from edge_runtime.streaming import Piece

Reply = dict[str, Any]
NO_SLOT = -1


@dataclass
class PromptProgress:
    """What a stream tells of its prompt: once when it begins, then whenever more of it was read."""

    started: float = field(default_factory=time.perf_counter)
    _told: int = -1

    def more(self, progress: Progress | None) -> dict[str, Any] | None:
        """`prompt_progress`, where there is more to tell than before."""
        if progress is None or not progress.prompt_tokens:
            return None
        done = progress.cached_tokens + (progress.done if progress.stage == "prefill" else 0)
        if done <= self._told:
            return None
        self._told = done
        return {
            "total": progress.prompt_tokens,
            "cache": progress.cached_tokens,
            "processed": done,
            "time_ms": round((time.perf_counter() - self.started) * 1e3),
        }


@dataclass
class LlamaCompletions:
    """Replies and chunks of one request.

    Parameters
    ----------
    settings : of the request, as `generation_settings` tells them.
    prompts : texts of the prompts, one for each answer.
    n_ctx : tokens of the context.
    """

    model: str
    settings: Mapping[str, Any]
    prompts: Sequence[str]
    n_ctx: int
    n_top: int = 0
    tells_ids: bool = False
    tells_times: bool = False
    _n_sent: dict[int, int] = field(default_factory=dict)
    """Number of an answer → tokens that were sent of it."""
    _started: float = field(default_factory=time.perf_counter)
    _first: float | None = None
    """When the first token came."""

    def whole(self, index: int, answer: Answer, fields: Sequence[str] = ()) -> Reply:
        """Whole reply, or the fields of it that are wanted."""
        scores = answer.logprobs or []
        reply = self._end(index, answer)
        reply["content"] = answer.answer
        reply["tokens"] = [score.id for score in scores] if self.tells_ids else []
        if self.n_top:
            reply["completion_probabilities"] = [_probabilities(score) for score in scores]
        return _chosen(reply, fields) if fields else reply

    def progress(self, told: Mapping[str, Any]) -> Reply:
        """How much of the prompt was read."""
        chunk = self._chunk(0, "", [], told["total"]) | {"prompt_progress": dict(told)}
        if self.tells_times:
            n_read = told["processed"] - told["cache"]
            chunk["timings"] = _times(told["cache"], n_read, told["time_ms"] / 1e3 if n_read else 0.0, 0, 0.0)
        return chunk

    def piece(self, index: int, piece: Piece, progress: Progress | None) -> Iterator[Reply]:
        """Translate a piece: a chunk for each of its tokens, with the text at the last of them."""
        n_prompt, n_cached = (progress.prompt_tokens, progress.cached_tokens) if progress is not None else (0, 0)
        self._first = self._first or time.perf_counter()
        *before, last = piece.logprobs or (None,)
        for text, score in [*(("", score) for score in before), (piece.text, last)]:
            if not text and score is None:
                continue
            chunk = self._chunk(index, text, [score] if score else [], n_prompt)
            if self.tells_times:
                prompt_s, decode_s = self._first - self._started, time.perf_counter() - self._first
                n_sent = sum(self._n_sent.values())
                chunk["timings"] = _times(n_cached, n_prompt - n_cached, prompt_s, n_sent, decode_s)
            yield chunk

    def end(self, index: int, answer: Answer) -> Reply:
        """Say why an answer ended, and what was asked."""
        return self._end(index, answer)

    def _chunk(self, index: int, text: str, scores: Sequence[TokenLogprobs], n_prompt: int) -> Reply:
        n_sent = self._n_sent[index] = self._n_sent.get(index, 0) + len(scores)
        chunk: Reply = {
            "index": index,
            "content": text,
            "tokens": [score.id for score in scores],
            "stop": False,
            "id_slot": NO_SLOT,
            "tokens_predicted": n_sent,
            "tokens_evaluated": n_prompt,
        }
        if self.n_top and scores:
            chunk["completion_probabilities"] = [_probabilities(score) for score in scores]
        return chunk

    def _end(self, index: int, answer: Answer) -> Reply:
        n_used = answer.prompt_tokens + answer.completion_tokens
        return {
            "index": index,
            "content": "",
            "tokens": [],
            "id_slot": NO_SLOT,
            "stop": True,
            "model": self.model,
            "tokens_predicted": answer.completion_tokens,
            "tokens_evaluated": answer.prompt_tokens,
            "generation_settings": dict(self.settings),
            "prompt": self.prompts[index],
            "has_new_line": "\n" in answer.answer,
            "truncated": answer.finish_reason == "length" and n_used >= self.n_ctx,
            "stop_type": _stop_type(answer),
            "stopping_word": answer.stop_string or "",
            "tokens_cached": answer.cached_tokens,
            "timings": timings(answer),
        }


def _times(n_cached: int, n_prompt: int, prompt_s: float, n_predicted: int, decode_s: float) -> dict[str, Any]:
    """Times while an answer is made; the same names as when it is finished."""
    return {
        "cache_n": n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_s * 1e3,
        "prompt_per_token_ms": prompt_s * 1e3 / n_prompt if n_prompt else 0.0,
        "prompt_per_second": n_prompt / prompt_s if prompt_s else 0.0,
        "predicted_n": n_predicted,
        "predicted_ms": decode_s * 1e3,
        "predicted_per_token_ms": decode_s * 1e3 / n_predicted if n_predicted else 0.0,
        "predicted_per_second": n_predicted / decode_s if decode_s else 0.0,
    }


def _stop_type(answer: Answer) -> str:
    if answer.finish_reason != "stop":
        return "limit"
    return "eos" if answer.stop_string is None else "word"


def _probabilities(score: TokenLogprobs) -> dict[str, Any]:
    return {**_token(score), "top_logprobs": [_token(top) for top in score.top_logprobs]}


def _token(score: TokenLogprob) -> dict[str, Any]:
    return {"id": score.id, "token": score.token, "bytes": score.bytes, "logprob": score.logprob}


def _chosen(reply: Reply, fields: Sequence[str]) -> Reply:
    """Some fields of a reply; those inside of others (`a/b`) under their whole name, unknown ones left out."""
    found: Reply = {}
    for name in fields:
        value: Any = reply
        for part in name.split("/"):
            if not isinstance(value, Mapping) or part not in value:
                break
            value = value[part]
        else:
            found[name] = value
    return found
