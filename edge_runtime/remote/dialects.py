"""Which server answers, and what its requests may hold.

Sources: vLLM, `entrypoints/openai/chat_completion/protocol.py`, docs `features/structured_outputs` (guided_* were
removed in 0.12.0) and `features/reasoning_outputs`; SGLang, `srt/entrypoints/openai/protocol.py` and docs
`advanced_features/thinking_budget`; llama.cpp, `tools/server/server-common.cpp`, `server-schema.cpp` and
`tools/mtmd/mtmd-helper.cpp`; openai-python's types; this package's `server/openai`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from edge_runtime.errors import MessageError

Name = Literal["edge-runtime", "vllm", "sglang", "llama-server", "openai"]
NAMES: tuple[Name, ...] = ("edge-runtime", "vllm", "sglang", "llama-server", "openai")

DONE_HERE = frozenset(
    {
        *("pages", "dpi", "password", "page_limit", "file_limit_bytes"),
        *("max_slices", "pixel_limit", "video_limits", "preset", "n"),
    }
)
"""Options that this process takes care of, whichever server answers."""
HINTS = frozenset({"follow_up"})
"""Options that change when something is computed, not what."""
_COMMON = frozenset(
    {
        *("max_tokens", "stop", "thinking", "continue_final_message"),
        *("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "greedy", "logit_bias"),
        *("schema", "json", "tools", "tool_choice", "logprobs", "top_logprobs"),
    }
)
_SAMPLING = frozenset({"top_k", "min_p", "repetition_penalty"})
_TOKENS = frozenset({"stop_token_ids", "min_tokens", "ignore_eos"})
_FORMS = frozenset({"choices", "regex", "grammar"})
STRUCTURED_OUTPUTS = (0, 11)
"""First vLLM with `structured_outputs`; earlier ones have `guided_*`."""
THINKING_BUDGET = (0, 19)
"""First vLLM whose chats take `thinking_token_budget`; 0.18 did not know it."""


@dataclass(frozen=True)
class Dialect:
    """What one kind of server understands."""

    name: Name
    title: str
    """For sentences."""
    takes: frozenset[str]
    """Options of `Model.chat` that it has a field for."""
    version: tuple[int, ...] = field(default=())
    """Of a vLLM; empty: unknown, taken for a new one."""

    @property
    def is_ours(self) -> bool:
        """Whether the server reads all files itself, by the same rules as this process."""
        return self.name == "edge-runtime"

    @property
    def has_template(self) -> bool:
        """Whether requests can set variables of the chat template."""
        return self.name in ("vllm", "sglang", "llama-server")

    def is_before(self, version: tuple[int, ...]) -> bool:
        """Whether the server is known to be older."""
        return bool(self.version) and self.version < version


_DIALECTS = {
    "edge-runtime": Dialect(
        "edge-runtime",
        "edge-runtime",
        _COMMON
        | _SAMPLING
        | _TOKENS
        | _FORMS
        | {"typical_p", "allowed_token_ids", "thinking_budget", "reuse", "drafts", "expected_text"},
    ),
    "vllm": Dialect(
        "vllm", "vLLM", _COMMON | _SAMPLING | _TOKENS | _FORMS | {"allowed_token_ids", "thinking_budget"}
    ),
    "sglang": Dialect("sglang", "SGLang", _COMMON | _SAMPLING | _TOKENS | _FORMS),
    "llama-server": Dialect(
        "llama-server",
        "llama-server",
        _COMMON | _SAMPLING | {"typical_p", "ignore_eos", "choices", "grammar", "thinking_budget", "reuse"},
    ),
    "openai": Dialect("openai", "a server that speaks OpenAI's API and nothing more", _COMMON | {"expected_text"}),
}


def dialect_named(name: str, version: str = "") -> Dialect:
    """A dialect by its name.

    Parameters
    ----------
    version : as the server writes it.

    Raises
    ------
    MessageError
        When there is none.
    """
    found = _DIALECTS.get(name)
    if found is None:
        raise MessageError(f"The dialect is {name!r}; expected one of {', '.join(NAMES)}.")
    numbers = re.match(r"v?([0-9]+)\.([0-9]+)", version)
    if name != "vllm" or numbers is None or numbers[1] == "0" == numbers[2]:  # a build that has no version is new
        return found
    return Dialect(found.name, found.title, found.takes, (int(numbers[1]), int(numbers[2])))


def owner_of(entry: object) -> str:
    """The name of the dialect that an entry of `/v1/models` tells of; empty if it does not.

    vLLM, SGLang and llama-server write their name into `owned_by`. Ours writes `library`, and so does Ollama.
    """
    owner = entry.get("owned_by") if isinstance(entry, dict) else None
    return {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server"}.get(str(owner), "")
