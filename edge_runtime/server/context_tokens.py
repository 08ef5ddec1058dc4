"""`context` of /api/generate: a conversation ↔ token ids, which a client keeps in place of the turns.

Ollama sends the ids of the prompt and the answer, and puts them before the next prompt unchanged. Here they are the
ids of the turns (`<|im_start|>ROLE\\nTEXT<|im_end|>`) and are read back as turns, so special tokens in user text stay
text, a conversation that outgrows the context loses its oldest turns, and the KV cache serves the others. As in
Ollama, a picture leaves its mark (`[img-0]`), not its content. Reasoning is left out, as templates do for earlier
turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_runtime.inputs.messages import ROLES
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.server.errors import RequestError

MAX_IDS = 1 << 18
"""More than any context holds; a longer list did not come from this server."""
START, END = "<|im_start|>", "<|im_end|>"


def ids_of(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, most: int) -> list[int]:
    """Ids of a conversation: its system prompts, and the last turns that fit.

    Parameters
    ----------
    messages : with `content` that is text, and Ollama's `images`.
    most : largest number of ids.
    """
    n_images, marked = 0, []
    for message in messages:
        n = len(message.get("images") or ())
        marked.append(_with_marks(str(message.get("content") or ""), range(n_images, n_images + n)))
        n_images += n
    kept: list[list[int]] = []
    system = [i for i, message in enumerate(messages) if message.get("role") == "system"]
    found = {i: _turn("system", marked[i], tokenizer) for i in system}  # they were in the prompt, so they fit
    left = most - sum(map(len, found.values()))
    for i in reversed(range(len(messages))):
        if i in found:
            kept.append(found[i])
        elif left >= 0:
            if tokenizer.min_n_tokens(marked[i], "") > left:  # a turn that was dropped may be of any length
                left = -1
                continue
            ids = _turn(str(messages[i].get("role")), marked[i], tokenizer)
            left -= len(ids)
            if left >= 0:
                kept.append(ids)
    return [token for ids in reversed(kept) for token in ids]


def _with_marks(text: str, numbers: range) -> str:
    """A text with a mark for each picture, by Ollama's rule: at `[img]`, otherwise before the text."""
    before = ""
    for number in numbers:
        mark = f"[img-{number}]"
        if "[img]" in text:
            text = text.replace("[img]", mark, 1)
        elif mark not in text:
            before += mark
    return before + text


def _turn(role: str, text: str, tokenizer: Tokenizer) -> list[int]:
    special = tokenizer.special_ids
    start, end = ([special[word]] if word in special else tokenizer.encode(word) for word in (START, END))
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates are not text
    return [*start, *tokenizer.encode(f"{role}\n{text}"), *end, *tokenizer.encode("\n")]


def messages_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The turns that ids stand for; ids outside of turns count as user text, so that nothing is lost.

    Raises
    ------
    RequestError
        When there are too many ids, or one is not in the vocabulary.
    """
    if len(ids) > MAX_IDS:
        raise RequestError(
            f"context holds {len(ids)} token ids, expected at most {MAX_IDS}; send the context of an earlier reply.",
            "context",
        )
    n_vocab = len(tokenizer.tokens)
    wrong = next((token for token in ids if not 0 <= token < n_vocab), None)
    if wrong is not None:
        raise RequestError(
            f"context holds the token id {wrong}, but the vocabulary of this model has the ids 0 to {n_vocab - 1}; "
            "send the context of an earlier reply of the same model.",
            "context",
        )
    start, end = tokenizer.special_ids.get(START), tokenizer.special_ids.get(END)
    found: list[dict[str, Any]] = []
    turn: list[int] = []
    inside = False
    for token in [*ids, start]:
        if token not in (start, end):
            turn.append(int(token or 0))
            continue
        text = b"".join(map(tokenizer.token_bytes, turn)).decode("utf-8", "replace")
        found += _read_turn(text) if inside else _stray(text)
        turn, inside = [], token == start
    return found


def _read_turn(text: str) -> list[dict[str, Any]]:
    role, newline, content = text.partition("\n")
    if not newline or role not in ROLES:
        return _stray(text)
    return [{"role": role, "content": content}] if content.strip() else []


def _stray(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}] if text.strip() else []
