"""The only place that checks a caller's `options`, before anything is computed.

Input: options as given, of any type. Output: the same options, or a `MessageError` that names the one that has the
wrong form, is out of range, or excludes another. Checks that take work come later, in the code that does the work:
whether a schema can be enforced (`structured_output`), whether a conversation fits (`prompt`), whether a document has
such pages (`inputs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from edge_runtime.errors import MessageError
from edge_runtime.generation.logprobs import MAX_ALTERNATIVES
from edge_runtime.generation.sampling import LARGEST_BIAS, MAX_SEED
from edge_runtime.inputs.messages import checked_max_slices
from edge_runtime.inputs.presets import preset_named
from edge_runtime.options import DRAFT_SOURCES, GenerationOptions, PromptOptions
from edge_runtime.prompt.context_budget import checked_fit
from edge_runtime.prompt.continuation import BegunTurn
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END, checked_tools, chosen_functions

MAX_IDS = 4096
"""Token ids in one list."""
MAX_CHOICES = 1000
MAX_CHARACTERS = 100_000
"""Of a pattern, a grammar, or all choices together."""
SEARCH_OPTIONS = frozenset({"repetition_penalty", "logit_bias", "seed"})  # a search ignores its seed
RANGES = {
    "temperature": (0.0, 100.0),
    "top_k": (0, 1 << 30),
    "top_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "seed": (0, MAX_SEED - 1),
}
"""Minimum and maximum of the sampling options."""
P = TypeVar("P", bound=PromptOptions)


@dataclass(frozen=True)
class ModelLimits:
    """Limits of a loaded model that options are checked against."""

    n_logits: int
    """Number of logits; `logit_bias` is added to them."""
    n_tokens: int
    """Tokens in the vocabulary."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    max_beams: int
    """Sequences computed in parallel."""
    max_answers: int
    """Requests that may wait and run."""


def checked_options(options: GenerationOptions, limits: ModelLimits) -> GenerationOptions:
    """Check everything that does not depend on the conversation.

    Returns
    -------
    options : the same, with `stop` as a tuple, and without tools if none may be called.

    Raises
    ------
    MessageError
        Naming the option that has the wrong form or is out of range, or two that exclude each other.
    """
    options = replace(options, stop=_checked_lengths(options))
    _check_counts(options, limits)
    check_sampling(options, limits.n_logits)
    options = replace(options, tools=checked_tools(options.tools, options.tool_choice))
    has_form = _check_form(options)
    _check_token_rules(options, limits, is_bound=has_form or options.n_beams > 1)
    if options.prompt_logprobs:
        _check_prompt_logprobs(options)
    _check_drafts(options)
    if options.gives_way is not None and not callable(options.gives_way):
        raise MessageError(f"gives_way is {options.gives_way!r}; expected a function that says whether to wait.")
    return checked_prompt_options(options, limits)


def _check_drafts(options: GenerationOptions) -> None:
    names = options.draft_sources
    unknown = [name for name in names if name not in DRAFT_SOURCES] if isinstance(names, Sequence) else [names]
    if unknown:
        raise MessageError(
            f"drafts is {options.drafts!r}; expected auto, off, or some of {', '.join(DRAFT_SOURCES)}."
        )
    text = options.expected_text
    if text is not None and not isinstance(text, str):
        raise MessageError(f"expected_text is {text!r:.100}; expected a text.")
    if options.n_beams > 1 and (text is not None or options.drafts not in ("auto", "off")):
        raise MessageError(
            "Drafts were asked for together with a beam search, which has none; leave one of them out."
        )


def checked_prompt_options(options: P, limits: ModelLimits) -> P:
    """Check the options that affect the prompt.

    Raises
    ------
    MessageError
        Naming the option that has the wrong form.
    """
    checked_max_slices(options.max_slices)
    checked_tools(options.tools, "auto")
    checked_fit(options.fit)
    if options.preset is not None:
        preset_named(options.preset)
    if options.prompt_ids is not None:
        _check_prompt_ids(options.prompt_ids, options.raw, limits.n_tokens)
    return options


def check_conversation(options: GenerationOptions, begun: BegunTurn | None, *, has_pictures: bool) -> None:
    """Check what depends on the conversation.

    Parameters
    ----------
    begun : the turn that the answer continues.

    Raises
    ------
    MessageError
        When that turn ends inside a tool call, which could not be parsed, or when log probabilities are requested
            for a prompt with pictures.
    """
    if options.prompt_logprobs and has_pictures:
        raise MessageError(
            "prompt_logprobs was given for a prompt with pictures, whose places have no tokens; leave one of the two "
            "out."
        )
    text = "" if begun is None else begun.content
    if options.tools and TOOL_CALL in text and TOOL_CALL_END not in text.rpartition(TOOL_CALL)[2]:
        raise MessageError(
            f"The last message, which the answer goes on with, ends inside a {TOOL_CALL}; calls are written whole: "
            "leave its beginning out, and name the function in tool_choice if it must be called."
        )


def check_streaming(options: GenerationOptions) -> None:
    """Reject streaming of an answer that is known only at its end.

    Raises
    ------
    MessageError
    """
    if options.n_beams != 1:
        raise MessageError(
            "stream was given together with a beam search, whose answer is known at its end only; leave one of them "
            "out."
        )


def check_sampling(options: GenerationOptions, n_logits: int | None = None) -> None:
    """Check how tokens are chosen.

    Parameters
    ----------
    n_logits : number of logits, to check the ids of `logit_bias`; None: not checked.

    Raises
    ------
    MessageError
        Naming the option that is out of range, or that a search cannot use.
    """
    if options.logit_bias is not None:
        _check_bias(options.logit_bias, n_logits)
    if options.searches:
        given = {name for name in (*RANGES, "logit_bias") if getattr(options, name) is not None}
        useless = sorted(({"greedy"} if options.greedy else set()) | given - SEARCH_OPTIONS)
        if useless:
            raise MessageError(
                f"{useless[0]} was given together with a beam search (beams, or sampling=False), which draws "
                f"nothing; leave one of them out. It takes {', '.join(sorted(SEARCH_OPTIONS - {'seed'}))}."
            )
    chosen = options.sampling_options()
    for name, (low, high) in RANGES.items():
        value = getattr(chosen, name)
        if name == "seed" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise MessageError(f"{name} is {value!r}; expected a number from {low} to {high}.")


def _check_bias(bias: Any, n_logits: int | None) -> None:
    """Check the pairs of a mapping; ids may be strings of digits, as in JSON."""
    if not isinstance(bias, Mapping):
        raise MessageError(f"logit_bias is {bias!r}; expected a mapping of token ids to numbers.")
    for key, value in bias.items():
        token_id = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 20 else key
        if type(token_id) is not int or not 0 <= token_id < (n_logits or token_id + 1):
            raise MessageError(
                f"logit_bias has the token id {key!r:.60}; expected a number from 0 to {(n_logits or 1) - 1}."
            )
        if type(value) not in (int, float) or not abs(value) <= LARGEST_BIAS:
            raise MessageError(
                f"logit_bias of token {token_id} is {value!r:.60}; expected a number from {-LARGEST_BIAS} to "
                f"{LARGEST_BIAS}."
            )


def _checked_lengths(options: GenerationOptions) -> tuple[str, ...]:
    """Check what ends an answer; returns the stop strings."""
    max_tokens: Any = options.max_tokens
    budget: Any = options.thinking_budget
    stop: Any = options.stop
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise MessageError(f"max_tokens is {max_tokens!r}; expected a positive whole number.")
    if budget is not None and (type(budget) is not int or budget < 0):
        raise MessageError(f"thinking_budget is {budget!r}; expected a whole number of tokens, or None.")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise MessageError(f"stop is {stop!r}; expected a string or a list of strings.")
    return tuple(stop)


def _check_counts(options: GenerationOptions, limits: ModelLimits) -> None:
    """Check the numbers of answers, beams and alternatives, and whether they can be combined."""
    n, n_beams = options.n, options.n_beams
    for name, value, low, high in (
        ("n", n, 1, limits.max_answers),
        ("beams", n_beams, 1, limits.max_beams),
        ("top_logprobs", options.top_logprobs, 0, MAX_ALTERNATIVES),
    ):
        if type(value) is not int or not low <= value <= high:
            raise MessageError(f"{name} is {value!r}; expected a whole number from {low} to {high}.")
    if options.top_logprobs and not options.logprobs:
        raise MessageError(f"top_logprobs is {options.top_logprobs}, but logprobs is off; set logprobs=True.")
    if n_beams > 1 and n > 1:
        raise MessageError(f"n is {n}, but a beam search finds one answer; leave one of them out.")
    if n_beams > 1 and options.thinking_budget is not None:
        raise MessageError(
            "thinking_budget was given, but a beam search ends reasoning where it finds best; leave one of them out."
        )


def _check_form(options: GenerationOptions) -> bool:
    """Check that at most one form is requested; returns whether there is one."""
    must_call = chosen_functions(options.tools, options.tool_choice) is not None
    if options.schema is not None and options.json:
        raise MessageError("Both a schema and json=True were given; expected one of them: a schema says it all.")
    is_json = options.schema is not None or options.json or must_call
    texts = options.text_forms
    wanted = [*texts]
    if len(wanted) > 1 or (wanted and (is_json or options.tools)):
        others = f"{wanted[1]} was given, too" if len(wanted) > 1 else "so was a schema, JSON, or tools"
        raise MessageError(f"{wanted[0]} was given and {others}; expected one of them: an answer has one form.")
    for name, value in texts.items():
        _check_text_form(name, value)
    if (is_json or wanted) and options.n_beams > 1:
        raise MessageError(
            "A beam search (beams, or sampling=False) cannot be held to a schema or to a tool call; leave out one of "
            "the two."
        )
    return is_json or bool(wanted)


def _check_text_form(name: str, value: Any) -> None:
    texts = value if name == "choices" else [value]
    if (
        not isinstance(texts, list | tuple)
        or not 0 < len(texts) <= MAX_CHOICES
        or not all(isinstance(text, str) and text for text in texts)
    ):
        expected = f"a list of 1 to {MAX_CHOICES} texts" if name == "choices" else "a text"
        raise MessageError(f"{name} is {str(value)[:60]!r}; expected {expected}, not empty.")
    if name != "choices" and any("\ud800" <= character <= "\udfff" for text in texts for character in text):
        raise MessageError(f"{name} has half of a surrogate pair, which is no character; expected whole ones.")
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise MessageError(f"{name} has more than {MAX_CHARACTERS} characters, which is the limit.")


def _check_token_rules(options: GenerationOptions, limits: ModelLimits, *, is_bound: bool) -> None:
    """Check which tokens may be chosen, and which end the answer.

    Parameters
    ----------
    is_bound : whether a form or a search already decides which tokens may come and where the answer ends.
    """
    stop_ids = _checked_ids("stop_token_ids", options.stop_token_ids, limits.n_tokens)
    min_tokens, ignore_eos = options.min_tokens, options.ignore_eos
    if type(min_tokens) is not int or min_tokens < 0:
        raise MessageError(f"min_tokens is {min_tokens!r}; expected a whole number from 0.")
    if type(ignore_eos) is not bool:
        raise MessageError(f"ignore_eos is {ignore_eos!r}; expected True or False.")
    if options.allowed_token_ids is not None:
        allowed = _checked_ids("allowed_token_ids", options.allowed_token_ids, limits.n_tokens)
        if not {*allowed} - limits.stop_ids - {*stop_ids}:
            raise MessageError(
                "allowed_token_ids leaves no token but those that end an answer; expected others, too."
            )
    given = [name for name, is_given in options.rules_given(limits.stop_ids).items() if is_given]
    if is_bound and given:
        raise MessageError(
            f"{given[0]} was given together with a form of the answer or a beam search, which decide themselves what "
            "may come and where it ends; leave one of them out."
        )
    if min_tokens and options.stop:
        raise MessageError(
            "min_tokens was given together with stop strings, which end the answer wherever they are met; leave one "
            "of them out."
        )


def _checked_ids(name: str, ids: Any, n_tokens: int) -> Sequence[int]:
    if not isinstance(ids, list | tuple) or len(ids) > MAX_IDS:
        raise MessageError(f"{name} is no list of at most {MAX_IDS} token ids.")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < n_tokens:
            raise MessageError(f"{name} has the token id {token_id!r}; expected a number from 0 to {n_tokens - 1}.")
    return ids


def _check_prompt_logprobs(options: GenerationOptions) -> None:
    """Reject log probabilities of a prompt if there are none."""
    if not options.logprobs:
        raise MessageError("prompt_logprobs is on, but logprobs is off; set logprobs=True.")
    if options.n_beams > 1:
        raise MessageError("prompt_logprobs was given together with a beam search; leave one of them out.")


def _check_prompt_ids(ids: Any, raw: bool, n_tokens: int) -> None:
    if not raw:
        raise MessageError("prompt_ids was given without raw=True, but the chat template makes its own tokens.")
    if not isinstance(ids, list | tuple) or not ids:
        raise MessageError("The prompt's tokens are no list, or an empty one; expected token ids.")
    for number, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < n_tokens:
            raise MessageError(
                f"Token {number} of the prompt is {token_id!r}; expected a number from 0 to {n_tokens - 1}."
            )
