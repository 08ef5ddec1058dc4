"""What a form still leaves no choice about: the tokens that probably come next, as a draft.

They are guesses all the same: the model may cut the same text into other tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_runtime.structured_output.grammar import allowed_ids
from edge_runtime.structured_output.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_LOOKS = 3
"""How often all tokens are looked through for one draft, as the choice of each token does once."""


def forced_tokens(matcher: LLMatcher, vocabulary: GrammarVocabulary, n: int) -> list[int]:
    """At most `n` tokens that follow whatever the model would like to say.

    Where the matcher knows none, as before the quote of a key, but every token that may follow begins with the same
    one, that one is taken.

    Parameters
    ----------
    matcher : of the answer so far; a copy is moved.
    """
    found = list(matcher.compute_ff_tokens())
    if not found or matcher.is_error():
        return []
    matcher = matcher.deep_copy()
    if not matcher.consume_tokens(found):
        return []
    for _ in range(MAX_LOOKS):
        if len(found) >= n or matcher.is_stopped():
            break
        token = _common_token(matcher, vocabulary)
        if token is None or not matcher.consume_token(token):
            break
        more = list(matcher.compute_ff_tokens())
        found += [token, *more]
        if not more or not matcher.consume_tokens(more):
            break
    return found[:n]


def _common_token(matcher: LLMatcher, vocabulary: GrammarVocabulary) -> int | None:
    """The token with which every other begins that may follow; None if they have no such token."""
    ids = allowed_ids(matcher, len(vocabulary.continues_number))
    texts = [(vocabulary.token_bytes[i] if i < len(vocabulary.token_bytes) else b"", int(i)) for i in ids[:4096]]
    if not texts or len(texts) < len(ids) or not all(text for text, _ in texts):
        return None
    shortest, token = min(texts, key=lambda pair: len(pair[0]))
    return token if all(text.startswith(shortest) for text, _ in texts) else None
