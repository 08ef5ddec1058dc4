"""Functions that a model may call: what an answer with a call must look like, and how to parse one.

Calls are written as in Qwen3, as the chat template shows the model:

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

Results go back as messages with the role `tool`, after the assistant's message with its calls (`Answer.message`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.errors import MessageError
from edge_runtime.structured_output.effort import Effort, TooMuchWorkError
from edge_runtime.structured_output.schema import bound_schema

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
MODES = ("auto", "required", "none")


@dataclass(frozen=True)
class ToolCall:
    """A call that a model has written."""

    name: str
    arguments: dict[str, Any]

    def as_message(self) -> dict[str, Any]:
        """The call as an entry of `tool_calls` in a message, in OpenAI's form."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class MalformedCall:
    """Text between the tags of a call that is not a call."""

    text: str
    """The whole text, with its tags."""
    reason: str
    """A sentence."""


def function_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the functions in a list of descriptions.

    Raises
    ------
    MessageError
        When a description has the wrong form.
    """
    names = [_function(tool, i)["name"] for i, tool in enumerate(tools)]
    counts = Counter(names)
    twice = next((name for name in sorted(counts) if counts[name] > 1), None)
    if twice is not None:
        raise MessageError(f"The tools describe {twice!r} more than once; expected one description per function.")
    return names


def checked_tools(tools: Any, choice: Any) -> list[dict[str, Any]]:
    """Return the functions that the prompt describes: those given, unless none may be called.

    Raises
    ------
    MessageError
        When they are not a list of descriptions.
    """
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, dict) for tool in tools):
        raise MessageError("The tools are not a list of mappings; expected function descriptions in OpenAI's form.")
    function_names(tools)
    return [] if choice == "none" else [*tools]


def _function(tool: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The function of a description in OpenAI's form, or bare, which Qwen's templates accept, too."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MessageError(
            f"Tool {number} has no name; expected a description like "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}.'
        )
    return function


def chosen_functions(tools: Sequence[Mapping[str, Any]], choice: Any) -> list[str] | None:
    """Names among which the model must choose; None if it may also answer without a call.

    Parameters
    ----------
    choice : `auto`, `required`, `none`, a function's name, or {"type": "function", "function": {"name": ...}}.

    Raises
    ------
    MessageError
        When the choice is none of these.
    """
    names = function_names(tools)
    if choice in ("auto", "none"):
        return None
    if choice == "required":
        if not names:
            raise MessageError("tool_choice is 'required', but there are no tools; add some, or leave it out.")
        return names
    name = choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise MessageError(
            f"tool_choice is {choice!r}; expected one of {', '.join(MODES)}, or the name of a tool: "
            f"{', '.join(names) or 'there are none'}."
        )
    return [name]


def call_schema(
    tools: Sequence[Mapping[str, Any]], names: Sequence[str], *, must_hold: bool = True, effort: Effort | None = None
) -> dict[str, Any]:
    """JSON schema of a call of one of the named functions.

    Parameters
    ----------
    must_hold : whether parameters that cannot be enforced are an error. Otherwise any arguments are accepted, as in a
        call that is not enforced.
    effort : limits the work.

    Raises
    ------
    MessageError
        When a function's parameters cannot be enforced.
    """
    calls, definitions, wanted, effort = [], {}, frozenset(names), effort or Effort()
    for number, tool in enumerate(tools):
        function = _function(tool, number)
        if function["name"] not in wanted:
            continue
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        try:
            bound_schema(parameters, effort=effort)
        except TooMuchWorkError:
            raise
        except MessageError as error:
            if not must_hold:
                calls.append(_call_of(function["name"], {"type": "object"}))
                continue
            raise MessageError(f"The parameters of the tool {function['name']!r}: {error}") from None
        definitions[f"tool{number}"] = _rebased(parameters, f"#/$defs/tool{number}")
        calls.append(_call_of(function["name"], {"$ref": f"#/$defs/tool{number}"}))
    return {"anyOf": calls, "$defs": definitions}


def _call_of(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    call = {"name": {"const": name}, "arguments": arguments}
    return {"type": "object", "properties": call, "required": [*call], "additionalProperties": False}


def _rebased(schema: Any, place: str) -> Any:
    """A schema whose references into itself are still valid when it is put at `place` in another one."""
    if isinstance(schema, list | tuple):
        return [_rebased(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: place + value[1:] if key == "$ref" and isinstance(value, str) else _rebased(value, place)
        for key, value in schema.items()
        if key not in ("$schema", "$id")
    }


def parse_call(text: str, names: Sequence[str]) -> ToolCall | str:
    """Parse a call; if it is not a call, the reason as a sentence.

    Parameters
    ----------
    text : the text between the tags.
    names : functions that were offered.
    """
    try:
        call = _plain_json(text)
    except (ValueError, RecursionError) as error:
        return f"The tool call is not JSON ({error})."
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return "The tool call has no name."
    if call["name"] not in names:
        return f"The tool call names {call['name'][:60]!r}, which was not offered."
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write the arguments as JSON inside a string
        try:
            arguments = _plain_json(arguments)
        except (ValueError, RecursionError) as error:
            return f"The arguments of the tool call are not JSON ({error})."
    if not isinstance(arguments, dict):
        return f"The arguments of the tool call are of type {type(arguments).__name__}, not a JSON object."
    return ToolCall(call["name"], arguments)


def _plain_json(text: str) -> Any:
    """Read JSON that can be written as JSON again.

    Raises
    ------
    ValueError
        When it is not JSON: Python's own reader accepts NaN, numbers beyond any float, and lone surrogates.
    """

    def refused(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    def finite(number: str) -> float:
        value = float(number)
        return value if math.isfinite(value) else refused(number[:40])

    value = json.loads(text, parse_constant=refused, parse_float=finite)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return value
