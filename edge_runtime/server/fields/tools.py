"""Tools as clients describe, choose and call them → the form of `structured_output.tools` and messages.

Shared by the APIs of OpenAI and Anthropic; knows no requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edge_runtime.server.errors import RequestError

NOT_HOSTED = ("custom", "namespace")
"""Kinds of tools that clients run: leaving them out would hide from the model what it should call."""


def given(**options: Any) -> dict[str, Any]:
    """Options without those that are None."""
    return {name: value for name, value in options.items() if value is not None}


def called(name: str, arguments: Any) -> dict[str, Any]:
    """A call of an earlier turn, as messages hold it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}}


def describe(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Description of a function, without fields that only OpenAI's servers use: the model reads every word of it."""
    return {"type": "function", "function": given(name=name, description=description, parameters=parameters)}


def described(tool: Mapping[str, Any], where: str, *, flat: bool) -> dict[str, Any]:
    """A function description of OpenAI's APIs, in the engine's form.

    Parameters
    ----------
    flat : whether its name is beside the type, as in responses, which accept it nested in `function`, too.

    Raises
    ------
    RequestError
        When it describes no function.
    """
    function = tool.get("function", tool if flat else None)
    if (
        not isinstance(function, Mapping)
        or not isinstance(name := function.get("name"), str)
        or not isinstance(description := function.get("description"), str | None)
        or not isinstance(parameters := function.get("parameters"), dict | None)
    ):
        inside = '"name": ..., "parameters": {...}'
        form = inside if flat else f'"function": {{{inside}}}'
        raise RequestError(
            f'The tool describes no function; expected {{"type": "function", {form}}}.',
            where,
        )
    return describe(name, description, parameters)


def choose_tools(
    tools: Sequence[dict[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Translate a choice of tools into the engine's form.

    Parameters
    ----------
    choice : `auto`, `none`, `required`; a function as chat completions or responses name it; or `allowed_tools`.

    Returns
    -------
    tools, choice : the tools that may be called, and `auto`, `none`, `required` or a name.

    Raises
    ------
    RequestError
        When the choice is none of these.
    """
    if choice is None or isinstance(choice, str):
        return [*tools], choice
    kind = choice.get("type")
    if kind == "function":
        name = _name(choice)
        if name is not None:
            return [*tools], name
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        wanted = _objects(allowed.get("tools") if isinstance(allowed, Mapping) else None)
        names = [_name(tool) for tool in wanted if tool.get("type", "function") == "function"]
        left = [tool for tool in tools if tool["function"]["name"] in names]
        if names and len(left) == len(names):
            return left, "required" if allowed.get("mode") == "required" else "auto"
    raise RequestError(
        f"tool_choice is {str(choice)[:80]}; expected auto, none, required, or a function that is among the tools.",
        "tool_choice",
    )


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _name(tool: Mapping[str, Any]) -> str | None:
    function = tool.get("function", tool)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def offered(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    describe: Callable[[Mapping[str, Any], str], dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[str]]:
    """The functions among the tools; tools that OpenAI's servers run (`web_search` and the like) are left out.

    Parameters
    ----------
    describe : translates a tool into the engine's form; gets its place, too, for errors.

    Returns
    -------
    functions, warnings : the warnings are sentences about tools that were left out.

    Raises
    ------
    RequestError
        Names a tool that cannot be used, or a choice for which no tool is left.
    """
    functions, hosted = [], []
    for number, tool in enumerate(tools):
        kind, where = tool.get("type", "function"), f"tools[{number}]"
        if kind == "function":
            functions.append(describe(tool, where))
        elif not isinstance(kind, str) or kind in NOT_HOSTED or "function" in tool or "parameters" in tool:
            raise RequestError(
                f"The tool is of type {str(kind)[:40]!r}, which this model cannot call; expected functions: "
                '{"type": "function", ...} with a name and parameters.',
                where,
            )
        else:
            hosted.append(kind[:40])
    if not hosted:
        return functions, []
    names = ", ".join(dict.fromkeys(hosted))
    if not functions and choice not in (None, "auto", "none"):
        raise RequestError(
            f"tool_choice asks for a call, but the tools are {names}, which run on OpenAI's servers only; expected a "
            "function among them.",
            "tool_choice",
        )
    return functions, [f"Tools that run on OpenAI's servers only were left out: {names}"]
