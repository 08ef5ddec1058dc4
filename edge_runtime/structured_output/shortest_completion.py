"""The shortest completion of an answer: which tokens complete its JSON text from any position.

The grammar only says what may follow. A simple rule walks through it: what is forced; else what closes; else the
simplest value. It finds the shortest completion or one that is little longer. Where a key or an item must be new, a
search tries branches: first those that differ from what is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from edge_runtime.structured_output.effort import Effort
from edge_runtime.structured_output.json_position import QUOTE, JsonPosition
from edge_runtime.structured_output.trail import Trail

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edge_runtime.structured_output.vocabulary import GrammarVocabulary

MAX_END = 4096  # tokens of a completion; without an end by then, there is assumed to be none
FEW = 3  # bytes that are checked one by one, before all are
RUN = 16  # bytes of a long string that are checked together
MAX_TRIED = 1500  # steps of a search for a new key or item; after that, there is assumed to be none
# Where there is a choice, a text ends soonest with a closing bracket, then with plain values, then with brackets.
_OUTSIDE = (b'}],:"0123456789-.ntfaelrsu+E[{ ', b'}],:"0123456789-.ntfaelrsu+E{[ ')
_PLAIN = bytes(b for b in range(32, 127) if b not in b'"\\')
_INSIDE = b'"' + _PLAIN + b"\\" + bytes(range(128, 256))
_NUMBER = b"0123456789.-+eE"


def shortest_completion(
    matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary, effort: Effort | None = None
) -> list[int] | None:
    """Tokens that lead from a place in an answer to its end, as few as a simple rule finds.

    The rule: what is forced; else close; else the simplest value.

    Parameters
    ----------
    effort : limits the work.

    Returns
    -------
    ids : None if more than `MAX_END` tokens do not lead to an end.
    """
    trail = Trail(matcher, position, vocabulary, effort or Effort())
    for outside in _OUTSIDE:
        with trail.rolled_back():
            if _Completion(trail, outside).reach_end():
                return [*trail.ids]
    return None


def is_end(ids: Sequence[int], matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> bool:
    """Whether these tokens lead from a place in an answer to its end."""
    if not ids:
        return bool(matcher.is_accepting())
    if matcher.validate_tokens([*ids, vocabulary.eos_token_id]) <= len(ids):
        return False
    return position.copy().feed(b"".join(vocabulary.token_bytes[i] for i in ids))


def has_new_key(
    matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary, effort: Effort | None = None
) -> bool:
    """Whether a new key may be written here."""
    trail = Trail(matcher, position, vocabulary, effort or Effort())
    with trail.rolled_back():
        return _Completion(trail, _OUTSIDE[0]).find_key()


def has_new_item(
    matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary, effort: Effort | None = None
) -> bool:
    """Whether a new item may be written here, in the outermost open array whose items must be unique."""
    trail = Trail(matcher, position, vocabulary, effort or Effort())
    with trail.rolled_back():
        return _Completion(trail, _OUTSIDE[0]).find_item()


class _Completion:
    """Follows a trail to the end of the text, of a key, or of an item.

    Parameters
    ----------
    outside : bytes outside of strings and numbers, preferred ones first.
    """

    def __init__(self, trail: Trail, outside: bytes) -> None:
        self._trail, self._outside = trail, outside
        self._exhausted: set[tuple[int, int, bytes]] = set()
        """Starts of items that all are in the array already; see `JsonPosition.outer_item`."""

    def reach_end(self) -> bool:
        """Go to the end of the text; false if there is none, or it is too far."""
        trail = self._trail
        while not trail.is_complete:
            if len(trail.ids) > MAX_END:
                return False
            if not (self.find_item() if trail.position.may_repeat else self._advance()):
                return False
        return True

    def _advance(self) -> bool:
        """Take the next step of the rule; false if there is none."""
        trail = self._trail
        forced = trail.forced()
        if forced:
            return trail.step(forced)
        if trail.position.is_at_key:
            return self.find_key()
        return self._close()

    def _close(self) -> bool:
        """Take a step towards the end of what is open; false if none is allowed."""
        trail = self._trail
        in_string, length = trail.position.in_string, trail.position.length
        byte = self._first_allowed(b'"' if in_string else self._outside[:3])
        if byte is None and not in_string and not trail.position.in_number:
            byte = self._first_allowed(self._outside[3:])
        elif byte is None:
            # A different order at every place: otherwise a pattern that keeps allowing the same byte would never end.
            order = _rotated(_INSIDE[1:] if in_string else _NUMBER, 7 * length)
            if in_string and length >= RUN and self._run(_rotated(_PLAIN, 7 * length)[:RUN]):
                return True
            byte = self._closable(order, b'"' if in_string else self._outside[:3])
        return byte is not None and trail.step_byte(byte)

    def _run(self, run: bytes) -> bool:
        """Take several steps in a long string, up to where it may be closed; false if they are not allowed."""
        trail, n = self._trail, len(run)
        if trail.n_allowed(*run) < n:
            return False
        if trail.allows(*run, QUOTE):
            low, n = 0, n
            while n - low > 1:  # it may not be closed after `low` of them
                middle = (low + n) // 2
                low, n = (low, middle) if trail.allows(*run[:middle], QUOTE) else (middle, n)
        return trail.step_bytes(run[:n])

    def _closable(self, order: bytes, closers: bytes) -> int | None:
        """The first allowed byte of an order after which a string or number may be closed; else any allowed byte."""
        trail = self._trail
        allowed = trail.allowed_among(order)
        for byte in allowed:
            if trail.may_end_after(byte) or any(trail.allows(byte, closer) for closer in closers):
                return byte
        return allowed[0] if allowed else None

    def _first_allowed(self, order: bytes) -> int | None:
        """The first allowed byte of an order."""
        trail = self._trail
        for byte in order:
            if trail.allows(byte) and trail.position.copy().feed(bytes((byte,))):
                return byte
        return None

    # --- new keys and items -------------------------------------------------------------------------------------

    def find_key(self) -> bool:
        """Go to the end of a new key, or close the object; false, without moving, if neither is possible."""

        def is_found() -> bool:
            position = trail.position
            return not position.is_at_key or (not position.key_may_repeat and self._close_key())

        trail = self._trail
        return self._search(self._key_bytes, is_found, set())

    def _key_bytes(self) -> list[int]:
        """Bytes of a key in the order in which they are tried."""
        position = self._trail.position
        return _new_first(_INSIDE, position.next_of_keys) if position.in_string else [*b'}" ']

    def _close_key(self) -> bool:
        """Go from inside a key to its end by the rule; false, without moving, if that does not lead to a new key."""
        trail, start = self._trail, len(self._trail)
        while trail.position.is_at_key:
            forced = trail.forced()
            went = trail.step(forced) if forced else self._close()
            if not went or len(trail) - start > MAX_END:
                trail.rollback_to(start)
                return False
        return True

    def find_item(self) -> bool:
        """Go past a new item of the outermost open array of unique items; false, without moving, if there is none."""

        def is_found() -> bool:
            if self._is_past(n_before):
                return True
            return not trail.position.may_repeat and self._close_item(n_before)

        trail, n_before = self._trail, self._trail.position.n_outer_items
        return self._search(self._item_bytes, is_found, self._exhausted)

    def _search(
        self, order: Callable[[], Sequence[int]], is_found: Callable[[], bool], exhausted: set[tuple[int, int, bytes]]
    ) -> bool:
        """Depth-first search, byte by byte, until something is found.

        Parameters
        ----------
        order : bytes to try at the current place of the trail, in this order.
        is_found : whether a step led there; may take further steps itself.
        exhausted : places after which there is nothing; more of them are added.
        """
        trail, start, n_tried = self._trail, len(self._trail), 0
        branches = [self._steps(order)]
        while branches:
            ids = next(branches[-1], None)
            if ids is None:
                exhausted.add(trail.position.outer_item)
                branches.pop()
                if branches:
                    trail.rollback_to(start + len(branches) - 1)
                continue
            n_tried += 1
            if n_tried > MAX_TRIED or len(trail.ids) > MAX_END:
                break
            if not trail.step(ids):
                continue
            if is_found():
                return True
            is_known = trail.position.outer_item in exhausted
            branches.append(iter(()) if is_known else self._steps(order))
        trail.rollback_to(start)
        return False

    def _steps(self, order: Callable[[], Sequence[int]]) -> Iterator[Sequence[int]]:
        """Tokens that may be the next step: the forced ones, or else one byte of an order."""
        trail, bytes_ = self._trail, bytes(order())
        first = [byte for byte in bytes_[:FEW] if trail.allows(byte)]
        yield from map(trail.ids_of, first)
        forced = trail.forced() if not first else []
        if forced:
            yield forced
        else:
            yield from map(trail.ids_of, trail.allowed_among(bytes_[FEW:]))

    def _is_past(self, n_before: int) -> bool:
        return self._trail.position.n_unique == 0 or self._trail.position.n_outer_items > n_before

    def _close_item(self, n_before: int) -> bool:
        """Go from inside an item past its end by the rule; false, without moving, if that item is not new."""
        trail, start = self._trail, len(self._trail)
        while not self._is_past(n_before):
            if len(trail.ids) > MAX_END or not self._advance():
                trail.rollback_to(start)
                return False
        return True

    def _item_bytes(self) -> list[int]:
        """Bytes of an item in the order in which they are tried."""
        position = self._trail.position
        taken = position.next_of_items
        # A different order at every place: otherwise a pattern that keeps allowing the same byte would never end; and
        # for every item, so that the first one tried is mostly new. A point comes before an exponent: after 0 only
        # these lead on.
        if position.in_string:
            return _new_first(b'"' + _rotated(_INSIDE[1:], 7 * position.length + 5 * position.n_outer_items), taken)
        return _new_first(b"}],:" + _rotated(b"123456789", position.n_outer_items) + b'"ntfa.elrsu0-+E{[', taken)


def _new_first(order: bytes, taken: Iterable[int]) -> list[int]:
    """Bytes of an order, those last that continue what is there already."""
    late = frozenset(taken)
    return [byte for byte in order if byte not in late] + [byte for byte in order if byte in late]


def _rotated(order: bytes, by: int) -> bytes:
    start = by % len(order)
    return order[start:] + order[:start]
