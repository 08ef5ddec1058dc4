"""Token ids → pieces of text to show: whole characters, reasoning separate from the answer, stop strings removed.

The ids of `<think>` and `</think>` mark the reasoning, never printed text, so an answer that quotes them stays whole.
The same holds for tool calls, if tools were offered.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_runtime.generation.logprobs import TokenLogprobs, TokenScores, describe
from edge_runtime.inputs.messages import THINK, THINK_END
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END, MalformedCall, ToolCall, parse_call

Kind = Literal["reasoning", "answer", "tool_call"]


@dataclass(frozen=True)
class Piece:
    """A piece of an answer while it is generated."""

    text: str
    """For a tool call, everything from tag to tag."""
    kind: Kind
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of the tokens that start in this piece, or before it without text of their own; if requested."""
    call: ToolCall | None = None
    """Only in a piece of kind `tool_call`."""
    malformed: MalformedCall | None = None
    """In a piece of kind `answer` that should have been a tool call; its text is what the model wrote."""
    n_tokens: int = field(default=0, compare=False)
    """Tokens of the answer and its reasoning so far, including this piece."""


class TextStream:
    """Turns the ids of one answer into pieces.

    Parameters
    ----------
    thinking : whether the prompt opened the reasoning, so that the first token belongs to it.
    stop : strings that end the answer wherever they start, even inside a token.
    stop_in_reasoning : whether they also end it in the reasoning.
    tools : names of the functions that were offered; without any, tags of calls are text.
    goes_on : whether the prompt contains the start of the reasoning, so that a line break belongs to it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        stop: Sequence[str] = (),
        stop_in_reasoning: bool = False,
        tools: Sequence[str] = (),
        goes_on: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._tools = tools
        self._call_begins = tokenizer.special_ids.get(TOOL_CALL) if tools else None
        self._call_ends = tokenizer.special_ids.get(TOOL_CALL_END) if tools else None
        self._call: bytearray | None = None
        """What was written of an incomplete call."""
        self._think = tokenizer.special_ids.get(THINK)
        self._think_end = tokenizer.special_ids.get(THINK_END)
        self._stop = [text for text in stop if text]
        self._stop_in_reasoning = stop_in_reasoning
        self.stop_string: str | None = None
        """The stop string that ended the answer."""
        self._kind: Literal["reasoning", "answer"] = "reasoning" if thinking else "answer"
        # A character's bytes may come in several tokens; invalid ones become U+FFFD, incomplete ones wait.
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._n_decoded = 0
        """Characters so far, including those held back."""
        self._scored: deque[tuple[int, TokenLogprobs]] = deque()
        """Tokens not yet part of a piece, with the position where each starts."""
        self._at_start = thinking and not goes_on
        self.stopped = False
        """Whether a stop string was found."""
        self._n_fed = 0
        self.n_reasoning = 0
        """Tokens of the reasoning so far, including the one that ended it."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the next token belongs to the reasoning."""
        return self._kind == "reasoning"

    def feed(self, token_id: int, scores: TokenScores | None = None) -> list[Piece]:
        """Return the pieces that can be shown after this token."""
        if self.stopped:
            return []
        self._n_fed += 1
        self.n_reasoning += self.is_reasoning
        if self._call is not None or (token_id == self._call_begins is not None and not self.is_reasoning):
            return self._feed_call(token_id, scores)
        self._note(scores)
        if token_id in (self._think, self._think_end) and token_id is not None:
            pieces = self._release(final=True)
            self._kind = "reasoning" if token_id == self._think else "answer"
            self._at_start = True
            return pieces
        text = self._utf8.decode(self._tokenizer.token_bytes(token_id))
        self._held += text
        self._n_decoded += len(text)
        return self._release(final=False)

    def _note(self, scores: TokenScores | None) -> None:
        if scores is not None:
            self._scored.append((self._n_decoded, describe(scores, self._kind, self._tokenizer)))

    def finish(self) -> list[Piece]:
        """Return the rest at the end of the answer.

        An incomplete character is dropped: it could only be shown as garbage.
        """
        if self.stopped:
            return []
        return self._release(final=True) if self._call is None else [self._end_call(is_complete=False)]

    def _feed_call(self, token_id: int, scores: TokenScores | None) -> list[Piece]:
        """Add a token of a call, or one of its tags."""
        pieces: list[Piece] = []
        if self._call is None or token_id == self._call_begins:
            self._held = self._held.rstrip("\n")  # the newline before a call comes from the template
            pieces = self._release(final=True) if self._call is None else [self._end_call(is_complete=False)]
            self._call = bytearray()
            self._note(scores)
            return pieces
        self._note(scores)
        if token_id == self._call_ends:
            pieces = [self._end_call(is_complete=True)]
        else:
            self._call += self._tokenizer.token_bytes(token_id)
        return pieces

    def _end_call(self, *, is_complete: bool) -> Piece:
        assert self._call is not None
        body, self._call = self._call.decode("utf-8", "replace"), None
        self._at_start = True  # so does the newline after it
        text = TOOL_CALL + body + (TOOL_CALL_END if is_complete else "")
        found = parse_call(body, self._tools) if is_complete else "The tool call was not finished."
        logprobs = tuple(scores for _, scores in self._scored)
        self._scored.clear()
        if isinstance(found, ToolCall):
            return Piece(text, "tool_call", logprobs, call=found, n_tokens=self._n_fed)
        return Piece(text, "answer", logprobs, malformed=MalformedCall(text, found), n_tokens=self._n_fed)

    def _release(self, *, final: bool) -> list[Piece]:
        text = self._releasable(final)
        shown = self._n_decoded - len(self._held)
        taken = []
        while (text or final) and self._scored and (self._scored[0][0] < shown or (final and not self.stopped)):
            taken.append(self._scored.popleft()[1])
        return [Piece(text, self._kind, (*taken,), n_tokens=self._n_fed)] if text or taken else []

    def _releasable(self, final: bool) -> str:
        """Remove and return what can be shown of the text held back."""
        if final:
            self._utf8.reset()
        text, self._held = self._held, ""
        if self._at_start:
            text = text.lstrip("\n")
        if self._kind == "answer" or self._stop_in_reasoning:
            text = self._cut_at_stop(text, final)
        if self._kind == "reasoning":
            # The newline before </think> comes from the template, not from the model.
            shown = text.rstrip("\n")
            if not final and not self.stopped:
                self._held = text[len(shown) :] + self._held
            text = shown
        elif self._tools and not final and not self._held:
            shown = text.rstrip("\n")  # a call may follow
            text, self._held = shown, text[len(shown) :]
        self._at_start = self._at_start and not text
        return text

    def _cut_at_stop(self, text: str, final: bool) -> str:
        """Cut at the first stop string; hold back a tail that may become one."""
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stop_string = min(found, key=lambda item: item[0])
            self.stopped = True
            self._held = text[at:]  # forever
            return text[:at]
        if not final:
            longest = max((_overlap(text, stop) for stop in self._stop), default=0)
            if longest:
                text, self._held = text[:-longest], text[-longest:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class RepetitionDetector:
    """Detects an answer that repeats itself.

    A loop is a run of tokens that equal those `period` tokens before, over at least `MIN_SPAN` tokens and
    `MIN_TURNS` periods: more than rows of a table or a drawn line need.
    """

    LONGEST_PERIOD = 64
    MIN_SPAN, MIN_TURNS = 256, 6

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._runs = [0] * (self.LONGEST_PERIOD + 1)

    def feed(self, token_id: int) -> bool:
        """Add a token; returns whether it completes a loop."""
        ids, runs = self._ids, self._runs
        ids.append(token_id)
        for period in range(1, min(self.LONGEST_PERIOD, len(ids) - 1) + 1):
            runs[period] = runs[period] + 1 if ids[-1 - period] == token_id else 0
            if runs[period] >= max(self.MIN_SPAN, self.MIN_TURNS * period):
                return True
        del ids[: -self.LONGEST_PERIOD - 1]
        return False
