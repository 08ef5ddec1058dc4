"""The headers of a model's files → what clients are told about it, under Ollama's names."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType

from edge_runtime.answers import TOY_NOTICE
from edge_runtime.errors import ModelFileError
from edge_runtime.inputs.messages import THINK
from edge_runtime.loading.capabilities import can_call_tools, can_think, capabilities
from edge_runtime.prompt.templates import OFFICIAL_CHAT_TEMPLATE
from edge_runtime.prompt.tokenizer import special_tokens
from edge_runtime.server.errors import RequestError
from edge_runtime.server.registry.catalog import Listed
from edge_runtime.server.settings import Settings
from edge_runtime.structured_output.tools import TOOL_CALL
from edge_runtime.weights.config import is_toy, read_vocabulary
from edge_runtime.weights.gguf_file import GGUFFile

MAX_ARRAY = 64
"""Longer ones are left out: a vocabulary has megabytes."""


@dataclass(frozen=True)
class Facts:
    """What is in the two files of a model."""

    family: str
    parameters: int
    """Parameters of the decoder and the vision part together."""
    quantisation: str
    context_length: int
    """What the model was trained for."""
    vocabulary: int
    """Number of tokens."""
    template: str
    """Jinja."""
    decoder: Mapping[str, Any]
    """Metadata."""
    projector: Mapping[str, Any]
    can_call_tools: bool
    """Whether the vocabulary has the tokens of calls; `can_think` likewise."""
    can_think: bool
    is_toy: bool
    claims: tuple[str, ...]
    """Its capabilities, by Ollama's names; a toy claims less than its vocabulary allows."""

    def capabilities(self, settings: Settings) -> list[str]:
        """What the model claims: clients attach tools to every chat with a model that claims them."""
        return [name for name in self.claims if name != "tools" or settings.tools != "off"]


def facts_of(listed: Listed) -> Facts:
    """Facts of a model; cached while its files stay the same.

    Raises
    ------
    ModelFileError
        When a file is damaged or gone.
    """
    try:
        stamps = [path.stat() for path in (listed.paths.decoder, listed.paths.mmproj)]
    except OSError as error:
        raise ModelFileError(f"The files of {listed.name} cannot be read: {error.strerror}; pull it again.") from None
    versions = tuple((stamp.st_mtime_ns, stamp.st_size) for stamp in stamps)
    return _facts(listed.paths.decoder, listed.paths.mmproj, versions)


@lru_cache(maxsize=64)
def _facts(decoder: Path, mmproj: Path, versions: tuple[tuple[int, int], ...]) -> Facts:
    text, vision = GGUFFile(decoder), GGUFFile(mmproj)
    family = text.get("general.architecture", str)
    kind = text.get("general.file_type", int, -1)
    special = special_tokens(read_vocabulary(text))
    names = {int(each): each.name.removeprefix("MOSTLY_").removeprefix("ALL_") for each in LlamaFileType}
    return Facts(
        family=family,
        parameters=sum(tensor.n_elements for file in (text, vision) for tensor in file.tensors.values()),
        quantisation=names.get(kind, "unknown"),
        context_length=text.get(f"{family}.context_length", int, 0),
        vocabulary=len(text.metadata.get("tokenizer.ggml.tokens", ())),
        template=text.get("tokenizer.chat_template", str, OFFICIAL_CHAT_TEMPLATE),
        decoder=_plain(text.metadata),
        projector=_plain(vision.metadata),
        can_call_tools=can_call_tools(special),
        can_think=can_think(special),
        is_toy=is_toy(text),
        claims=tuple(capabilities(text)),
    )


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as JSON values; long arrays become None."""
    return {key: _plain_value(value) for key, value in metadata.items() if key != "tokenizer.chat_template"}


def _plain_value(value: Any) -> Any:
    if isinstance(value, np.ndarray | list):
        return None if len(value) > MAX_ARRAY else [_plain_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None  # JSON has no such numbers
    return value


def details(listed: Listed, facts: Facts) -> dict[str, Any]:
    """`details` of Ollama's replies."""
    return {
        "parent_model": listed.parent,
        "format": "gguf",
        "family": facts.family,
        "families": [facts.family, "clip"],
        "parameter_size": _size(facts.parameters),
        "quantization_level": facts.quantisation,
        "context_length": facts.context_length,
        **({"notice": TOY_NOTICE} if facts.is_toy else {}),
    }


def refuse_what_it_cannot(listed: Listed, settings: Settings, options: Mapping[str, Any]) -> None:
    """Refuse tools and reasoning for a model without them, in Ollama's words.

    Parameters
    ----------
    options : keyword arguments of `Model.submit`.

    Raises
    ------
    RequestError
        Saying why.
    ModelFileError
        When a file is damaged or gone.
    """
    if options.get("tools") and options.get("tool_choice") != "none":
        reason = None
        if settings.tools == "off":
            reason = "the owner of this server has switched them off (--tools off)"
        elif not facts_of(listed).can_call_tools:
            reason = f"its vocabulary lacks {TOOL_CALL}"
        if reason is not None:
            name = listed.tag if "/" in listed.tag else f"registry.ollama.ai/library/{listed.tag}"
            raise RequestError(f"{name} does not support tools: {reason}; send none.", "tools")
    if options.get("thinking") and not facts_of(listed).can_think:
        raise RequestError(
            f'"{listed.name}" does not support thinking: its vocabulary lacks {THINK}; leave it out.', "think"
        )


def _size(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.2f}M"


def fingerprint(listed: Listed) -> str:
    """64 hexadecimal digits that change when the model behind a name does; not a checksum of its files' contents."""
    digest = hashlib.sha256()
    for path in listed.files:
        stamp = path.stat()
        digest.update(repr((path.name, stamp.st_size, stamp.st_mtime_ns)).encode())
    digest.update(repr((listed.system, sorted(listed.parameters.items()), listed.messages)).encode())
    return digest.hexdigest()
