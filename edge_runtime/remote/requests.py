"""Options of `Model.chat` → fields of a request in a server's dialect.

An option that a server has no field for is refused by name: `dialects` lists what each one takes, so an option that
is new here is refused until somebody has looked it up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.option_checks import ModelLimits, checked_options
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.continuation import BegunTurn
from edge_runtime.remote.dialects import DONE_HERE, HINTS, STRUCTURED_OUTPUTS, THINKING_BUDGET, Dialect
from edge_runtime.structured_output.tools import chosen_functions

ANY_TOKEN = 1 << 31
"""Token ids are held against the server's vocabulary by the server."""
LIMITS = ModelLimits(n_logits=ANY_TOKEN, n_tokens=ANY_TOKEN, stop_ids=frozenset(), max_beams=1, max_answers=64)
SEARCHES = ("beams", "sampling")
_USUAL = GenerationOptions()
Fields = dict[str, Any]


def checked(options: GenerationOptions, dialect: Dialect, limits: ModelLimits) -> GenerationOptions:
    """Check options, and that the server can do what they ask for.

    Raises
    ------
    MessageError
        Names the option that has the wrong form, or that the server has no field for.
    """
    given = [field.name for field in fields(options) if getattr(options, field.name) != getattr(_USUAL, field.name)]
    for name in given:
        if name in SEARCHES and options.n_beams == 1 and options.sampling:
            continue
        if name not in dialect.takes | DONE_HERE | HINTS:
            raise MessageError(
                f"{name} was given, but {dialect.title} has no way to do it; leave it out, or load the model on this "
                "machine."
            )
    if options.thinking_budget is not None and dialect.is_before(THINKING_BUDGET):
        raise MessageError(
            f"thinking_budget was given, but vLLM knows it from version {_written(THINKING_BUDGET)} on, and "
            f"this server is "
            f"{_written(dialect.version)}; leave it out, or limit max_tokens."
        )
    options = checked_options(options, limits)
    if dialect.name == "llama-server" and options.logprobs and options.tools:
        raise MessageError(
            "logprobs were given with tools, which llama-server does not stream; leave one of them out."
        )
    return options


def _written(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def request_fields(
    options: GenerationOptions, dialect: Dialect, begun: BegunTurn | None, *, host: str = ""
) -> Fields:
    """Everything of a request but its model and messages.

    Parameters
    ----------
    options : checked ones.
    host : of the server.
    """
    length = "max_completion_tokens" if host == "api.openai.com" else "max_tokens"
    found: Fields = {
        "stream": True,
        "stream_options": {"include_usage": True},
        length: options.max_tokens,
        **_sampling(options, dialect),
        **_rules(options, dialect),
        **_form(options, dialect),
        **_tools(options),
        **_thinking(options, dialect),
    }
    if options.stop:
        found["stop"] = [*options.stop]
    if options.logprobs:
        found |= {"logprobs": True, "top_logprobs": options.top_logprobs}
    if not options.reuse:
        found["cache_prompt"] = False
    if options.drafts != "auto":
        found["drafts"] = options.drafts if isinstance(options.drafts, str) else [*options.drafts]
    if options.expected_text is not None:
        found["prediction"] = {"type": "content", "content": options.expected_text}
    if options.max_slices is not None and dialect.is_ours:
        found["max_slices"] = options.max_slices
    return found | _continuation(options, dialect, begun)


def _sampling(options: GenerationOptions, dialect: Dialect) -> Fields:
    """How tokens are chosen.

    A server of ours has the official values itself. The others have other ones, or the model's file's, so all are
    sent; except to servers of which no more is known than OpenAI's API: their models are their own.
    """
    chosen = options.sampling_options()
    names = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "presence_penalty")
    values = {name: getattr(chosen, name) for name in (*names, "frequency_penalty")}
    if not dialect.has_template:
        values = {name: value for name, value in values.items() if getattr(options, name) is not None}
        if options.greedy:
            values["temperature"] = 0.0
    found: Fields = {name: value for name, value in values.items() if name in dialect.takes}
    if dialect.name in ("vllm", "sglang") and found.get("top_k") == 0:
        found["top_k"] = -1  # their word for all tokens
    if dialect.name == "llama-server":
        found["repeat_penalty"] = found.pop("repetition_penalty")
        found["repeat_last_n"] = options.max_tokens  # the whole answer; versions differ on what -1 means
    if options.seed is not None:
        found["seed"] = options.seed
    if options.logit_bias:
        found["logit_bias"] = {str(token_id): bias for token_id, bias in chosen.logit_bias}
    return found


def _rules(options: GenerationOptions, dialect: Dialect) -> Fields:
    found: Fields = {
        "stop_token_ids": [*options.stop_token_ids] or None,
        "min_tokens": options.min_tokens or None,
        "ignore_eos": options.ignore_eos or None,
        "allowed_token_ids": None if options.allowed_token_ids is None else [*options.allowed_token_ids],
    }
    return {name: value for name, value in found.items() if value is not None}


def _form(options: GenerationOptions, dialect: Dialect) -> Fields:
    """What the answer must look like."""
    if options.schema is not None:
        schema = {"name": "answer", "schema": dict(options.schema), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    if options.json:
        return {"response_format": {"type": "json_object"}}
    if not options.text_forms:
        return {}
    ((name, value),) = options.text_forms.items()
    if dialect.name == "sglang":
        if name == "choices":
            return {"regex": f"({'|'.join(map(re.escape, value))})"}
        return {"regex": value} if name == "regex" else {"ebnf": value}
    if dialect.name == "llama-server":
        return {"grammar": value if name == "grammar" else _alternatives(value)}
    one = "choice" if name == "choices" else name
    value = [*value] if name == "choices" else value
    if dialect.is_before(STRUCTURED_OUTPUTS):
        return {f"guided_{one}": value}
    return {"structured_outputs": {one: value}}


def _alternatives(choices: Sequence[str]) -> str:
    """GBNF of one of several texts; JSON's escapes are GBNF's, as far as they are used."""
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)


def _tools(options: GenerationOptions) -> Fields:
    if not options.tools:
        return {}
    found: Fields = {
        "tools": [
            dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
            for tool in options.tools
        ]
    }
    choice = options.tool_choice
    names = chosen_functions(options.tools, choice)
    if isinstance(choice, Mapping) or choice not in ("auto", "required"):
        assert names is not None
        found["tool_choice"] = {"type": "function", "function": {"name": names[0]}}
    else:
        found["tool_choice"] = choice
    return found


def _thinking(options: GenerationOptions, dialect: Dialect) -> Fields:
    budget = options.thinking_budget
    if dialect.name == "openai":
        return {"reasoning_effort": "medium"} if options.thinking else {}
    if dialect.is_ours:
        found: Fields = {"enable_thinking": options.thinking}
        return found if budget is None else found | {"thinking_budget": budget}
    found = {"chat_template_kwargs": {"enable_thinking": options.thinking}}
    if budget is not None:
        found["thinking_token_budget" if dialect.name == "vllm" else "thinking_budget_tokens"] = budget
    return found


def _continuation(options: GenerationOptions, dialect: Dialect, begun: BegunTurn | None) -> Fields:
    """Whether the last message is continued; a server's own default differs from one to the next."""
    if begun is None:
        return (
            {"continue_final_message": False} if dialect.is_ours and options.continue_final_message is False else {}
        )
    if dialect.is_ours:
        return {"continue_final_message": True}
    if dialect.name == "sglang":
        return {"continue_final_message": True}
    return {"continue_final_message": True, "add_generation_prompt": False}
