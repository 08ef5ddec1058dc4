"""Words of Ollama's requests and Modelfiles → keyword arguments of `Model.submit`. Knows no routes."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_runtime.generation.sampling import MAX_SEED
from edge_runtime.server.errors import RequestError
from edge_runtime.store.names import visible

logger = logging.getLogger("edge_runtime.server")

THINKING_LEVELS: dict[str, int | None] = {"low": 256, "medium": 1024, "high": None, "max": None}
"""Tokens of reasoning after which the answer begins; None: no limit. The model itself knows on and off."""
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
"""How a model is loaded, which the owner of the server decides for all clients (`edge-runtime serve --ctx`)."""
BINDING = {
    **dict.fromkeys(
        ("format", "schema", "json_schema", "response_format", "structured_outputs", "guided_json"),
        "send the schema as format, beside options",
    ),
    **dict.fromkeys(
        ("grammar", "guided_grammar", "guided_regex", "guided_choice"),
        "answers follow JSON schemas (format, beside options) and no other grammar",
    ),
    **dict.fromkeys(("tools", "tool_choice"), "tools stand beside options, in requests to /api/chat"),
    **dict.fromkeys(
        ("system", "template", "prompt", "suffix", "raw"), "it is a field beside options, of /api/generate"
    ),
    **dict.fromkeys(("think", "thinking", "reasoning_effort"), "send think, beside options"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "it is a field beside options"),
    **dict.fromkeys(("n", "best_of"), "one answer is given to a request; send it again for more"),
    **dict.fromkeys(("logit_bias", "bad_words", "ignore_eos"), "tokens cannot be forced or forbidden here"),
    **dict.fromkeys(
        ("images", "context", "keep_alive", "stream", "truncate", "shift"), "it is a field beside options"
    ),
}
"""Words that are no options but say what an answer must be: refused with what to do, never left out."""
UNLIMITED = 1 << 30
LONGEST_KEEP_S = 10 * 365 * 86400.0

_warned: set[str] = set()


def submit_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Translate `options` of a request, or the parameters of a Modelfile.

    Unknown ones are left out with a warning in the log, as Ollama does, unless they bind the answer.

    Raises
    ------
    RequestError
        When a value has the wrong type, or an option that binds the answer is not known.
    """
    found: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        if name in _TRANSLATED:
            found |= _TRANSLATED[name](name, value)
        elif name in BINDING:
            raise RequestError(f"The option {name} is none that can be kept: {BINDING[name]}.", name)
        elif name not in OWNERS:
            _warn(name)
    if found.pop("repeats_count", True) is False:
        found["repetition_penalty"] = 1.0
    return found


def _warn(name: str) -> None:
    if name not in _warned and len(_warned) < 1000:
        _warned.add(name)
        logger.warning("The option %r is not known here and was left out", visible(name)[:60])


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
    # -1: for ever; -2: until the context is full; 0: no limit either, as in the runners of Ollama.
    return {"max_tokens": number if number > 0 else UNLIMITED}


def _seed(name: str, value: Any) -> dict[str, Any]:
    number = _whole(name, value)
    return {} if number < 0 else {"seed": number % MAX_SEED}


def _top_k(name: str, value: Any) -> dict[str, Any]:
    return {"top_k": max(0, _whole(name, value))}  # below 0 means all, too


def _stop(name: str, value: Any) -> dict[str, Any]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise RequestError("The option stop is no list of strings; expected one, or a string.", name)
    return {"stop": [text for text in texts if text]}


def _most(name: str, value: Any) -> int:
    number = _whole(name, value)
    if number < 1:
        raise RequestError(f"The option {name} is {number}; expected a positive whole number.", name)
    return number


def _window(name: str, value: Any) -> dict[str, Any]:
    """Penalties here look at the whole answer; a window of 0 turns the one Ollama has on by default off."""
    return {"repeats_count": _whole(name, value) != 0}


_TRANSLATED: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("num_predict", "n_predict", "max_tokens", "max_completion_tokens"), _length),
    "seed": _seed,
    "stop": _stop,
    "top_k": _top_k,
    "repeat_last_n": _window,
    "max_slices": _same("max_slices", _most),
    "max_slice_nums": _same("max_slices", _most),
    "image_max_tokens": _same("image_max_tokens", _most),
    **dict.fromkeys(("repeat_penalty", "repetition_penalty"), _same("repetition_penalty", _number)),
    **{
        name: _same(name, _number)
        for name in ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
    },
}


def thinking_options(think: bool | str | None) -> dict[str, Any]:
    """Translate `think`: a switch, or a level that limits the reasoning; None is off, as the model's default is.

    Raises
    ------
    RequestError
        For other words.
    """
    if think is None or think is False or think == "":
        return {}
    if think is True:
        return {"thinking": True}
    if think not in THINKING_LEVELS:
        raise RequestError(f"think is {think!r}; expected true, false, or one of low, medium, high.", "think")
    return {"thinking": True, "thinking_budget": THINKING_LEVELS[think]}


def format_options(wanted: Any) -> dict[str, Any]:
    """Translate `format`: `json`, or a schema.

    Raises
    ------
    RequestError
        For anything else.
    """
    if wanted in (None, ""):
        return {}
    if wanted == "json":
        return {"json": True}
    if isinstance(wanted, str):  # some clients send the schema as text
        with contextlib.suppress(ValueError, RecursionError):
            wanted = json.loads(wanted)
    if isinstance(wanted, Mapping):
        return {"schema": wanted}
    raise RequestError("format is neither 'json' nor a JSON schema; expected one of them, or nothing.", "format")


_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def keep_alive_seconds(value: float | str | None) -> float | None:
    """Translate `keep_alive`: seconds, or a duration as Go writes it (`5m`, `1h30m`); below 0 is for ever.

    Raises
    ------
    RequestError
        When it is neither.
    """
    if value is None or value == "":
        return None
    seconds = _seconds(value)
    if seconds is None or seconds != seconds:
        raise RequestError(
            f"keep_alive is {str(value)[:40]!r}; expected seconds, or a duration such as '5m'; -1 keeps the model.",
            "keep_alive",
        )
    return -1.0 if seconds < 0 else min(seconds, LONGEST_KEEP_S)


def _seconds(value: float | str) -> float | None:
    if not isinstance(value, str):
        return None if isinstance(value, bool) else float(value)
    text = value.strip()
    sign, bare = (-1.0, text[1:]) if text.startswith("-") else (1.0, text.removeprefix("+"))
    if re.fullmatch(r"\d+(\.\d*)?", bare):
        return sign * float(bare)
    parts = _DURATION.findall(bare)
    if not parts or "".join(number + unit for number, unit in parts) != bare:
        return None
    return sign * sum(float(number) * _UNITS[unit] for number, unit in parts)


def parameter_lines(parameters: Mapping[str, Any]) -> str:
    """Parameters as Ollama shows them: one a line, in two columns."""
    lines = []
    for name, value in sorted(parameters.items()):
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            shown = json.dumps(item, ensure_ascii=False) if isinstance(item, str) else str(item)
            lines.append(f"{name:<30} {shown}")
    return "\n".join(lines)
