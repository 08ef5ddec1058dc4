"""`/set` and `/show` of a chat, as Ollama spells them: words in, options of `Model.chat` changed, a sentence out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.output_level import set_verbose
from edge_runtime.errors import MessageError
from edge_runtime.option_checks import ModelLimits, checked_options
from edge_runtime.options import GenerationOptions

if TYPE_CHECKING:
    from edge_runtime.cli.line_editor import LineEditor
    from edge_runtime.model import AnyModel

SETTINGS = (
    *("parameter", "system", "think", "nothink", "format", "noformat", "verbose", "quiet", "history", "nohistory"),
)
SHOWN = ("info", "parameters", "system")
_SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "think": ({"thinking": True}, "Reasoning is on."),
    "nothink": ({"thinking": False}, "Reasoning is off."),
    "noformat": ({"json": False, "schema": None}, "Answers are free text."),
}
SET_HELP = f"/set takes one of: {', '.join(SETTINGS)}."
_PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    **{
        name: (name, float, "a number")
        for name in ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty")
    },
    "repeat_penalty": ("repetition_penalty", float, "a number"),
    "top_k": ("top_k", int, "a whole number"),
    "seed": ("seed", int, "a whole number"),
    "num_predict": ("max_tokens", int, "a whole number"),
    "stop": ("stop", lambda text: (text.strip("\"'"),), "a text"),
}
"""Ollama's name: the option of `Model.chat`, its type, and what to call that."""
_OF_LOADING = {"num_ctx": "--ctx N", "num_thread": "--threads N"}
PARAMETER_HELP = f"/set parameter takes a name and a value: {', '.join(_PARAMETERS)}."


def change(argument: str, options: dict[str, Any], limits: ModelLimits, editor: LineEditor | None) -> str:
    """Carry out `/set ARGUMENT` on the options; returns what is to be said. `system` is the chat's own.

    Raises
    ------
    MessageError
        When there is no such setting, or it does not take the value.
    """
    name, _, value = argument.partition(" ")
    value = value.strip()
    if name in _SWITCHES:
        changed, said = _SWITCHES[name]
        options |= changed
        return said
    if name == "parameter":
        return _parameter(value, options, limits)
    if name == "format":
        if value != "json":
            raise MessageError(f"/set format is {value!r}; expected json. A schema is given with --schema.")
        options["json"] = True
        return "Answers are JSON; ask for it in the question, too."
    if name in ("verbose", "quiet"):
        set_verbose(name == "verbose")
        return f"Times and rates are {'shown' if name == 'verbose' else 'not shown'} after answers."
    if name in ("history", "nohistory"):
        if editor is None:
            raise MessageError("History is kept in a terminal only.")
        editor.history.keeps = name == "history"
        return f"Messages are {'kept' if editor.history.keeps else 'not kept'} for later chats."
    raise MessageError(f"There is no setting {name!r}. {SET_HELP}" if name else SET_HELP)


def _parameter(text: str, options: dict[str, Any], limits: ModelLimits) -> str:
    name, _, written = text.partition(" ")
    written = written.strip()
    if not name or not written:
        raise MessageError(PARAMETER_HELP)
    if name in _OF_LOADING:
        raise MessageError(
            f"{name} is set when the model is loaded: leave the chat, and run it with {_OF_LOADING[name]}."
        )
    if name not in _PARAMETERS:
        raise MessageError(f"There is no parameter {name!r}. {PARAMETER_HELP}")
    option, kind, expected = _PARAMETERS[name]
    try:
        value = kind(written)
    except ValueError:
        raise MessageError(f"{name} is {written!r}; expected {expected}.") from None
    checked_options(GenerationOptions.of({option: value})[0], limits)
    if name == "temperature":
        options.pop("greedy", None)
    options[option] = value
    return f"{name} is {written}."


def described(argument: str, model: AnyModel, options: dict[str, Any], system: str | None) -> str:
    """What `/show ARGUMENT` prints.

    Raises
    ------
    MessageError
        When there is no such thing to show.
    """
    what = argument.strip() or "info"
    if what == "info":
        return f"{'model':<12}{model.name}"
    if what == "system":
        return system or "There is no system prompt; '/set system TEXT' gives one."
    if what == "parameters":
        given = {name: options.get(option) for name, (option, _, _) in _PARAMETERS.items()}
        lines = [f"{name:<20}{value}" for name, value in given.items() if value not in (None, ())]
        return "\n".join(lines) or "All parameters are the official ones."
    raise MessageError(f"There is nothing to show under {what!r}; /show takes one of: {', '.join(SHOWN)}.")
