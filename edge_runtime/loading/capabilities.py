"""What a model can do, judged by its decoder file; words in its template prove nothing."""

from __future__ import annotations

from collections.abc import Collection

from edge_runtime.inputs.messages import THINK, THINK_END
from edge_runtime.prompt.tokenizer import special_tokens
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END
from edge_runtime.weights.config import is_toy, read_vocabulary
from edge_runtime.weights.gguf_file import GGUFFile


def can_call_tools(special: Collection[str]) -> bool:
    """Whether tool calls can be told apart from text, and enforced: their tags are tokens.

    Parameters
    ----------
    special : the special tokens of the vocabulary, as `Tokenizer.special_ids` has them.
    """
    return TOOL_CALL in special and TOOL_CALL_END in special


def can_think(special: Collection[str]) -> bool:
    """Whether reasoning can be told apart from the answer: its tags are tokens."""
    return THINK in special and THINK_END in special


def capabilities(file: GGUFFile) -> list[str]:
    """What a model of this decoder file can do, by Ollama's names: completion, vision, tools, thinking.

    A toy claims neither of the last two: the tokens are there and calls can be forced, but nobody could use
    what it writes.

    Raises
    ------
    ModelFileError
        When the vocabulary is damaged.
    """
    found = ["completion", "vision"]
    if not is_toy(file):
        special = special_tokens(read_vocabulary(file))
        found += ["tools"] * can_call_tools(special) + ["thinking"] * can_think(special)
    return found
