"""What llama-server reports about a model: in lists of models, and at `/props`. Source: its `server-context.cpp`.

Enters: a model's name and its files' headers. Leaves: dictionaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_runtime.errors import ModelFileError
from edge_runtime.generation.sampling import MAX_NEW_TOKENS, SamplingOptions
from edge_runtime.model import Model
from edge_runtime.server.registry.catalog import Listed
from edge_runtime.server.registry.facts import details, facts_of
from edge_runtime.version import __version__

MEDIA_MARKER = "<__media__>"
"""Stands in the text of a prompt for each of its `multimodal_data`."""
BPE = 2
"""llama.cpp's number for this kind of vocabulary."""


def entry_fields(listed: Listed, n_ctx: int | None) -> dict[str, Any]:
    """What an entry of `/v1/models` has besides OpenAI's fields; less if the files cannot be read.

    The first three are Anthropic's, the others llama-server's.

    Parameters
    ----------
    n_ctx : tokens of the context; None if the model is not loaded, since loading decides it.
    """
    found: dict[str, Any] = {
        "type": "model",
        "display_name": listed.name,
        "created_at": listed.modified.isoformat(),
        "aliases": [listed.tag] if listed.tag != listed.name else [],
        "tags": [],
        "architecture": {"input_modalities": ["text", "image", "video"], "output_modalities": ["text"]},
    }
    try:
        facts = facts_of(listed)
    except ModelFileError:
        return found
    meta = {
        "vocab_type": BPE,
        "n_vocab": facts.vocabulary,
        "n_ctx_train": facts.context_length,
        "n_embd": facts.decoder.get(f"{facts.family}.embedding_length"),
        "n_params": facts.parameters,
        "size": listed.size,
        "ftype": facts.quantisation,
    }
    return {**found, "meta": meta if n_ctx is None else {**meta, "n_ctx": n_ctx}}


def list_fields(models: Sequence[Listed]) -> dict[str, Any]:
    """What the list of models has besides OpenAI's `data`: llama-server's `models`, and Anthropic's end of pages."""
    names = [listed.name for listed in models]
    return {
        "models": [_model_entry(listed) for listed in models],
        "has_more": False,
        "first_id": names[0] if names else None,
        "last_id": names[-1] if names else None,
    }


def _model_entry(listed: Listed) -> dict[str, Any]:
    entry = {
        "name": listed.name,
        "model": listed.name,
        "modified_at": listed.modified.isoformat(),
        "size": listed.size,
        "digest": "",
        "type": "model",
        "description": "",
        "tags": [],
        "capabilities": ["completion", "multimodal"],
        "parameters": "",
    }
    try:
        return {**entry, "details": details(listed, facts_of(listed))}
    except ModelFileError:
        return entry


def props(listed: Listed, model: Model) -> dict[str, Any]:
    """The reply of `/props` for a loaded model."""
    facts = facts_of(listed)
    tokens = model.tokenizer.tokens
    end = facts.decoder.get("tokenizer.ggml.eos_token_id")
    return {
        "default_generation_settings": {"n_ctx": model.n_ctx, "params": _defaults()},
        "total_slots": model.activity.slots,
        "model_alias": listed.name,
        "model_ftype": facts.quantisation,
        "model_path": listed.paths.decoder.name,  # only the file's name: its folder is private
        "modalities": {"vision": True, "video": True, "audio": False},
        "media_marker": MEDIA_MARKER,
        "endpoint_slots": False,
        "endpoint_props": False,
        "endpoint_metrics": True,
        "chat_template": model.template,
        "chat_template_caps": _template_caps(model),
        "bos_token": "",
        "eos_token": tokens[end] if isinstance(end, int) and 0 <= end < len(tokens) else "",
        "build_info": f"edge-runtime {__version__}",
        "is_sleeping": False,
    }


def _template_caps(model: Model) -> dict[str, bool]:
    """What conversations may hold."""
    calls = "tools" in model.capabilities
    return {
        "supports_string_content": True,
        "supports_typed_content": True,
        "supports_tools": calls,
        "supports_tool_calls": calls,
        "supports_parallel_tool_calls": calls,
        "supports_system_role": True,
        "supports_preserve_reasoning": False,
        "supports_reasoning_effort": False,
        "supports_object_arguments": True,
    }


def _defaults() -> dict[str, Any]:
    """Default sampling settings."""
    return sampling_settings(SamplingOptions.official(thinking=False)) | {
        "n_predict": MAX_NEW_TOKENS,
        "max_tokens": MAX_NEW_TOKENS,
        "stream": False,
    }


RANDOM_SEED = 2**32 - 1
"""llama.cpp's value for a random seed."""


_OFF = {
    "dynatemp_range": 0.0,
    "dynatemp_exponent": 1.0,
    "top_n_sigma": -1.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "dry_multiplier": 0.0,
    "mirostat": 0,
    "adaptive_target": -1.0,
    "adaptive_decay": 0.9,
    "n_keep": 0,
    "n_discard": 0,
    "min_keep": 0,
    "lora": [],
}
"""llama-server's other settings, with the values that turn them off: requests that turn them on are refused."""


def sampling_settings(options: SamplingOptions) -> dict[str, Any]:
    """Sampling settings under llama-server's names."""
    return _OFF | {
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p", "typ_p"],
        "seed": RANDOM_SEED if options.seed is None else options.seed,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "typical_p": options.typical_p,
        "repeat_penalty": options.repetition_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
    }
