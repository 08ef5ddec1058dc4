"""Parameters as Ollama names them, stored with a model or sent with a request → options of `Model.submit`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from edge_runtime.generation.sampling import MAX_SEED
from edge_runtime.server.errors import RequestError
from edge_runtime.store.names import visible

logger = logging.getLogger("edge_runtime.server")


OWNERS = frozenset(
    {
        "num_ctx",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "use_mmap",
        "use_mlock",
        "num_thread",
        "num_keep",
        "num_gqa",
        "numa",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "embedding_only",
        "rope_frequency_base",
        "rope_frequency_scale",
        "draft_num_predict",
    }
)
"""How a model is loaded: the owner of the server decides that for all clients (`edge-runtime serve --ctx`)."""


UNLIMITED = 1 << 30


_warned: set[str] = set()


def submit_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Translate `options` of a request, or the parameters of a Modelfile.

    Unknown ones are ignored with a warning in the log, as in Ollama, unless they constrain the answer.

    Raises
    ------
    RequestError
        When a value has the wrong type, or an unknown option constrains the answer.
    """
    found: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in _TRANSLATED:
            found |= _TRANSLATED[name](name, value)
        elif name in BINDING:
            raise RequestError(f"The option {name} cannot be honoured: {BINDING[name]}.", name)
        elif name not in OWNERS:
            _warn(name)
    if found.pop("repeats_count", True) is False:
        found["repetition_penalty"] = 1.0
    return found


def _warn(name: str) -> None:
    if name not in _warned and len(_warned) < 1000:
        _warned.add(name)
        logger.warning("The option %r is unknown and was ignored", visible(name)[:60])


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"The option {name} is {value!r}; expected a number.", name)
    return value


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != number or number in (float("inf"), float("-inf")) or int(number) != number:
        raise RequestError(f"The option {name} is {value!r}; expected a whole number.", name)
    return int(number)


def _same(target: str, read: Callable[[str, Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    return lambda name, value: {target: read(name, value)}


def _length(name: str, value: Any) -> dict[str, Any]:
    number = _whole(name, value)
    # -1: forever; -2: until the context is full; 0: no limit either, as in Ollama's runners.
    return {"max_tokens": number if number > 0 else UNLIMITED}


def _seed(name: str, value: Any) -> dict[str, Any]:
    number = _whole(name, value)
    return {} if number < 0 else {"seed": number % MAX_SEED}


def _top_k(name: str, value: Any) -> dict[str, Any]:
    return {"top_k": max(0, _whole(name, value))}  # below 0 means all, too


def _stop(name: str, value: Any) -> dict[str, Any]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise RequestError("The option stop is not a list of strings; expected one, or a string.", name)
    return {"stop": [text for text in texts if text]}


def _positive(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number < 1:
        raise RequestError(f"The option {name} is {number}; expected a positive whole number.", name)
    return number


def _window(name: str, value: Any) -> dict[str, Any]:
    """Penalties here cover the whole answer; a window of 0 turns off the one that Ollama turns on by default."""
    return {"repeats_count": _whole(name, value) != 0}


_TRANSLATED: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("num_predict", "n_predict", "max_tokens", "max_completion_tokens"), _length),
    "seed": _seed,
    "stop": _stop,
    "top_k": _top_k,
    "repeat_last_n": _window,
    "max_slices": _same("max_slices", _positive),
    "max_slice_nums": _same("max_slices", _positive),
    "image_max_tokens": _same("image_max_tokens", _positive),
    **dict.fromkeys(("repeat_penalty", "repetition_penalty"), _same("repetition_penalty", _number)),
    **{
        name: _same(name, _number)
        for name in ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
    },
}


BINDING = {
    **dict.fromkeys(
        ("format", "schema", "json_schema", "response_format", "structured_outputs", "guided_json"),
        "send the schema as format, beside options",
    ),
    **dict.fromkeys(
        ("grammar", "guided_grammar", "guided_regex", "guided_choice"),
        "answers can follow a JSON schema (format, beside options) but no other grammar",
    ),
    **dict.fromkeys(("tools", "tool_choice"), "tools belong beside options, in requests to /api/chat"),
    **dict.fromkeys(
        ("system", "template", "prompt", "suffix", "raw"), "it is a field beside options, of /api/generate"
    ),
    **dict.fromkeys(("think", "thinking", "reasoning_effort"), "send think, beside options"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "it is a field beside options"),
    **dict.fromkeys(("n", "best_of"), "a request gets one answer; send it again for more"),
    **dict.fromkeys(("logit_bias", "bad_words", "ignore_eos"), "tokens cannot be forced or forbidden here"),
    **dict.fromkeys(
        ("images", "context", "keep_alive", "stream", "truncate", "shift"), "it is a field beside options"
    ),
}
"""Fields that are not options but constrain the answer: refused with what to do, never ignored."""
