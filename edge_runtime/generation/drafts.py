"""Guesses of the next tokens of an answer from texts that are there already: what was said before, what was expected.

Input: the tokens of prompt and answer so far. Output: a draft, which the model checks in one call; what it would
have said anyway is kept, so no guess changes an answer. Knows nothing of how drafts are checked.

The idea is prompt lookup decoding (Saxena, 2023): where the last tokens have occurred before, what followed them
there may follow again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, Protocol

MIN_MATCH = 3
"""Tokens that must be the same before a place is continued."""
MAX_MATCH = 32
"""Tokens that are compared to find the best of several places."""
PLACES = 8
"""Most recent places of the same `MIN_MATCH` tokens that are compared."""
RECENT_TOKENS = 1 << 16
"""Tokens of earlier answers to remember: about 10 MB."""
MAX_MISSED = 6
"""Tokens in a row that are not as expected, after which an expected text is looked for anew."""
WINDOW = 48
"""Tokens of an expected text in which the answer may go on after one that was not expected."""


class Draft(NamedTuple):
    """Tokens that may come next."""

    source: str
    """Whose guess it is, and how sure: statistics are kept by this name."""
    tokens: list[int]


class Source(Protocol):
    """Something that guesses."""

    def propose(self, keys: Sequence[Hashable], n: int) -> Draft | None:
        """At most `n` tokens that may follow `keys`, prompt and answer so far; None: no guess."""


class SuffixIndex:
    """A growing sequence in which the places of any `MIN_MATCH` successive tokens are found."""

    def __init__(self) -> None:
        self._keys: list[Hashable] = []
        self._places: dict[tuple[Hashable, ...], list[int]] = {}
        """Where what follows begins, by the tokens before it; the most recent `PLACES`."""

    def __len__(self) -> int:
        return len(self._keys)

    def extend(self, keys: Iterable[Hashable]) -> None:
        """Append keys; those that are not token ids match nothing."""
        for key in keys:
            self._keys.append(key)
            last = tuple(self._keys[-MIN_MATCH:])
            if len(last) == MIN_MATCH and all(isinstance(part, int) for part in last):
                places = self._places.setdefault(last, [])
                places.append(len(self._keys))
                del places[:-PLACES]

    def places(self, keys: Sequence[Hashable]) -> Sequence[int]:
        """Where what follows begins, after the last `MIN_MATCH` of `keys`."""
        return self._places.get(tuple(keys[-MIN_MATCH:]), ())

    def after(self, keys: Sequence[Hashable], n: int) -> tuple[list[int], int]:
        """What follows the place that is most like the end of `keys`: at most n tokens, and how many matched."""
        best, longest = len(self._keys), 0
        for place in reversed(self.places(keys)):
            if place == len(self._keys):
                continue  # this end itself
            matched = MIN_MATCH
            most = min(MAX_MATCH, place, len(keys))
            while matched < most and self._keys[place - matched - 1] == keys[-matched - 1]:
                matched += 1
            if matched > longest:
                best, longest = place, matched
        tokens = []
        for key in self._keys[best : best + n]:
            if not isinstance(key, int):
                break
            tokens.append(key)
        return tokens, longest


def _named(source: str, matched: int) -> str:
    """A source's name, with how much matched: the more, the surer."""
    return f"{source}/{'long' if matched >= 4 * MIN_MATCH else 'middle' if matched >= 2 * MIN_MATCH else 'short'}"


class OwnText:
    """Prompt and answer of one request: forms, tables and code repeat themselves."""

    def __init__(self) -> None:
        self._index = SuffixIndex()

    def propose(self, keys: Sequence[Hashable], n: int) -> Draft | None:
        """See `Source`."""
        self._index.extend(keys[len(self._index) :])
        tokens, matched = self._index.after(keys, n)
        return Draft(_named("suffix", matched), tokens) if tokens else None


class RecentAnswers:
    """Earlier answers of the same model: the same question about another page is answered in similar words.

    Used on the inference thread alone.
    """

    def __init__(self, n_tokens: int = RECENT_TOKENS) -> None:
        self._most, self._answers, self._index = n_tokens, list[list[Hashable]](), SuffixIndex()

    def add(self, tokens: Sequence[Hashable]) -> None:
        """Remember an answer; the oldest half is forgotten when they become too many."""
        if len(tokens) <= MIN_MATCH:
            return
        answer = [*tokens[-self._most // 2 :], None]
        self._answers.append(answer)
        self._index.extend(answer)
        if len(self._index) > self._most:
            kept, n = list[list[Hashable]](), 0
            while self._answers and n + len(self._answers[-1]) <= self._most // 2:
                kept.append(self._answers.pop())
                n += len(kept[-1])
            self._answers, self._index = kept[::-1], SuffixIndex()
            for answer in self._answers:
                self._index.extend(answer)

    def propose(self, keys: Sequence[Hashable], n: int) -> Draft | None:
        """See `Source`."""
        tokens, matched = self._index.after(keys, n)
        return Draft(_named("recent", matched), tokens) if tokens else None


class ExpectedText:
    """A text that the answer probably is, with changes: an edited file, or what a page says of itself.

    Parameters
    ----------
    tokens : of the text.
    begin : positions of the prompt.
    """

    def __init__(self, tokens: Sequence[int], begin: int) -> None:
        self._tokens, self._seen, self._at, self._missed = [*tokens], begin, 0, 0
        self._index = SuffixIndex()
        self._index.extend([*tokens, None])

    def propose(self, keys: Sequence[Hashable], n: int) -> Draft | None:
        """See `Source`."""
        for i in range(self._seen, len(keys)):
            self._follow(keys, i)
        self._seen = max(self._seen, len(keys))
        if self._missed > MAX_MISSED:
            return None
        tokens = self._tokens[self._at : self._at + n]
        return Draft("expected" if not self._missed else "expected/after a miss", tokens) if tokens else None

    def _follow(self, keys: Sequence[Hashable], i: int) -> None:
        """Move behind the token that was said: to where it is expected, or to the nearest such place after it."""
        if self._at < len(self._tokens) and self._tokens[self._at] == keys[i]:
            self._at, self._missed = self._at + 1, 0
            return
        self._missed += 1
        found = self._index.places(keys[max(0, i + 1 - MIN_MATCH) : i + 1])
        if found:  # the nearest place of the last words
            self._at, self._missed = min(found, key=lambda place: abs(place - self._at)), 0
            return
        near = self._tokens[self._at : self._at + WINDOW]
        pair = keys[i - 1 : i + 1]
        for place in range(len(near) - 1):
            if near[place : place + 2] == pair:
                self._at, self._missed = self._at + place + 2, 0
                return
        self._at = min(self._at + 1, len(self._tokens))  # another word in its place
