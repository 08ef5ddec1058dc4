"""Answers as the engine would give them, written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_runtime.answers import Answer
from edge_runtime.generation.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.generation.text_stream import Piece
from edge_runtime.structured_output.tools import ToolCall

WEATHER = ToolCall("weather", {"city": "Örebro"})


def scored(token: str, kind: str = "answer") -> TokenLogprobs:
    top = [TokenLogprob(1, token, [*token.encode()], -0.5), TokenLogprob(2, "no", [110, 111], -1.5)]
    return TokenLogprobs(1, token, [*token.encode()], -0.5, kind, top)


def call_piece(call: ToolCall = WEATHER) -> Piece:
    return Piece('<tool_call>{"name": ...}</tool_call>', "tool_call", call=call)


def made_answer(pieces: Sequence[Piece] = (), **fields: Any) -> Answer:
    """The answer that consists of these pieces."""
    text = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("answer", "reasoning")}
    scores = [score for piece in pieces for score in piece.logprobs]
    return Answer(
        **{
            "answer": text["answer"],
            "reasoning": text["reasoning"] or None,
            "finish_reason": "stop",
            "model": "demo",
            "prompt_tokens": 20,
            "visual_tokens": 8,
            "cached_tokens": 5,
            "completion_tokens": 9,
            "reasoning_tokens": 3 if text["reasoning"] else 0,
            "slices": [],
            "tool_calls": [piece.call for piece in pieces if piece.call],
            "logprobs": scores or None,
            **fields,
        }
    )


THOUGHTFUL = [Piece("Hm", "reasoning"), Piece("m.", "reasoning"), Piece("A ", "answer"), Piece("dog.", "answer")]
CALLING = [Piece("Let me see.", "answer"), call_piece(), call_piece(ToolCall("now", {}))]
SCORED = [
    Piece("Hm", "reasoning", (scored("Hm", "reasoning"),)),
    Piece("A ", "answer", (scored("</think>", "reasoning"), scored("A "))),
    Piece("dog.", "answer", (scored("dog"), scored("."))),
]
