"""The shortest way to the end of an answer: which tokens complete its JSON text from wherever it stands.

The grammar only tells what may follow. A simple rule goes through it: what is forced; else what closes; else the
plainest value. It finds the shortest end or one that is little longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edge_runtime.errors import MessageError
from edge_runtime.json_position import JsonPosition

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from edge_runtime.grammar import GrammarVocabulary

MOST_KEYS_TRIED = 300
MOST_ITEMS_TRIED = 500  # that an array has already, on the way to one that it does not have
MOST_BYTES_TRIED = 5000  # on that way
LONGEST_END = 4096  # tokens of the shortest way to an end; beyond it there is taken to be none
# Where there is a choice, a text ends soonest with a closing bracket, then with plain values, then with brackets.
_OUTSIDE = (b'}],:"0123456789-.ntfaelrsu+E[{ ', b'}],:"0123456789-.ntfaelrsu+E{[ ')
_INSIDE = b'"' + bytes(b for b in range(32, 127) if b not in b'"\\') + b"\\" + bytes(range(128, 256))
_NUMBER = b"0123456789.-+eE"


def shortest_end(matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> list[int] | None:
    """Tokens that lead from a place in an answer to its end, as few as a simple rule finds.

    The rule: what is forced; else close; else the plainest value.

    Returns
    -------
    ids : None where more than `LONGEST_END` tokens did not lead to an end.
    """
    for outside in _OUTSIDE:
        ids = _end_by(outside, matcher.deep_copy(), position.copy(), vocabulary)
        if ids is not None:
            return ids
    return None


def is_end(ids: list[int], matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> bool:
    """Whether these tokens lead from a place in an answer to its end."""
    further = matcher.deep_copy()
    if further.try_consume_tokens(ids) < len(ids) or not further.is_accepting():
        return False
    return position.copy().feed(b"".join(vocabulary.token_bytes[i] for i in ids))


def _end_by(
    outside: bytes, matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary
) -> list[int] | None:
    ids: list[int] = []
    while not matcher.is_accepting():
        found = distinct_item(matcher, position, vocabulary) if position.may_repeat else []
        if found is None:
            return None
        found = found or matcher.compute_ff_tokens()
        if not found and position.is_at_key:
            found = next_key(matcher, position, vocabulary) or []
        if not found:
            token = _closing_byte(outside, matcher, position, vocabulary)
            found = [] if token is None else [token]
        if matcher.is_error():
            raise MessageError(f"The schema is too complex: {matcher.get_error()[:200]}; simplify it.")
        if not found or len(ids) > LONGEST_END or not matcher.consume_tokens(found):
            return None
        if not position.feed(b"".join(vocabulary.token_bytes[i] for i in found)):
            return None
        ids += found
    return ids


def _closing_byte(
    outside: bytes, matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary
) -> int | None:
    """The byte, as a token, that closes what is open, or else leads where that can be closed."""
    closers = b'"' if position.in_string else outside[:3]
    token = _first_allowed(closers, matcher, position, vocabulary)
    if token is not None:
        return token
    if not position.in_string and not position.in_number:
        return _first_allowed(outside, matcher, position, vocabulary)
    # Another order at every place, or a pattern that allows a byte again and again would never end.
    order = _INSIDE[1:] if position.in_string else _NUMBER
    for byte in _turned(order, 7 * position.length):
        candidate = vocabulary.byte_tokens[byte]
        if matcher.validate_tokens([candidate]):
            token = candidate if token is None else token
            branch = matcher.deep_copy()
            branch.consume_token(candidate)
            if branch.is_accepting() or any(branch.validate_tokens([vocabulary.byte_tokens[b]]) for b in closers):
                return candidate
    return token


def _first_allowed(
    order: bytes, matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary
) -> int | None:
    """The first byte of an order that may follow, as a token."""
    for byte in order:
        token = vocabulary.byte_tokens[byte]
        if matcher.validate_tokens([token]) and position.copy().feed(bytes((byte,))):
            return token
    return None


def next_key(matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> list[int] | None:
    """Tokens, a byte each, of the rest of a key that its object does not have yet, up to the quote that ends it.

    Returns
    -------
    ids : empty where `MOST_KEYS_TRIED` beginnings did not lead to one, None where there is none.
    """
    beginnings: deque[tuple[LLMatcher, JsonPosition, list[int]]] = deque([(matcher, position, [])])
    n_tried = 0
    while beginnings:
        matcher, position, ids = beginnings.popleft()
        for byte in _INSIDE if position.in_string else b'" }':
            token = vocabulary.byte_tokens[byte]
            if not matcher.validate_tokens([token]):
                continue
            further = position.copy()
            if not further.feed(bytes((byte,))):
                continue
            if not further.is_at_key:
                return [*ids, token]
            n_tried += 1
            if n_tried > MOST_KEYS_TRIED:
                return []
            branch = matcher.deep_copy()
            branch.consume_token(token)
            beginnings.append((branch, further, [*ids, token]))
    return None


def distinct_item(matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> list[int] | None:
    """Tokens, a byte each, of the rest of an item that its array does not have yet, up to what follows it.

    It is the item of the outermost open array whose items must be unique. Where values are many, the first way that
    is tried leads to one; where they are few, all are tried.

    Returns
    -------
    ids : None where there is none, or none was found in time.
    """
    n_before, ids = position.n_outer_items, list[int]()
    branches = [(matcher, position, _bytes_in_order(matcher, position, vocabulary))]
    n_tried = n_failed = 0
    while branches:
        matcher, position, left = branches[-1]
        byte = next(left, None)
        if byte is None:
            branches.pop()
            del ids[-1:]
            continue
        n_tried += 1
        if n_failed > MOST_ITEMS_TRIED or n_tried > MOST_BYTES_TRIED:
            return None
        further, token = position.copy(), vocabulary.byte_tokens[byte]
        if not further.feed(bytes((byte,))):
            n_failed += 1
            continue
        if further.n_unique == 0 or further.n_outer_items > n_before:
            return ids
        branch = matcher.deep_copy()
        if len(ids) < LONGEST_END and branch.consume_token(token):
            ids.append(token)
            branches.append((branch, further, _bytes_in_order(branch, further, vocabulary)))
    return None


def _bytes_in_order(matcher: LLMatcher, position: JsonPosition, vocabulary: GrammarVocabulary) -> Iterator[int]:
    """Bytes that may follow, those first that end what is open soonest."""
    # Another order at every place, or a pattern that allows a byte again and again would never end; and for every
    # item, so that the first one that is tried is mostly new.
    if position.in_string:
        order = b'"' + _turned(_INSIDE[1:], 7 * position.length + 5 * position.n_outer_items)
    else:
        order = b"}],:" + _turned(b"123456789", position.n_outer_items) + b'"ntfaelrsu0.-+E{['
    return (byte for byte in order if matcher.validate_tokens([vocabulary.byte_tokens[byte]]))


def _turned(order: bytes, by: int) -> bytes:
    start = by % len(order)
    return order[start:] + order[:start]
