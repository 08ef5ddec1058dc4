"""Requests of OpenAI's responses API → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic, and the items of responses that it continues (`responses_store`). Leaves:
messages for `inputs.messages` and keyword arguments for `Model.submit`. What needs stored conversations or prompts
is refused: an answer without them would be an answer to another question. Source: openai-python's types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from edge_runtime.server.content_parts import content_parts
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.constraints import TextFormat
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.fields.refused import OF_RESPONSES, REFUSED
from edge_runtime.server.fields.sampling import reasoning_options
from edge_runtime.server.fields.tools import called, given
from edge_runtime.server.openai.conversations import ConversationFields

LOGPROBS = "message.output_text.logprobs"
VERBOSITY = REFUSED["verbosity"]
Item = dict[str, Any]
Messages = list[dict[str, Any]]
Includable = Literal[
    "message.output_text.logprobs",
    # Only OpenAI's own tools and stores have these: answers here contain none.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]
ROLES = ("user", "assistant", "system", "developer")


class TextConfig(Loose):
    """Form of an answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(ConversationFields):
    """Body of `POST /v1/responses`."""

    flat_functions = True

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    text: TextConfig | None = None
    include: list[Includable] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        None, description="`auto` drops the oldest turns of a conversation that does not fit."
    )
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = Field(
        None, description="Whether the response is stored in memory for a while; not if false."
    )
    background: bool | None = None
    previous_response_id: str | None = Field(None, description="The conversation continues that response.")
    conversation: Any = None
    prompt: Any = None

    def own_items(self) -> list[Item]:
        """Items of this request only.

        Raises
        ------
        RequestError
            Names a field that needs stored conversations, prompts, or answers to be fetched later.
        """
        for field, instead in (
            ("conversation", "send the whole conversation as 'input', or continue 'previous_response_id'"),
            ("prompt", "send its text as 'instructions' or 'input'"),
        ):
            if getattr(self, field):
                raise RequestError(f"{field} was given, but this server stores none; {instead}.", field)
        if self.background:
            raise RequestError(
                "background is true, but answers cannot be fetched later here; use 'stream'.",
                "background",
            )
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": self.input}]}]
        return self.input

    def conversation_messages(self, before: Sequence[Item] = (), own: Sequence[Item] | None = None) -> Messages:
        """Messages as `edge_runtime.inputs.messages` takes them.

        Parameters
        ----------
        before : items of the responses that this one continues.
        own : items of this request, with references to stored ones resolved.

        Raises
        ------
        RequestError
            Names the item that is malformed, or what this server does not store.
        """
        own = self.own_items() if own is None else own
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = _Items()
        items.read(before, "previous_response_id")
        return messages + items.read(own, "input")

    def all_warnings(self) -> list[str]:
        """Sentences about what was passed over; what must not be is refused.

        Raises
        ------
        RequestError
            Naming the field.
        """
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise RequestError(f"text.verbosity is {self.text.verbosity!r}, {VERBOSITY.why}.", "text.verbosity")
        return [*self.warnings(OF_RESPONSES), *self.offered_tools()[1]]

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When tools or the form of the answer are described in a way that cannot be used.
        """
        return super().options() | given(
            max_tokens=self.max_output_tokens,
            context_shift=self.truncation == "auto" or None,
            logprobs=(LOGPROBS in (self.include or []) or bool(self.top_logprobs)) or None,
            top_logprobs=self.top_logprobs or None,
            **reasoning_options(self.effort, self.thinking_budget),
            **self._form()[0],
        )

    def names(self) -> dict[str, str]:
        """Options of `Model.submit` → fields of this request, for errors."""
        return {**super().names(), **self._form()[1], "max_tokens": "max_output_tokens"}

    def _form(self) -> tuple[dict[str, Any], dict[str, str]]:
        wanted = self.text.format if self.text is not None else None
        return self.form(("text.format", {} if wanted is None else wanted.options()))


class InputTokensRequest(ResponsesRequest):
    """Body of `POST /v1/responses/input_tokens`."""

    input: str | list[dict[str, Any]] | None = None  # type: ignore[assignment]

    def own_items(self) -> list[Item]:
        """Items of this request only; without any, those of the response that it continues are counted."""
        return [] if self.input is None else super().own_items()


class _Items:
    """Items of an input → messages: reasoning, text and calls of one answer become one message."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._reasoning: list[str] = []
        self._kinds: dict[str, Callable[[Mapping[str, Any], str], None]] = {
            "message": self._message,
            "function_call": self._call,
            "function_call_output": self._result,
            "reasoning": self._keep_reasoning,
        }

    def read(self, items: Sequence[Item], name: str) -> Messages:
        for number, item in enumerate(items):
            where = f"{name}[{number}]"
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
            raise RequestError(
                "The call has no name, or its arguments are not a string of JSON; expected both.", where
            )
        if not self._messages or self._messages[-1]["role"] != "assistant" or self._reasoning:
            self._messages.append({"role": "assistant", "content": ""})
            self._take_reasoning(self._messages[-1])
        self._messages[-1].setdefault("tool_calls", []).append(called(name, arguments))

    def _result(self, item: Mapping[str, Any], where: str) -> None:
        self._messages.append({"role": "tool", "content": content_parts(item.get("output"), f"{where}.output")})

    def _keep_reasoning(self, item: Mapping[str, Any], where: str) -> None:
        """Reasoning belongs to the answer that follows; a summary replaces a missing text."""
        for key in ("content", "summary"):
            parts = item.get(key) or []
            if not isinstance(parts, list):
                raise RequestError(
                    f"The reasoning's {key} is not a list; expected a list of parts.", f"{where}.{key}"
                )
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
