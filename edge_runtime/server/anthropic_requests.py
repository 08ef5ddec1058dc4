"""Requests of Anthropic's messages API → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic; fields that are not named here are ignored. Leaves: messages for
`edge_runtime.messages` and keyword arguments for `Model.submit`. A client's string never becomes a path. Source:
anthropic-sdk-python's types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from edge_runtime.base64_data import as_data_uri, is_data_uri
from edge_runtime.server.errors import RequestError
from edge_runtime.server.openai_requests import MOST_STOPS, Loose
from edge_runtime.server.openai_tools import called, describe, given
from edge_runtime.server.parts import Part, checked_address

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class AnthropicMessage(Loose):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Loose):
    """A function that the model may call."""

    name: str
    type: str | None = Field(None, description="`custom`; tools of Anthropic's own are refused.")
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Loose):
    """Which tools are to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Loose):
    """Whether the model reasons first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)


class CountRequest(Loose):
    """Body of `POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    max_slices: int | None = Field(None, ge=1, description="Most cells that a picture is cut into.")

    @property
    def most_calls(self) -> int | None:
        """1 where the client takes one call at a time."""
        return 1 if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use else None

    def conversation(self) -> list[dict[str, Any]]:
        """Messages as `edge_runtime.messages` takes them.

        Raises
        ------
        RequestError
            Naming the block that has the wrong form.
        """
        found = []
        if self.system:
            found.append({"role": "system", "content": _content(self.system, "system")})
        for number, message in enumerate(self.messages):
            found += _turn(message, f"messages[{number}].content")
        return found

    def prompt_options(self) -> dict[str, Any]:
        """Arguments of `Model.submit` that decide the prompt.

        Raises
        ------
        RequestError
            Naming a tool that is none.
        """
        choice: str | None = None
        if self.tool_choice is not None:
            choice = CHOICES.get(self.tool_choice.type, self.tool_choice.name)
            if choice is None:
                raise RequestError("tool_choice is of type tool and has no name; add the tool's.", "tool_choice.name")
        return given(
            thinking=self.thinking is not None and self.thinking.type != "disabled",
            tools=[_described(tool, f"tools[{number}]") for number, tool in enumerate(self.tools or [])] or None,
            tool_choice=choice,
            max_slices=self.max_slices,
        )


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            As `prompt_options`.
        """
        return self.prompt_options() | given(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            thinking_budget=self.thinking.budget_tokens if self.thinking is not None else None,
        )


def _described(tool: AnthropicTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise RequestError(
            f"The tool {tool.name[:40]!r} has no input_schema; expected the description of a function, for this "
            "server has no tools of its own.",
            where,
        )
    return describe(tool.name, tool.description, tool.input_schema)


def _turn(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """Messages of a turn: results of tools first, each one of its own, then what else the turn says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, parts, calls, reasoning = [], [], [], []
    for number, block in enumerate(message.content):
        place = f"{where}[{number}]"
        kind = block.get("type")
        if kind == "tool_result":
            content = block.get("content")
            results.append(
                {"role": "tool", "content": _content("" if content is None else content, f"{place}.content")}
            )
        elif kind == "tool_use":
            calls.append(_call(block, place))
        elif kind == "thinking":
            reasoning.append(_string(block, "thinking", place))
        elif kind != "redacted_thinking":
            parts.append(_part(block, place))
    turn = {
        "role": message.role,
        "content": parts,
        **given(tool_calls=calls or None, reasoning_content="\n".join(reasoning) or None),
    }
    return [*results, turn] if parts or calls or reasoning or not results else results


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = block.get("input", {})
    if not isinstance(arguments, Mapping):
        raise RequestError(f"The input of the call is of type {type(arguments).__name__}; expected an object.", where)
    return called(_string(block, "name", where), arguments)


def _content(content: Any, where: str) -> str | list[Part]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"The content is of type {type(content).__name__}; expected a string or a list of blocks.", where
        )
    return [_part(block, f"{where}[{number}]") for number, block in enumerate(content)]


def _part(block: Any, where: str) -> Part:
    kind = block.get("type") if isinstance(block, Mapping) else None
    translate = _KINDS.get(kind) if isinstance(kind, str) else None
    if translate is None:
        raise RequestError(
            f"The block has the type {str(kind)[:40]!r}; expected one of {', '.join(_KINDS)}.", f"{where}.type"
        )
    return translate(block, where)


def _text(block: Mapping[str, Any], where: str) -> Part:
    return {"type": "text", "text": _string(block, "text", where)}


def _image(block: Mapping[str, Any], where: str) -> Part:
    return {"type": "image_url", "image_url": {"url": _source(block, "image/png", where)}}


def _document(block: Mapping[str, Any], where: str) -> Part:
    """A document as pages, or its text where that is what it consists of."""
    source = block.get("source")
    if isinstance(source, Mapping) and source.get("type") == "text":
        return {"type": "text", "text": _string(source, "data", f"{where}.source")}
    file = {"file_data": _source(block, "application/pdf", where)}
    if isinstance(block.get("title"), str):
        file["filename"] = block["title"]
    return {"type": "file", "file": file}


def _source(block: Mapping[str, Any], media_type: str, where: str) -> str:
    """The bytes of a block as a data: URI, or its http address."""
    source, place = block.get("source"), f"{where}.source"
    if not isinstance(source, Mapping) or source.get("type") not in ("base64", "url"):
        raise RequestError(
            'The source has no bytes; expected {"type": "base64", "media_type": ..., "data": ...}.', place
        )
    if source["type"] == "url":
        return checked_address(source.get("url"), f"{place}.url")
    kind = source.get("media_type", media_type)
    if not isinstance(kind, str) or not kind.replace("/", "").replace("+", "").replace("-", "").isalnum():
        raise RequestError(f"The media type is {str(kind)[:40]!r}; expected one like {media_type}.", place)
    data = _string(source, "data", place)
    return data if is_data_uri(data) else as_data_uri(data, kind)


def _string(block: Mapping[str, Any], key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{key} is of type {type(value).__name__}; expected a string.", f"{where}.{key}")
    return value


_KINDS: dict[str, Callable[[Mapping[str, Any], str], Part]] = {"text": _text, "image": _image, "document": _document}
