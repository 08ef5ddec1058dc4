"""Text ↔ token ids, from the vocabulary in a decoder file.

Byte-level BPE of Qwen2 through the `tokenizers` library, which the official code uses, too. llama.cpp's tokenizer is
not used: it does not normalise to NFC, and it matches `<think>` or `<tool_call>` in user text even when asked not to.
`encode` never finds special tokens; callers that want one use its id (see `prompt.build`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import cached_property

from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Bpe

from edge_runtime.errors import ModelFileError, UnsupportedModelError
from edge_runtime.weights.config import Vocabulary, read_vocabulary
from edge_runtime.weights.gguf_file import GGUFFile

LONG_TEXT = 10_000  # characters
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

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: `<|im_end|>` and the like are ordinary characters here, lone surrogates are U+FFFD."""
        if not text:
            return []
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(text) > LONG_TEXT:  # a batch is processed without the GIL, a single text is not
            return list(self._bpe.encode_batch([text], add_special_tokens=False)[0].ids)
        return list(self._bpe.encode(text, add_special_tokens=False).ids)

    def guard(self, text: str, mark: str, allowed: frozenset[str] = frozenset()) -> str:
        """Turn special tokens in `text` into ordinary text, by a `mark` after their first character.

        Parameters
        ----------
        mark : a character that occurs nowhere in the conversation; `encode_special` removes it.
        allowed : special tokens left as they are.
        """
        return self._special_pattern.sub(lambda m: m[0] if m[0] in allowed else m[0][0] + mark + m[0][1:], text)

    def encode_special(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered prompt, in which special tokens count unless they were guarded.

        The text is split only at special tokens; each run between two of them is tokenised whole, so that merges
        across the border between template and user text are the official ones.
        """
        ids, position = [], 0
        for match in self._special_pattern.finditer(text):
            ids += self.encode(text[position : match.start()].replace(mark, ""))
            ids.append(self.special_ids[match[0]])
            position = match.end()
        return ids + self.encode(text[position:].replace(mark, ""))

    @cached_property
    def _longest(self) -> int | None:
        """Bytes of the longest token of plain text; None if some byte has no token and so none in the ids."""
        if not all(character in self.ids for character in _bytes_to_unicode().values()):
            return None
        return max(map(len, self.ids))  # a character stands for a byte; special tokens can only make it longer

    def min_n_tokens(self, text: str, mark: str) -> int:
        """Lower bound of the tokens in the plain text of a rendered prompt, without tokenising it.

        No token stands for more bytes than the longest one. Bytes are counted after normalisation, which may shorten
        text. Special tokens are not counted.
        """
        if self._longest is None:
            return 0
        n_tokens = 0
        for run in self._special_pattern.split(text):
            plain = run.replace(mark, "")
            if self._normalizer == "nfc" and not plain.isascii():
                plain = unicodedata.normalize("NFC", plain)
            n_tokens += -(-len(plain.encode("utf-8", "surrogatepass")) // self._longest)
        return n_tokens

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; empty for rows without a token."""
        kind, text = self.types[token_id], self.tokens[token_id]
        if kind == UNUSED:
            return b""
        if kind in (CONTROL, USER_DEFINED):
            return text.encode()
        return bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else text.encode()


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
