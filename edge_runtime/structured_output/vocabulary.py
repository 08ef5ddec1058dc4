"""A decoder's vocabulary as llguidance needs it: the bytes of every token, and which are special."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.errors import MessageError
from edge_runtime.prompt.tokenizer import CONTROL, UNUSED, USER_DEFINED, Tokenizer
from edge_runtime.structured_output.compiling import load_llguidance
from edge_runtime.structured_output.json_position import NUMBER_BYTES, QUOTE

if TYPE_CHECKING:
    pass

SPECIAL_MARK = b"\xff"  # llguidance's mark for a token that is not text


class GrammarVocabulary:
    """A decoder's vocabulary as grammars need it; built once per model, which takes half a second at full size."""

    def __init__(self, tokenizer: Tokenizer, n_rows: int) -> None:
        llguidance = load_llguidance()
        self._tokenizer = tokenizer
        special = [kind in (CONTROL, USER_DEFINED, UNUSED) for kind in tokenizer.types]
        text = [b"" if special[i] else tokenizer.token_bytes(i) for i in range(len(special))]
        self.token_bytes = text
        """Text of every token; empty for special ones."""
        self.byte_tokens = {token[0]: i for i, token in enumerate(text) if len(token) == 1}
        """Token of a single byte."""
        self.ids_of_bytes = np.array([self.byte_tokens.get(byte, 0) for byte in range(256)])
        """ndarray [shape=(256,), int64]: the same."""
        missing = [byte for byte in range(256) if byte not in self.byte_tokens]
        if missing:
            raise MessageError(
                f"The vocabulary has no tokens for {len(missing)} of the 256 bytes, so a schema cannot be enforced "
                "with this model; use the decoder file of MiniCPM-V 4.5."
            )
        first = np.array([token[0] if token else 0 for token in text] + [0] * (n_rows - len(text)), np.uint8)
        self.continues_number = np.isin(first, list(NUMBER_BYTES))
        """ndarray [shape=(rows,), bool]: tokens that lengthen a number."""
        self.starts_with_quote = first == QUOTE
        """ndarray [shape=(rows,), bool]"""
        self.stop_ids = tokenizer.stop_ids
        self.eos_token_id, self.bos_token_id = min(tokenizer.stop_ids), None
        self.tokens = [SPECIAL_MARK + tokenizer.token_bytes(i) if special[i] else text[i] for i in range(len(text))]
        self.special_token_ids = [i for i, is_special in enumerate(special) if is_special]
        self.is_tokenizer_wrapper = True  # what llguidance asks for
        self.llguidance = llguidance.LLTokenizer(
            self,
            n_vocab=n_rows,
            eos_token=sorted(tokenizer.stop_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that the grammar forces; called by llguidance."""
        ids = self._tokenizer.encode(text)
        data = text.encode("utf-8", "surrogatepass")
        if b"".join(self.token_bytes[i] for i in ids) != data:  # a name that is not in NFC
            ids = [self.byte_tokens[byte] for byte in data]
        return ids
