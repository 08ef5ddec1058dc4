"""What callers ask of an answer → the same, checked before anything is computed; not how tokens are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_runtime.engine.engine import MAX_REQUESTS
from edge_runtime.errors import MessageError
from edge_runtime.generation.logprobs import MOST_ALTERNATIVES
from edge_runtime.generation.sampling import OFFICIAL_BEAMS
from edge_runtime.prompt.continuation import Begun
from edge_runtime.structured_output.tools import TOOL_CALL, TOOL_CALL_END


def count_beams(beams: int | None, sampling: bool) -> int:
    """Beams of a request: those given, else one, or with `sampling=False` the official number."""
    if beams is not None:
        return beams
    return 1 if sampling else OFFICIAL_BEAMS


def check_streaming(options: dict[str, Any]) -> None:
    """Refuse to stream what is known at its end only.

    Raises
    ------
    MessageError
    """
    if count_beams(options.get("beams"), options.get("sampling", True)) != 1:
        raise MessageError(
            "stream was given together with a beam search, whose answer is known at its end only; leave one of them "
            "out."
        )


def check_lengths(max_tokens: Any, thinking_budget: Any, stop: Any) -> tuple[str, ...]:
    """Check what ends an answer; returns the stop strings.

    Raises
    ------
    MessageError
        Naming the option that has the wrong form.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise MessageError(f"max_tokens is {max_tokens!r}; expected a positive whole number.")
    if thinking_budget is not None and (type(thinking_budget) is not int or thinking_budget < 0):
        raise MessageError(f"thinking_budget is {thinking_budget!r}; expected a whole number of tokens, or None.")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise MessageError(f"stop is {stop!r}; expected a string or a list of strings.")
    return tuple(stop)


def check_counts(
    *, n: Any, beams: Any, most_beams: int, logprobs: bool, top_logprobs: Any, thinking_budget: int | None
) -> None:
    """Check how many answers, beams and alternatives are wanted, and whether that goes together.

    Parameters
    ----------
    most_beams : sequences there are.

    Raises
    ------
    MessageError
        Naming the option that is out of range, or two that exclude each other.
    """
    for name, value, low, high in (
        ("n", n, 1, MAX_REQUESTS),
        ("beams", beams, 1, most_beams),
        ("top_logprobs", top_logprobs, 0, MOST_ALTERNATIVES),
    ):
        if type(value) is not int or not low <= value <= high:
            raise MessageError(f"{name} is {value!r}; expected a whole number from {low} to {high}.")
    if top_logprobs and not logprobs:
        raise MessageError(f"top_logprobs is {top_logprobs}, but logprobs is off; set logprobs=True.")
    if beams > 1 and n > 1:
        raise MessageError(f"n is {n}, but a beam search finds one answer; leave one of them out.")
    if beams > 1 and thinking_budget is not None:
        raise MessageError(
            "thinking_budget was given, but a beam search ends reasoning where it finds best; leave one of them out."
        )


def check_scores(*, logprobs: bool, n_beams: int, has_pictures: bool) -> None:
    """Refuse log probabilities of a prompt where they cannot be told.

    Raises
    ------
    MessageError
        Saying why.
    """
    if not logprobs:
        raise MessageError("prompt_logprobs is on, but logprobs is off; set logprobs=True.")
    if n_beams > 1:
        raise MessageError("prompt_logprobs was given together with a beam search; leave one of them out.")
    if has_pictures:
        raise MessageError(
            "prompt_logprobs was given for a prompt with pictures, whose places have no tokens; leave one of the two "
            "out."
        )


def check_begun(begun: Begun, tools: Sequence[Any]) -> None:
    """Refuse to go on inside a tool call, which nobody could read as one.

    Raises
    ------
    MessageError
        Saying so.
    """
    if tools and TOOL_CALL_END not in begun.content.rpartition(TOOL_CALL)[2] and TOOL_CALL in begun.content:
        raise MessageError(
            f"The last message, which the answer goes on with, ends inside a {TOOL_CALL}; calls are written whole: "
            "leave its beginning out, and name the function in tool_choice if it must be called."
        )


def check_form(has_form: bool, beams: int) -> None:
    """Refuse what cannot be done together: a search, and an answer that must look like something.

    Raises
    ------
    MessageError
        Saying so.
    """
    if has_form and beams > 1:
        raise MessageError(
            "A beam search (beams, or sampling=False) cannot be held to a schema or to a tool call; leave out one of "
            "the two."
        )
