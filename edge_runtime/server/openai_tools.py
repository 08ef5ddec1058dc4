"""Tools as clients describe, choose and call them → as `edge_runtime.tools` and messages carry them.

Shared by the APIs of OpenAI and Anthropic; knows no requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edge_runtime.server.errors import RequestError


def given(**options: Any) -> dict[str, Any]:
    """Options without those that are None."""
    return {name: value for name, value in options.items() if value is not None}


def called(name: str, arguments: Any) -> dict[str, Any]:
    """A call of an earlier turn as messages carry it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments or {}}}


def describe(name: str, description: str | None, parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Description of a function, without what only OpenAI's own servers look at: the model reads it word by word."""
    return {"type": "function", "function": given(name=name, description=description, parameters=parameters)}


def choose_tools(
    tools: Sequence[dict[str, Any]], choice: str | Mapping[str, Any] | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Bring a choice of tools into the engine's form.

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
        names = [_name(tool) for tool in _objects(allowed.get("tools") if isinstance(allowed, Mapping) else None)]
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
