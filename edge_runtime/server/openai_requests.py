"""Requests of OpenAI's chat completions and completions → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic; fields that are not named here are ignored, as servers of local models do.
Leaves: messages for `edge_runtime.messages` and keyword arguments for `Model.submit`. Knows neither models nor
connections.

Source: openai-python's types; extensions of llama-server, vLLM and Ollama that clients send in `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from edge_runtime.sampling import MAX_SEED
from edge_runtime.server.errors import RequestError
from edge_runtime.server.ollama_options import THINKING_LEVELS
from edge_runtime.server.openai_tools import called, choose_tools, describe, given
from edge_runtime.server.parts import content_parts

MOST_STOPS = 64
MOST_PROMPTS = 16
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
EFFORTS_WITHOUT_REASONING = ("none", "minimal")
Stop = str | Annotated[list[str], Field(max_length=MOST_STOPS)]
# Clients that want "as many as there are" write -1, as llama-server takes it.
MaxTokens = Annotated[int, Field(ge=-1)]


class Loose(BaseModel):
    """A body, or a part of one, whose further fields are ignored."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _as_it_is_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would turn into a number or a truth value: `false` is not 0, and "1" is neither."""
        assert info.field_name is not None
        wanted = _plain_types(cls.model_fields[info.field_name].annotation)
        if value is None or not wanted or not wanted <= {bool, int, float}:
            return value
        is_right = isinstance(value, bool) if wanted == {bool} else isinstance(value, int | float)
        if not is_right or (isinstance(value, bool) and bool not in wanted):
            raise ValueError(f"expected {'true or false' if wanted == {bool} else 'a number'}")
        return value


def _plain_types(annotation: Any) -> set[Any]:
    """What a value may be, apart from null: int and float of `Annotated[int, ...] | float | None`."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _plain_types(part)} - {NoneType}
    return {annotation}


class Function(Loose):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    """A tool; functions are the only kind."""

    type: str = "function"
    function: Function | None = None


class JsonSchema(Loose):
    """The schema of an answer."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Loose):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="Of json_object, as llama-server has it."
    )


class StreamOptions(Loose):
    """What a stream brings besides the answer."""

    include_usage: bool | None = None


class Reasoning(Loose):
    """About reasoning."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Ignored: the reasoning itself is told."
    )


class ChatMessage(Loose):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class SamplingFields(Loose):
    """How tokens are chosen and when an answer ends; common to both kinds of completions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: MaxTokens | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 keep all tokens.")
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: Stop | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def n_answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_options(self) -> dict[str, Any]:
        """Arguments of `Model.submit` that both kinds have in common, but for `n`."""
        return given(
            max_tokens=limit(self.max_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=None if self.top_k is None else max(self.top_k, 0),
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed % MAX_SEED,
            stop=stops(self.stop),
            logit_bias=self.logit_bias,
        )


class ChatCompletionRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, description="OpenAI's older form, which is refused; use `tools`.")
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = Field(
        None, description="The same in the form of responses, as Ollama takes it too."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="`enable_thinking` is looked at.")
    thinking_budget: int | None = Field(None, ge=0, description="Most tokens of reasoning.")
    max_slices: int | None = Field(None, ge=1, description="Most cells that a picture is cut into.")

    @property
    def most_calls(self) -> int | None:
        """1 where the client takes one call at a time."""
        return 1 if self.parallel_tool_calls is False else None

    def _reasoning(self) -> dict[str, Any]:
        switch = (self.chat_template_kwargs or {}).get("enable_thinking")
        if not isinstance(switch, bool | None):
            raise RequestError(
                f"enable_thinking is of type {type(switch).__name__}; expected true or false.",
                "chat_template_kwargs.enable_thinking",
            )
        effort = self.reasoning_effort or (self.reasoning.effort if self.reasoning is not None else None)
        return reasoning_options(effort, self.thinking_budget, switch)

    def conversation(self) -> list[dict[str, Any]]:
        """Messages as `edge_runtime.messages` takes them.

        Raises
        ------
        RequestError
            Naming the message whose content has the wrong form.
        """
        return [_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When tools or the form of the answer are described in a way that cannot be used.
        """
        if self.functions:
            raise RequestError(
                "functions is OpenAI's older form, which this server does not read; describe them under 'tools'.",
                "functions",
            )
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        tools, choice = choose_tools(
            [_described(tool, f"tools[{number}]") for number, tool in enumerate(self.tools or [])], self.tool_choice
        )
        return self.sampling_options() | given(
            max_tokens=limit(most),
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            max_slices=self.max_slices,
            tools=tools or None,
            tool_choice=choice,
            **self._reasoning(),
            **_form(self.response_format),
        )


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @property
    def prompts(self) -> list[str]:
        """Texts to be continued."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When something is asked for that this server does not do.
        """
        if self.suffix:
            raise RequestError(
                "suffix was given, but the model cannot write what stands between two texts; leave it out.", "suffix"
            )
        if self.best_of is not None and self.best_of > self.n_answers:
            raise RequestError(
                f"best_of is {self.best_of}, but n is {self.n_answers}; this server returns every answer it makes: "
                "make them equal, and choose by the log probabilities.",
                "best_of",
            )
        return self.sampling_options() | given(
            raw=True, logprobs=None if self.logprobs is None else True, top_logprobs=self.logprobs
        )


def limit(max_tokens: int | None) -> int | None:
    """Most tokens; None where the client leaves it to the server."""
    return None if max_tokens == -1 else max_tokens


def stops(stop: str | list[str] | None) -> list[str] | None:
    """Stop strings as a list."""
    return [stop] if isinstance(stop, str) else stop


def reasoning_options(effort: Effort | None, budget: int | None, switch: bool | None = None) -> dict[str, Any]:
    """Arguments of `Model.submit` about reasoning.

    Parameters
    ----------
    effort : the levels that Ollama has limit it as there, those above do not; without one the model does not reason.
    budget : most tokens, if the client said so.
    switch : what the template is told, which comes before the effort.
    """
    thinking = effort not in (None, *EFFORTS_WITHOUT_REASONING) if switch is None else switch
    limit = THINKING_LEVELS.get(effort) if effort is not None and thinking else None
    return given(thinking=thinking, thinking_budget=budget if budget is not None else limit)


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": content_parts(message.content, f"{where}.content"),
        **given(
            reasoning_content=message.reasoning_content or message.reasoning,
            tool_calls=[
                _call(call, f"{where}.tool_calls[{number}]") for number, call in enumerate(message.tool_calls or [])
            ]
            or None,
        ),
    }


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A call of an earlier turn; its arguments are JSON in a string, but some clients send the object."""
    function = call.get("function")
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("arguments", ""), str | Mapping)
    ):
        raise RequestError(
            'The tool call has no function; expected {"type": "function", "function": {"name": ..., "arguments": '
            '"{...}"}}.',
            where,
        )
    return called(function["name"], function.get("arguments", ""))


def _described(tool: Tool, where: str) -> dict[str, Any]:
    if tool.type != "function" or tool.function is None:
        raise RequestError(
            f"The tool is of type {tool.type[:40]!r} or describes no function; expected "
            '{"type": "function", "function": {"name": ..., "parameters": {...}}}.',
            where,
        )
    function = tool.function
    return describe(function.name, function.description, function.parameters)


def _form(wanted: ResponseFormat | None) -> dict[str, Any]:
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json": True} if wanted.schema_ is None else {"schema": wanted.schema_}
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    if schema is None:
        raise RequestError(
            'response_format has no schema; expected {"type": "json_schema", "json_schema": {"name": ..., "schema": '
            "{...}}}.",
            "response_format.json_schema",
        )
    return {"schema": schema}
