"""Requests of Anthropic's messages API → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic. Leaves: messages for `edge_runtime.inputs.messages` and keyword arguments for
`Model.submit`. Every field that Anthropic's clients know is used, ignored (`PASSED_OVER`) or refused by name
(`REFUSED`); an unknown field is refused, as Anthropic does. Source: anthropic-sdk-python's types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from edge_runtime.server.anthropic.blocks import content_of, in_order, referenced_tools, turn
from edge_runtime.server.anthropic.schemas import as_meant
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.fields.sampling import MAX_STOPS
from edge_runtime.server.fields.thinking import THINKING_LEVELS
from edge_runtime.server.fields.tools import describe, given
from edge_runtime.server.sse import as_json

CHOICES = {"auto": "auto", "any": "required", "none": "none"}

PASSED_OVER = {
    "anthropic_beta": "versions of the protocol; each field is judged by itself",
    "anthropic_version": "the same, as Bedrock and Vertex have it",
    "betas": "the same, as Anthropic's packages name it",
    "billing_policy": "who pays",
    "cache_control": "prompts are cached in any case",
    "diagnostics": "why a cache was missed, which changes no answer",
    "fallback_credit_token": "who pays",
    "fallbacks": "models to try when one declines, which this one does not",
    "inference_geo": "where the answer is computed: on this machine",
    "metadata": "who asks",
    "service_tier": "how soon and at what price",
    "speed": "how fast and at what price",
    "user_profile_id": "who asks",
    "workspace_id": "who asks",
}
"""Fields that cannot change the answer → what they are about."""
REFUSED = {
    "compaction": "this server does not compact conversations; ask for a summary",
    "container": "this server runs no containers and no code",
    "mcp_servers": "this server calls no other servers; describe their tools under 'tools'",
    "thread": "this server stores no conversations; send the whole conversation under 'messages'",
}
"""Fields that would change the answer and are not offered → what to do."""
UNTHREADED = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
"""From this the packages' tool runner learns to send the whole conversation each time."""
TOOL_PASSED_OVER = frozenset({"cache_control", "eager_input_streaming", "strict"})
"""Fields of a tool. A forced call follows its schema whether or not `strict` is set."""


class Named(Loose):
    """A body, or a part of one, that keeps unknown fields in order to refuse them by name."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    def refuse_more(self, where: str, passed_over: Any = ()) -> None:
        """Refuse the remaining fields.

        Raises
        ------
        RequestError
            Names the first field that is neither known nor ignored.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in passed_over and value is not None:
                place = f"{where}.{name}" if where else name
                raise RequestError(f"{place[:80]}: unknown field; leave it out.", place[:80])


class AnthropicMessage(Loose):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class AnthropicTool(Named):
    """A function that the model may call."""

    name: str
    type: str | None = Field(None, description="`custom`; Anthropic's own tools are refused.")
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    input_examples: list[dict[str, Any]] | None = Field(None, description="Shown to the model after the description.")
    defer_loading: bool | None = Field(
        None, description="Shown to the model only once a `tool_reference` in the conversation names it."
    )
    allowed_callers: list[str] | None = Field(None, description="`direct` must be among them.")


class ToolChoice(Named):
    """Which tools the model must or may call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Named):
    """Whether the model reasons first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=0)
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="`omitted` leaves the reasoning's text out of the reply; otherwise it is complete."
    )


class OutputFormat(Named):
    """What an answer must look like."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Named):
    """Format and effort of the answer."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="Limits the reasoning; without `thinking` it turns it on."
    )


class ContextManagement(Named):
    """What is removed from a conversation."""

    edits: list[dict[str, Any]] | None = Field(
        None,
        description="`clear_thinking_20251015` alone: the model never sees the reasoning of earlier turns.",
    )


class CountRequest(Named):
    """Body of `POST /v1/messages/count_tokens`."""

    model_config = ConfigDict(json_schema_extra=lambda schema: _describe_fields(schema))

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="The older place of `output_config.format`.")
    context_management: ContextManagement | None = None
    max_slices: int | None = Field(None, ge=1, description="Largest number of cells per picture.")

    @property
    def max_calls(self) -> int | None:
        """1 where the client takes one call at a time."""
        return 1 if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use else None

    @property
    def thinks(self) -> bool:
        """Whether the model reasons first."""
        if self.thinking is not None:
            return self.thinking.type != "disabled"
        return self._effort is not None

    @property
    def shows_thinking(self) -> bool:
        """Whether the reply includes the reasoning's text."""
        return self.thinking is None or self.thinking.display != "omitted"

    @property
    def _effort(self) -> str | None:
        return self.output_config.effort if self.output_config is not None else None

    def conversation(self) -> list[dict[str, Any]]:
        """Messages as `edge_runtime.inputs.messages` takes them.

        Raises
        ------
        RequestError
            Names the field that cannot be honoured, or the block that is malformed.
        """
        self._check_fields()
        found = []
        if self.system:
            found.append({"role": "system", "content": content_of(self.system, "system")})
        messages = self.messages
        if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].content:
            messages = messages[:-1]  # an empty start of the answer
        for number, message in enumerate(messages):
            found += turn(message.role, message.content, f"messages[{number}].content")
        found = in_order(found)
        if found[-1]["role"] == "assistant":
            self._check_prefill(found[-1])
        return found

    def prompt_options(self) -> dict[str, Any]:
        """Arguments of `Model.submit` that affect the prompt.

        Raises
        ------
        RequestError
            Names a tool that is invalid, or a choice that is impossible.
        """
        tools = self._shown_tools()
        return given(
            thinking=self.thinks,
            tools=tools or None,
            tool_choice=self._choice([tool["function"]["name"] for tool in tools]),
            max_slices=self.max_slices,
        )

    def _check_fields(self) -> None:
        """Refuse fields that cannot be honoured."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value:
                details = UNTHREADED if name == "thread" else None
                raise RequestError(f"{name} was given, but {REFUSED[name]}.", name, details)
        self.refuse_more("", {*PASSED_OVER, *REFUSED})
        parts = {
            "tool_choice": self.tool_choice,
            "thinking": self.thinking,
            "output_config": self.output_config,
            "output_format": self.output_format,
            "context_management": self.context_management,
            "output_config.format": self.output_config.format if self.output_config is not None else None,
        }
        for where, part in parts.items():
            if part is not None:
                part.refuse_more(where)
        for edit in (self.context_management.edits if self.context_management is not None else None) or []:
            if edit.get("type") != "clear_thinking_20251015":
                raise RequestError(
                    f"context_management.edits has {str(edit.get('type'))[:40]!r}, but this server removes nothing "
                    "from a conversation but the reasoning of earlier turns; leave it out.",
                    "context_management.edits",
                )
        if self._effort is not None and self.thinking is not None and self.thinking.type == "disabled":
            raise RequestError(
                f"output_config.effort is {self._effort!r}, but thinking is disabled, and effort limits only "
                "the reasoning here; leave one of them out.",
                "output_config.effort",
            )
        if (
            self.output_format is not None
            and self.output_config is not None
            and self.output_config.format is not None
        ):
            raise RequestError(
                "output_format and output_config.format were both given; expected one of them.", "output_format"
            )

    def _check_prefill(self, last: Mapping[str, Any]) -> None:
        """Refuse a prefilled answer that cannot be continued, as Anthropic does."""
        content, where = last["content"], "messages"
        if self.thinks:
            turned_on = "thinking" if self.thinking is not None else "output_config.effort"
            raise RequestError(
                f"The last message is the assistant's, so the answer continues it, but {turned_on} lets the "
                "model reason first; leave one of them out.",
                turned_on,
            )
        if last.get("tool_calls"):
            raise RequestError(
                "The last message has a tool_use without a tool_result after it; add a user message with the result.",
                where,
            )
        text = content if isinstance(content, str) else content[-1].get("text", "") if content else ""
        if text != text.rstrip():
            raise RequestError(
                "The last message is the assistant's and ends with whitespace, which the answer cannot continue; "
                "remove it.",
                where,
            )

    def _shown_tools(self) -> list[dict[str, Any]]:
        """Tools that the model is shown, in the engine's form."""
        named = {name for message in self.messages for name in referenced_tools(message.content)}
        if self.tool_choice is not None and self.tool_choice.name is not None:
            named.add(self.tool_choice.name)
        return [
            _described(tool, f"tools[{number}]")
            for number, tool in enumerate(self.tools or [])
            if not tool.defer_loading or tool.name in named
        ]

    def _choice(self, names: list[str]) -> str | None:
        wanted = self.tool_choice
        if wanted is None:
            return None
        if wanted.type == "tool":
            if wanted.name is None:
                raise RequestError("tool_choice is of type tool and has no name; add the tool's.", "tool_choice.name")
            if wanted.name not in names:
                raise RequestError(
                    f"tool_choice names {wanted.name[:40]!r}; expected one of the tools: "
                    f"{', '.join(names) or 'there are none'}.",
                    "tool_choice.name",
                )
            return wanted.name
        if wanted.type == "any" and not names:
            raise RequestError(
                "tool_choice is of type any, but there are no tools; add some, or leave it out.", "tools"
            )
        return CHOICES[wanted.type]


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: int = Field(
        ge=0, description="0 computes the prompt, so that the next request is faster, and answers nothing."
    )
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None

    def names(self) -> dict[str, str]:
        """Options of `Model.submit` → fields of this request, for errors."""
        return {
            "stop": "stop_sequences",
            "thinking_budget": "thinking.budget_tokens",
            "schema": "output_config.format" if self.output_format is None else "output_format",
        }

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            As for `prompt_options`.
        """
        if self.stop_sequences is not None and "" in self.stop_sequences:
            raise RequestError(
                "stop_sequences holds an empty string, which would end every answer at once; leave it out.",
                "stop_sequences",
            )
        return self.prompt_options() | given(
            max_tokens=self.max_tokens or None,
            prompt_only=self.max_tokens == 0 or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            thinking_budget=self._budget() if self.thinks else None,
            schema=self._schema(),
        )

    def _budget(self) -> int | None:
        """Limit of reasoning tokens: the smallest of those given."""
        asked = [self.thinking.budget_tokens if self.thinking is not None else None]
        asked.append(THINKING_LEVELS.get(self._effort) if self._effort is not None else None)
        return min((budget for budget in asked if budget is not None), default=None)

    def _schema(self) -> dict[str, Any] | None:
        wanted = self.output_format
        if self.output_config is not None and self.output_config.format is not None:
            wanted = self.output_config.format
        return as_meant(wanted.schema_) if wanted is not None else None


def _describe_fields(schema: dict[str, Any]) -> None:
    """Add ignored and refused fields to the description of a body."""
    schema["additionalProperties"] = False
    for name, about in PASSED_OVER.items():
        schema["properties"][name] = {"description": f"Ignored: {about}."}
    for name, why in REFUSED.items():
        schema["properties"][name] = {"description": f"Refused: {why}."}


def _described(tool: AnthropicTool, where: str) -> dict[str, Any]:
    if tool.type not in (None, "custom") or tool.input_schema is None:
        raise RequestError(
            f"The tool {tool.name[:40]!r} has no input_schema; expected the description of a function: this "
            "server has no tools of its own.",
            where,
        )
    tool.refuse_more(where, TOOL_PASSED_OVER)
    if tool.allowed_callers and "direct" not in tool.allowed_callers:
        raise RequestError(
            f"The tool {tool.name[:40]!r} may only be called by code (allowed_callers), but this server runs none; "
            "add 'direct', or leave it out.",
            f"{where}.allowed_callers",
        )
    description = tool.description
    if tool.input_examples:
        examples = "\n".join(as_json(example) for example in tool.input_examples)
        description = f"{description or ''}\nExamples:\n{examples}".lstrip()
    return describe(tool.name, description, tool.input_schema)
