"""Text ↔ token ids, from the vocabulary in a decoder file.

Byte-level BPE of Qwen2 through the `tokenizers` library, which the official code uses, too. llama.cpp's tokenizer is
not used: it does not normalise to NFC, and it matches `<think>` or `<tool_call>` in user text even when asked not to.
`encode` never finds special tokens; callers that want one use its id (see `prompt.build`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cached_property

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Bpe

from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.prompt.long_text import LONG_TEXT, LONG_TEXTS, matches, nothing, pieces
from edge_runtime.weights.config import Vocabulary, read_vocabulary
from edge_runtime.weights.gguf_file import GGUFFile

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # batches of one gain nothing, and forks cause warnings

NORMALIZER_KEY = "edge_runtime.tokenizer.normalizer"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of GGUF
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def special_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Text → id of the tokens that are not text: control tokens and user-defined ones."""
    kinds = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
    return {text: i for i, (text, kind) in kinds if kind in (CONTROL, USER_DEFINED)}


class Tokenizer:
    """The tokenizer of one decoder file.

    Raises
    ------
    ModelFileError
        When the vocabulary is inconsistent.
    UnsupportedModelError
        When it is another kind of tokenizer.
    """

    def __init__(self, file: GGUFFile) -> None:
        _check_kind(file)
        vocabulary = read_vocabulary(file)
        self.tokens, self.types = vocabulary.tokens, vocabulary.types
        self._merges = file.strings("tokenizer.ggml.merges")
        self._normalizer = file.get(NORMALIZER_KEY, str, "nfc")
        if self._normalizer not in ("nfc", "none"):
            raise UnsupportedModelError(
                f"{file.path.name}: {NORMALIZER_KEY} is {self._normalizer[:40]!r}, expected 'nfc' or 'none'; convert "
                "the model again."
            )
        self._name = file.path.name
        self.ids = {text: i for i, text in enumerate(self.tokens)}
        self.special_ids = special_tokens(vocabulary)
        self.stop_ids = frozenset({vocabulary.eos, *(self.ids[text] for text in STOP_TOKENS if text in self.ids)})

    @cached_property
    def _bpe(self) -> Bpe:
        """Built on first use: 150,000 merges take a moment."""
        pairs = []
        for merge in self._merges:
            left, blank, right = merge.partition(" ")
            if (
                not blank
                or " " in right
                or left not in self.ids
                or right not in self.ids
                or left + right not in self.ids
            ):
                raise ModelFileError(
                    f"{self._name} holds the merge {merge[:40]!r}, which does not join two tokens of its "
                    "vocabulary into a third; convert the model again."
                )
            pairs.append((left, right))
        bpe = Bpe(models.BPE(vocab=self.ids, merges=pairs))
        if self._normalizer == "nfc":
            bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        return bpe

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Matches any special token, the longest first as the official tokenizer does."""
        longest_first = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _longest_special(self) -> int:
        """Characters of the longest special token."""
        return max(map(len, self.special_ids), default=1)

    def encode(self, text: str, check: Callable[[int], None] = lambda n: None) -> list[int]:
        """Ids of plain text: `<|im_end|>` and the like are ordinary characters here, lone surrogates are U+FFFD.

        Parameters
        ----------
        check : called between the pieces of a long text, with the number of ids so far; what it raises ends the work.
        """
        ids: list[int] = []
        self._add(ids, text, check)
        return ids

    def _add(self, ids: list[int], text: str, check: Callable[[int], None]) -> None:
        """Append the ids of plain text."""
        if not text:
            return
        if len(text) <= LONG_TEXT:
            ids.extend(self._bpe.encode(_without_surrogates(text), add_special_tokens=False).ids)
            return
        for piece in pieces(text, lambda: check(len(ids))):
            with LONG_TEXTS.turn():  # a batch is processed without the GIL, a single text is not
                found = self._bpe.encode_batch_fast([_without_surrogates(piece)], add_special_tokens=False)
                ids.extend(found[0].ids)
                del found  # takes a hundred times the memory of the ids

    def guard(
        self, text: str, mark: str, allowed: frozenset[str] = frozenset(), check: Callable[[], None] = nothing
    ) -> str:
        """Turn special tokens in `text` into ordinary text, by a `mark` after their first character.

        Parameters
        ----------
        mark : a character that occurs nowhere in the conversation; `encode_special` removes it.
        allowed : special tokens left as they are.
        check : called often if the text is long; what it raises ends the work.
        """
        parts, done = [], 0
        for match in self._special(text, check):
            if match[0] not in allowed:
                parts += [text[done : match.start() + 1], mark]
                done = match.start() + 1
        return "".join([*parts, text[done:]])

    def encode_special(self, text: str, mark: str, check: Callable[[int], None] = lambda n: None) -> list[int]:
        """Ids of a rendered prompt, in which special tokens count unless they were guarded.

        The text is split only at special tokens; each run between two of them is tokenised as a whole, so that merges
        across the border between template and user text are the official ones.

        Parameters
        ----------
        check : as for `encode`.
        """
        ids: list[int] = []
        for run, special in self._runs(text, mark, lambda: check(len(ids))):
            self._add(ids, run, check)
            if special is not None:
                ids.append(self.special_ids[special])
        return ids

    def min_n_tokens(self, text: str, mark: str, check: Callable[[], None] = nothing) -> int:
        """Lower bound of the tokens in the plain text of a rendered prompt, without tokenising it.

        No token stands for more bytes than the longest one. Bytes are counted after normalisation, which may shorten
        text. Special tokens are not counted.

        Parameters
        ----------
        check : as for `guard`.
        """
        if self._longest is None:
            return 0
        n_tokens = 0
        for run, _ in self._runs(text, mark, check):
            for piece in pieces(run, check) if run else ():
                plain = piece
                if self._normalizer == "nfc" and not plain.isascii():
                    plain = unicodedata.normalize("NFC", plain)
                n_tokens += -(-len(plain.encode("utf-8", "surrogatepass")) // self._longest)
        return n_tokens

    def _special(self, text: str, check: Callable[[], None]) -> Iterator[re.Match[str]]:
        """All special tokens in a text."""
        return matches(self._special_pattern, self._longest_special, text, check)

    def _runs(self, text: str, mark: str, check: Callable[[], None]) -> Iterator[tuple[str, str | None]]:
        """Each run of plain text, without marks, and the special token after it."""
        done = 0
        for match in self._special(text, check):
            yield text[done : match.start()].replace(mark, ""), match[0]
            done = match.end()
        yield text[done:].replace(mark, ""), None

    @cached_property
    def _longest(self) -> int | None:
        """Bytes of the longest token of plain text; None if some byte has no token and so none in the ids."""
        if not all(character in self.ids for character in _bytes_to_unicode().values()):
            return None
        return max(map(len, self.ids))  # a character stands for a byte; special tokens can only make it longer

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for rows without a token."""
        kind, text = self.types[token_id], self.tokens[token_id]
        if kind == UNUSED:
            return b""
        if kind in (CONTROL, USER_DEFINED):
            return text.encode()
        return bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else text.encode()


def _without_surrogates(text: str) -> str:
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_kind(file: GGUFFile) -> None:
    model, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "qwen2")
    if model != "gpt2" or pre != "qwen2":
        raise UnsupportedModelError(
            f"{file.path.name} has a tokenizer of kind {model}/{pre}, expected gpt2/qwen2 as in MiniCPM-V 4.5; use "
            "that model's decoder file."
        )


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: the byte itself if printable, else a character from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + len(table) - len(printable))
    return table


_BYTE_OF = {c: b for b, c in _bytes_to_unicode().items()}
