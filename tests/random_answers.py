"""Answers of a model that draws every token evenly from what a form allows: no decoder, yet every path of a form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.store.find import find_model
from edge_runtime.structured_output.answer_form import choose_form
from edge_runtime.structured_output.constraint import AnswerForm
from edge_runtime.structured_output.vocabulary import GrammarVocabulary
from edge_runtime.weights.gguf_file import GGUFFile


class RandomAnswers:
    """Writes answers with the vocabulary of a model."""

    def __init__(self, name: str | Path) -> None:
        self.tokenizer = Tokenizer(GGUFFile(find_model(name, None).decoder))
        self.vocabulary = GrammarVocabulary(self.tokenizer, len(self.tokenizer.types))

    def form(
        self, schema: Any, *, json: bool = False, tools: Any = (), tool_choice: Any = "auto", thinking: bool = False
    ) -> AnswerForm:
        """The form of an answer."""
        found = choose_form(schema, json, tools, tool_choice, thinking, self.tokenizer, lambda: self.vocabulary)
        assert found is not None
        return found

    def ids(self, form: AnswerForm, seed: int = 0, max_tokens: int = 600) -> list[int]:
        """Tokens of an answer; as many as there may be where it was cut."""
        draw, constraint, ids = np.random.default_rng(seed), form.start(), list[int]()
        while len(ids) < max_tokens and not constraint.ended:
            token = constraint.next_token(max_tokens - len(ids), lambda allowed: int(draw.choice(allowed)))
            if token in self.vocabulary.stop_ids:
                break
            ids.append(token)
        return ids

    def text(self, form: AnswerForm, seed: int = 0, max_tokens: int = 600) -> str:
        """An answer with its special tokens."""
        return b"".join(map(self.tokenizer.token_bytes, self.ids(form, seed, max_tokens))).decode()
