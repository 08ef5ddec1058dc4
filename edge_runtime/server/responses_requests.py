"""Requests of OpenAI's responses API → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic. Leaves: messages for `edge_runtime.messages` and keyword arguments for
`Model.submit`. What needs a server that remembers conversations, or OpenAI's own tools, is refused: an answer without
them would be an answer to another question. Source: openai-python's types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from edge_runtime.sampling import MAX_SEED
from edge_runtime.server.errors import RequestError
from edge_runtime.server.openai_requests import Loose, Reasoning, reasoning_options
from edge_runtime.server.openai_tools import called, choose_tools, describe, given
from edge_runtime.server.parts import content_parts

LOGPROBS = "message.output_text.logprobs"
ROLES = ("user", "assistant", "system", "developer")


class TextFormat(Loose):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(Loose):
    """About the text of an answer."""

    format: TextFormat | None = None


class ResponsesRequest(Loose):
    """Body of `POST /v1/responses`."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto` leaves out the oldest turns of a conversation that does not fit."
    )
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = Field(None, description="Nothing is stored, whatever it says.")
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    thinking_budget: int | None = Field(None, ge=0, description="Most tokens of reasoning.")
    max_slices: int | None = Field(None, ge=1, description="Most cells that a picture is cut into.")

    def conversation_messages(self) -> list[dict[str, Any]]:
        """Messages as `edge_runtime.messages` takes them.

        Raises
        ------
        RequestError
            Naming the item that has the wrong form, or what cannot be done without stored conversations.
        """
        for field in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, field):
                raise RequestError(
                    f"{field} was given, but this server stores nothing; send the whole conversation as 'input'.",
                    field,
                )
        if self.background:
            raise RequestError(
                "background is true, but this server stores no answers to be fetched later; use 'stream'.",
                "background",
            )
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        return messages + _Items().read(self.input)

    def described_tools(self) -> list[dict[str, Any]]:
        """Functions in the engine's form.

        Raises
        ------
        RequestError
            Naming a tool that is none.
        """
        return [_described(tool, f"tools[{number}]") for number, tool in enumerate(self.tools or [])]

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When tools or the form of the answer are described in a way that cannot be used.
        """
        tools, choice = choose_tools(self.described_tools(), self.tool_choice)
        return given(
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % MAX_SEED,
            tools=tools or None,
            tool_choice=choice,
            max_slices=self.max_slices,
            context_shift=self.truncation == "auto" or None,
            logprobs=(LOGPROBS in (self.include or []) or bool(self.top_logprobs)) or None,
            top_logprobs=self.top_logprobs or None,
            **reasoning_options(self.reasoning.effort if self.reasoning else None, self.thinking_budget),
            **self._form(),
        )

    def _form(self) -> dict[str, Any]:
        wanted = self.text.format if self.text is not None else None
        if wanted is None or wanted.type == "text":
            return {}
        if wanted.type == "json_object":
            return {"json": True}
        if wanted.schema_ is None:
            raise RequestError(
                'text.format has no schema; expected {"type": "json_schema", "name": ..., "schema": {...}}.',
                "text.format.schema",
            )
        return {"schema": wanted.schema_}


def _described(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A function is described flat here; some clients nest it as in chat completions."""
    function = tool.get("function", tool)
    if (
        tool.get("type") != "function"
        or not isinstance(function, Mapping)
        or not isinstance(name := function.get("name"), str)
        or not isinstance(description := function.get("description"), str | None)
        or not isinstance(parameters := function.get("parameters"), dict | None)
    ):
        raise RequestError(
            f"The tool is of type {str(tool.get('type'))[:40]!r} or describes no function; expected "
            '{"type": "function", "name": ..., "parameters": {...}}, for this server has no tools of its own.',
            where,
        )
    return describe(name, description, parameters)


class _Items:
    """Items of an input → messages: reasoning, text and calls of one answer become one message."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._reasoning: list[str] = []
        self._kinds: dict[str, Callable[[Mapping[str, Any], str], None]] = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._result,
            "reasoning": self._note_reasoning,
        }

    def read(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, item in enumerate(items):
            where = f"input[{number}]"
            kind = item.get("type") or ("message" if "role" in item else None)
            translate = self._kinds.get(kind) if isinstance(kind, str) else None
            if translate is None:
                raise RequestError(
                    f"The item has the type {str(kind)[:40]!r}; expected one of {', '.join(self._kinds)}.", where
                )
            translate(item, where)
        return self._messages

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise RequestError(
                f"The message has the role {str(role)[:40]!r}; expected one of {', '.join(ROLES)}.", f"{where}.role"
            )
        content = content_parts(item.get("content"), f"{where}.content")
        self._messages.append({"role": role, "content": content})
        if role == "assistant":
            self._take_reasoning(self._messages[-1])

    def _call(self, item: Mapping[str, Any], where: str) -> None:
        name, arguments = item.get("name"), item.get("arguments", "")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise RequestError("The call has no name, or its arguments are no string of JSON.", where)
        if not self._messages or self._messages[-1]["role"] != "assistant" or self._reasoning:
            self._messages.append({"role": "assistant", "content": ""})
            self._take_reasoning(self._messages[-1])
        self._messages[-1].setdefault("tool_calls", []).append(called(name, arguments))

    def _result(self, item: Mapping[str, Any], where: str) -> None:
        self._messages.append({"role": "tool", "content": content_parts(item.get("output"), f"{where}.output")})

    def _note_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        """Reasoning belongs to the answer that follows; a summary stands in where the text is not there."""
        for key in ("content", "summary"):
            parts = item.get(key) or []
            if not isinstance(parts, list):
                raise RequestError(f"The reasoning's {key} is no list.", f"{where}.{key}")
            texts = [
                part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)
            ]
            if texts:
                self._reasoning += texts
                return

    def _take_reasoning(self, message: dict[str, Any]) -> None:
        if self._reasoning:
            message["reasoning_content"] = "\n".join(self._reasoning)
            self._reasoning = []
