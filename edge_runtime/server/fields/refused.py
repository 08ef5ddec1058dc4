"""What happens to fields of requests to OpenAI's API, its own and other servers', that are not read elsewhere.

A field that asks for something about the answer is enforced (`constraints`) or refused by name; one that cannot
change the answer is ignored. `REFUSED` and `PASSED_OVER` are the complete decision, which a test walks through; a
field in neither list is ignored with a warning.

Source: openai-python's types; README of llama-server; vLLM's protocol; SGLang and Text Generation Inference.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from edge_runtime.server.errors import RequestError
from edge_runtime.server.registry.parameters import OWNERS
from edge_runtime.store.names import visible

logger = logging.getLogger("edge_runtime.server")
MAX_NAMED = 20
_NOTHING: tuple[Any, ...] = (None, False, "", 0, 0.0)

_warned: set[str] = set()


@dataclass(frozen=True)
class Refused:
    """A field that this server cannot honour."""

    why: str
    """The end of the sentence that starts with the field and its value."""
    harmless: tuple[Any, ...] = ()
    """Values that ask for nothing, besides null, empty lists and objects, false, 0 and the empty text."""


def _sampler(neutral: Any = 0) -> Refused:
    return Refused("but this server's sampler does not have it; leave it out", (neutral,))


_OTHER_API = "which is a field of another API"
REFUSED: dict[str, Refused] = {
    # OpenAI's own
    "functions": Refused("which is OpenAI's older form; describe functions under 'tools'"),
    "function_call": Refused("which is OpenAI's older form; use 'tools' and 'tool_choice'", ("none", "auto")),
    "audio": Refused("but the model writes text only; leave it out"),
    "modalities": Refused("but the model writes text only; expected ['text']", (["text"],)),
    "moderation": Refused("but this server has no moderation model; leave it out"),
    "verbosity": Refused("but the model has no such switch; say how long the answer should be", ("medium",)),
    # llama-server
    "grammar_lazy": Refused("but a grammar applies from the first token here; leave it out"),
    "grammar_triggers": Refused("but a grammar applies from the first token here; leave it out"),
    "chat_template": Refused("but all requests use the model's own template; leave it out"),
    "reasoning_format": Refused("but reasoning is separated from the answer here", ("auto", "deepseek")),
    "n_probs": Refused("expected 'logprobs' and 'top_logprobs'"),
    "post_sampling_probs": Refused("but log probabilities are those before sampling here; leave it out"),
    "return_tokens": Refused("but replies hold no token ids here; see POST /tokenize"),
    "n_indent": Refused("but indentation is not checked here; leave it out"),
    "t_max_predict_ms": Refused("but answers have no time limit here; limit the tokens, or hang up", (-1,)),
    "lora": Refused("but adapters are chosen by the model's name here; leave it out"),
    "samplers": Refused("but this server uses the official order; leave it out"),
    "mirostat": _sampler(),
    "dynatemp_range": _sampler(),
    "xtc_probability": _sampler(),
    "dry_multiplier": _sampler(),
    "top_n_sigma": _sampler(-1),
    "tfs_z": _sampler(1),
    "top_a": _sampler(),
    "smoothing_factor": _sampler(),
    "epsilon_cutoff": _sampler(),
    "eta_cutoff": _sampler(),
    # vLLM
    "echo": Refused("but an answer holds only what follows the conversation; leave it out"),
    "documents": Refused("but the model's template has no place for them; write them into a message"),
    "use_beam_search": Refused("but this API samples; leave it out"),
    "truncate_prompt_tokens": Refused("but prompts are not cut inside a turn here; shorten the conversation"),
    "include_stop_str_in_output": Refused("but a stop string is never part of the answer here; leave it out"),
    "skip_special_tokens": Refused("but special tokens are never part of an answer here; leave it out", (True,)),
    "bad_words": Refused("but words of several tokens cannot be forbidden here; use logit_bias with token ids"),
    "prompt_logprobs": Refused("expected 'echo' and 'logprobs' of /v1/completions"),
    "logprob_token_ids": Refused("but only the most probable tokens are returned; use 'top_logprobs'"),
    "return_token_ids": Refused("but replies hold no token ids here; see POST /tokenize"),
    "return_tokens_as_token_ids": Refused("but tokens are returned as text; see their bytes"),
    "prompt_embeds": Refused("but a prompt is text or token ids here"),
    "repetition_detection": Refused("but this server ends repetitive answers by its own rules; leave it out"),
    "watermarking": Refused("but answers carry no watermark here; leave it out"),
    "mm_processor_kwargs": Refused("expected 'max_slices'"),
    "media_io_kwargs": Refused("expected 'fps', 'max_frames' and the like beside the video"),
    "include_reasoning": Refused("but reasoning is always returned separately here; ignore it", (True,)),
    "guided_whitespace_pattern": Refused("but JSON is written with at most one space here; leave it out"),
    "structural_tag": Refused("but this form is unknown here; expected a schema, a regex or a grammar"),
    # SGLang, Text Generation Inference, others
    "ebnf": Refused("expected 'grammar' in GBNF"),
    "json_object": Refused("expected 'response_format'"),
    "extra_body": Refused("but its fields belong beside the others; the openai package puts them there"),
    # Fields of other APIs, sent to the wrong route
    "num_predict": Refused(f"{_OTHER_API}; expected 'max_tokens'"),
    "max_new_tokens": Refused(f"{_OTHER_API}; expected 'max_tokens'"),
    "num_beams": Refused("but this API samples; leave it out", (1,)),
    "options": Refused(f"{_OTHER_API}; send its contents as top-level fields, such as 'temperature'"),
    "output_format": Refused(f"{_OTHER_API}; expected 'response_format'"),
    "output_config": Refused(f"{_OTHER_API}; expected 'response_format' and 'reasoning_effort'"),
    "generationConfig": Refused(f"{_OTHER_API}; send its contents as top-level fields"),
    "stop_sequences": Refused(f"{_OTHER_API}; expected 'stop'"),
    "system": Refused(f"{_OTHER_API}; expected a message with the role system"),
    "images": Refused(f"{_OTHER_API}; expected parts of the type image_url in a message"),
}  # fmt: skip
"""For all three routes; a field that a route reads itself never gets here."""

OF_CHAT: dict[str, Refused] = {
    "prompt": Refused(f"{_OTHER_API}; expected 'messages'"),
    "input": Refused(f"{_OTHER_API}; expected 'messages'"),
    "instructions": Refused(f"{_OTHER_API}; expected a message with the role system"),
    "max_output_tokens": Refused(f"{_OTHER_API}; expected 'max_completion_tokens'"),
    "text": Refused(f"{_OTHER_API}; expected 'response_format'"),
    "suffix": Refused("but the model cannot fill in text before a suffix; leave it out"),
    "best_of": Refused("but every answer is returned here; use 'n'", (1,)),
    "background": Refused("but answers cannot be fetched later here; use 'stream'"),
}
OF_COMPLETIONS: dict[str, Refused] = {
    "messages": Refused("which belongs to /v1/chat/completions; expected 'prompt'"),
    "tools": Refused("but tools belong to a conversation; use /v1/chat/completions"),
    "tool_choice": Refused("but tools belong to a conversation; use /v1/chat/completions", ("none", "auto")),
    "top_logprobs": Refused("expected the number under 'logprobs'"),
    "reasoning_effort": Refused("but this route continues plain text; use /v1/chat/completions", ("none", "minimal")),
    "chat_template_kwargs": Refused("but this route uses no template; use /v1/chat/completions"),
    "max_output_tokens": Refused(f"{_OTHER_API}; expected 'max_tokens'"),
    "continue_final_message": Refused("but this route always continues text; leave it out"),
}
OF_RESPONSES: dict[str, Refused] = {
    "messages": Refused("which belongs to /v1/chat/completions; expected 'input'"),
    "response_format": Refused("which belongs to /v1/chat/completions; expected 'text.format'"),
    "max_tokens": Refused("which belongs to /v1/chat/completions; expected 'max_output_tokens'"),
    "max_completion_tokens": Refused("which belongs to /v1/chat/completions; expected 'max_output_tokens'"),
    "reasoning_effort": Refused("which belongs to /v1/chat/completions; expected 'reasoning.effort'"),
    "logprobs": Refused("which belongs to /v1/chat/completions; expected 'top_logprobs' or 'include'"),
    "image": Refused(
        "but pictures are not compressed here; use 'max_slices'",
        ({"context_compression": "auto"}, {"context_compression": "disabled"}),
    ),
    "n": Refused("but a response has one answer; send the request again for another", (1,)),
    "continue_final_message": Refused("which belongs to /v1/chat/completions; leave it out"),
    "add_generation_prompt": Refused("which belongs to /v1/chat/completions; leave it out", (True,)),
}

PASSED_OVER = frozenset(
    {
        # OpenAI's: bookkeeping, billing, caches, speed hints, and tools that this server does not have
        "user", "safety_identifier", "metadata", "store", "service_tier", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention", "web_search_options", "max_tool_calls",
        "context_management", "stream_options", "background_options", "access_programs",
        # llama-server's: caches, slots, and parameters of samplers that are off
        "id_slot", "n_keep", "n_discard", "n_cache_reuse",
        "min_keep", "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "dry_base",
        "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "parse_tool_calls",
        "reasoning_control", "t_max_prompt_ms",
        # vLLM's: queues and caches, and what a vocabulary without such tokens does in any case
        "priority", "request_id", "session_id", "cache_salt", "kv_transfer_params", "ec_transfer_params",
        "vllm_xargs",
        "add_special_tokens", "spaces_between_special_tokens", "length_penalty", "stream_interval", "truncation_side",
        "guided_decoding_backend", "early_stopping",
        # Ollama's: how long a model stays loaded
        "keep_alive",
    }
)  # fmt: skip


def check_fields(given: Mapping[str, Any] | None, *tables: Mapping[str, Refused]) -> list[str]:
    """Refuse fields that ask for what this server does not do.

    Parameters
    ----------
    given : the body's fields that are not read elsewhere.
    tables : the route's own fields, which come before those of all routes.

    Returns
    -------
    warnings : sentences about unknown fields.

    Raises
    ------
    RequestError
        Names the first one.
    """
    unknown = []
    for name, value in (given or {}).items():
        rule = next((table[name] for table in (*tables, REFUSED) if name in table), None)
        if rule is None:
            unknown += [] if name in PASSED_OVER or value is None else [name]
        elif not _asks_for_nothing(value, rule):
            raise RequestError(f"{name} is {_shown(value)}, {rule.why}.", name)
    if not unknown:
        return []
    names = ", ".join(visible(name)[:60] for name in unknown[:MAX_NAMED])
    return [f"Unknown fields were ignored: {names}"]


def _asks_for_nothing(value: Any, rule: Refused) -> bool:
    if value is None or value == [] or value == {}:
        return True
    if rule is REFUSED["options"] and isinstance(value, Mapping):
        return value.keys() <= OWNERS  # the server's owner decides how a model is loaded
    if any(value == harmless and isinstance(value, bool) == isinstance(harmless, bool) for harmless in rule.harmless):
        return True
    # A switch whose `true` is harmless asks for something when it is false.
    return True not in rule.harmless and any(value == none for none in _NOTHING)


def _shown(value: Any) -> str:
    text = visible(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


def with_warnings(response: Response, warnings: list[str]) -> Response:
    """Add a Warning header that names ignored fields; each warning is also logged once."""
    for warning in warnings:
        if warning not in _warned and len(_warned) < 1000:
            _warned.add(warning)
            logger.warning("%s", warning)
        plain = warning.encode("ascii", "replace").decode().replace("\\", "/").replace('"', "'")
        response.headers.append("Warning", f'299 edge-runtime "{plain}"')
    return response
