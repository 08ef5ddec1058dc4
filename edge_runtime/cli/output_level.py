"""How much a command says besides its answer: `--quiet` and `--verbose`, and the rates that the latter prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edge_runtime.answers import Answer

_KEY = "edge_runtime.cli.output_level"
QUIET, VERBOSE = "quiet", "verbose"


def arrange_output(*, quiet: bool, verbose: bool) -> None:
    """Set the level for the command that is running.

    Raises
    ------
    click.UsageError
        When both were asked for.
    """
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose were both given; give one of them.")
    click.get_current_context().meta[_KEY] = QUIET if quiet else VERBOSE if verbose else ""


def set_verbose(verbose: bool) -> None:
    """Print times and rates after the command's answers, or stop to."""
    click.get_current_context().meta[_KEY] = VERBOSE if verbose else ""


def _level() -> str:
    context = click.get_current_context(silent=True)
    return "" if context is None else str(context.meta.get(_KEY, ""))


def is_quiet() -> bool:
    """Whether the command prints its answer alone."""
    return _level() == QUIET


def is_verbose() -> bool:
    """Whether times and rates are printed after every answer."""
    return _level() == VERBOSE


def rates(answer: Answer) -> list[str]:
    """Times and rates of an answer, a line each; what a server does not tell is left out."""
    times = answer.timings_s
    new_tokens = answer.prompt_tokens - answer.cached_tokens
    cached = f" of {answer.prompt_tokens}, the others were cached" if answer.cached_tokens else ""
    n_slices = len(answer.slices)
    rows = (
        ("load", "load", ""),
        ("image", "read pictures", ""),
        ("encode", "encode", _counted(n_slices, "slice", "s per slice", times.get("encode", 0), inverse=True)),
        ("prefill", "prefill", _counted(new_tokens, "token", "tokens/s", times.get("prefill", 0)) + cached),
        ("first_token", "first token", "since the question"),
        ("decode", "answer", _counted(answer.completion_tokens, "token", "tokens/s", times.get("decode", 0))),
        ("total", "total", ""),
    )
    return [f"{label:<14}{times[key]:>9.3f} s  {told}".rstrip() for key, label, told in rows if key in times]


def _counted(n: int, what: str, unit: str, seconds: float, *, inverse: bool = False) -> str:
    """`26 tokens, 52.0 tokens/s`."""
    text = f"{n} {what}{'' if n == 1 else 's'}"
    if n == 0 or seconds <= 0:
        return text
    return f"{text}, {seconds / n:.3f} {unit}" if inverse else f"{text}, {n / seconds:.1f} {unit}"
