"""Answers of the engine → replies and chunks of llama-server's own completions. Source: its `server-task.cpp`.

Enters: pieces while an answer is generated, finished `Answer`s. Leaves: dictionaries. Knows no connections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.answers import Answer
from edge_runtime.engine.events import Progress
from edge_runtime.generation.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server.openai.replies import timings

Reply = dict[str, Any]
NO_SLOT = -1


@dataclass
class LlamaCompletions:
    """Replies and chunks of one request.

    Parameters
    ----------
    settings : of the request, as `generation_settings` holds them.
    prompts : texts of the prompts, one for each answer.
    n_ctx : tokens of the context.
    """

    model: str
    settings: Mapping[str, Any]
    prompts: Sequence[str]
    n_ctx: int
    n_top: int = 0
    returns_ids: bool = False
    progress: Callable[[], Progress | None] = lambda: None
    """Progress of the work before the first token; called while an answer is generated."""
    _n_sent: dict[int, int] = field(default_factory=dict)
    """Number of an answer → tokens sent so far."""

    def whole(self, index: int, answer: Answer, fields: Sequence[str] = ()) -> Reply:
        """Whole reply, or only the wanted fields."""
        scores = answer.logprobs or []
        reply = self._end(index, answer)
        reply["content"] = answer.answer
        reply["tokens"] = [score.id for score in scores] if self.returns_ids else []
        if self.n_top:
            reply["completion_probabilities"] = [_probabilities(score) for score in scores]
        return _chosen(reply, fields) if fields else reply

    def begin(self) -> Iterator[Reply]:
        """Nothing comes before the answers."""
        return iter(())

    def of_prompt(self) -> Reply:
        """A chunk that reports prompt progress."""
        return self._chunk(0, "", [])

    def piece(self, index: int, piece: Piece) -> Iterator[Reply]:
        """Translate a piece: a chunk for each of its tokens, with the text at the last of them."""
        *before, last = piece.logprobs or (None,)
        for text, score in [*(("", score) for score in before), (piece.text, last)]:
            if text or score is not None:
                yield self._chunk(index, text, [score] if score else [])

    def end(self, index: int, answer: Answer) -> Reply:
        """Say why an answer ended, and repeat the request's settings."""
        return self._end(index, answer)

    def usage(self, answers: Sequence[Answer]) -> Iterator[Reply]:
        """Nothing comes after the answers."""
        return iter(())

    def _chunk(self, index: int, text: str, scores: Sequence[TokenLogprobs]) -> Reply:
        progress = self.progress()
        n_sent = self._n_sent[index] = self._n_sent.get(index, 0) + len(scores)
        chunk: Reply = {
            "index": index,
            "content": text,
            "tokens": [score.id for score in scores],
            "stop": False,
            "id_slot": NO_SLOT,
            "tokens_predicted": n_sent,
            "tokens_evaluated": 0 if progress is None else progress.prompt_tokens,
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


def _stop_type(answer: Answer) -> str:
    if answer.finish_reason != "stop":
        return "limit"
    return "eos" if answer.stop_string is None else "word"


def _probabilities(score: TokenLogprobs) -> dict[str, Any]:
    return {**_token(score), "top_logprobs": [_token(top) for top in score.top_logprobs]}


def _token(score: TokenLogprob) -> dict[str, Any]:
    return {"id": score.id, "token": score.token, "bytes": score.bytes, "logprob": score.logprob}


def _chosen(reply: Reply, fields: Sequence[str]) -> Reply:
    """Some fields of a reply; nested ones (`a/b`) under their full name, unknown ones left out."""
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
