"""Requests of OpenAI's chat completions and completions → a conversation and options of `Model.submit`.

Enters: the body, checked by pydantic. Leaves: messages for `edge_runtime.inputs.messages` and keyword arguments for
`Model.submit`. Knows neither models nor connections. Other fields are handled in
`fields.refused`.

Source: openai-python's types; extensions of llama-server, vLLM and Ollama that clients send in `extra_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt

from edge_runtime.server.content_parts import content_parts
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.constraints import ResponseFormat
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.fields.refused import OF_CHAT, OF_COMPLETIONS
from edge_runtime.server.fields.sampling import Effort, SamplingFields, length, reasoning_options
from edge_runtime.server.fields.thinking import thinking_options
from edge_runtime.server.fields.tools import called, given
from edge_runtime.server.openai.conversations import ConversationFields

MAX_PROMPTS = 32
# Clients that want no limit send -1, as to llama-server.
MaxTokens = Annotated[int, Field(ge=-1)]
Ids = Annotated[list[StrictInt], Field(min_length=1)]


class StreamOptions(Loose):
    """What a stream contains besides the answer."""

    include_usage: bool | None = None


class ChatMessage(Loose):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class CompletionFields(SamplingFields):
    """What chat completions and completions have in common."""

    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: MaxTokens | None = None
    n_predict: int | None = Field(None, ge=-2, description="The same, as llama-server has it.")
    response_format: ResponseFormat | None = None

    @property
    def n_answers(self) -> int:
        """How many answers each prompt gets."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def names(self) -> dict[str, str]:
        """Options of `Model.submit` → fields of this request, for errors."""
        _, form = self._form()
        return {**super().names(), **form, "max_tokens": self._limit()[1] or "max_tokens"}

    def _limit(self) -> tuple[int | None, str | None]:
        return length(("n_predict", self.n_predict), ("max_tokens", self.max_tokens))

    def _form(self) -> tuple[dict[str, Any], dict[str, str]]:
        wanted = self.response_format.options() if self.response_format is not None else {}
        return self.form(("response_format", wanted))


class PredictedPart(BaseModel):
    """A part of a predicted answer."""

    type: Literal["text"]
    text: str


class Prediction(BaseModel):
    """A predicted answer, as OpenAI's `ChatCompletionPredictionContentParam`."""

    type: Literal["content"]
    content: str | list[PredictedPart]

    @property
    def text(self) -> str:
        """All of it."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(CompletionFields, ConversationFields):
    """Body of `POST /v1/chat/completions`."""

    flat_functions = False

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Only `enable_thinking` is read.")
    enable_thinking: bool | None = Field(None, description="The same, as Qwen's servers have it.")
    think: bool | str | None = Field(None, description="A switch or a level, as Ollama has it.")
    thinking_token_budget: int | None = Field(
        None, ge=-1, description="The same as `thinking_budget`, as vLLM has it."
    )
    thinking_budget_tokens: int | None = Field(None, ge=-1, description="The same, as llama-server has it.")
    continue_final_message: bool | None = Field(
        None, description="Whether a final assistant message is continued; null: it is, as in llama-server."
    )
    add_generation_prompt: bool | None = None
    prediction: Prediction | None = Field(
        None, description="What the answer will probably be, with changes; its tokens are checked several at a time."
    )

    def _limit(self) -> tuple[int | None, str | None]:
        return length(
            ("max_completion_tokens", self.max_completion_tokens),
            ("n_predict", self.n_predict),
            ("max_tokens", self.max_tokens),
        )

    def _reasoning(self) -> dict[str, Any]:
        kwargs = {name: value for name, value in (self.chat_template_kwargs or {}).items() if value is not None}
        switch = kwargs.pop("enable_thinking", None)
        if kwargs:
            name = next(iter(kwargs))[:60]
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which the template does not know; expected enable_thinking.",
                f"chat_template_kwargs.{name}",
            )
        if not isinstance(switch, bool | None):
            raise RequestError(
                f"enable_thinking is of type {type(switch).__name__}; expected true or false.",
                "chat_template_kwargs.enable_thinking",
            )
        switch = self.enable_thinking if switch is None else switch
        budgets = (self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens)
        budget = next((number for number in budgets if number is not None and number >= 0), None)
        if self.think is not None and switch is None:
            wanted = thinking_options(self.think)
            limit = budget if budget is not None else wanted.get("thinking_budget")
            return given(thinking=bool(wanted), thinking_budget=limit)
        return reasoning_options(self.reasoning_effort or self.effort, budget, switch)

    def _continuing(self) -> dict[str, Any]:
        """Whether the last message is continued; a prompt must not end after it without a new turn."""
        if self.add_generation_prompt is False and self.continue_final_message is not True:
            raise RequestError(
                "add_generation_prompt is false, but then no turn would follow; to continue the last message, "
                "set continue_final_message to true.",
                "add_generation_prompt",
            )
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true, which contradict each other; leave "
                "one of them out.",
                "continue_final_message",
            )
        return given(continue_final_message=self.continue_final_message)

    def conversation(self) -> list[dict[str, Any]]:
        """Messages as `edge_runtime.inputs.messages` takes them.

        Raises
        ------
        RequestError
            Names the message whose content is malformed.
        """
        return [_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]

    def all_warnings(self) -> list[str]:
        """Sentences about what was passed over; what must not be is refused.

        Raises
        ------
        RequestError
            Naming the field.
        """
        return [*self.warnings(OF_CHAT), *self.offered_tools()[1]]

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When tools or the form of the answer are described in a way that cannot be used.
        """
        most, name = self._limit()
        if most == 0:
            raise RequestError(f"{name} is 0; expected a positive whole number, or -1 for no limit.", name)
        return super().options() | given(
            max_tokens=most,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            expected_text=None if self.prediction is None else self.prediction.text,
            **self._reasoning(),
            **self._form()[0],
            **self._continuing(),
        )


class CompletionRequest(CompletionFields):
    """Body of `POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Texts to continue, or their token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return [*self.prompt]

    def all_warnings(self) -> list[str]:
        """Sentences about what was passed over; what must not be is refused.

        Raises
        ------
        RequestError
            Naming the field.
        """
        return self.warnings(OF_COMPLETIONS)

    def options(self) -> dict[str, Any]:
        """Arguments of `Model.submit`.

        Raises
        ------
        RequestError
            When the request asks for something that this server does not do.
        """
        if self.suffix:
            raise RequestError(
                "suffix was given, but the model cannot fill in text before a suffix; leave it out.", "suffix"
            )
        if self.best_of is not None and self.best_of != self.n_answers:
            raise RequestError(
                f"best_of is {self.best_of}, but n is {self.n_answers}; this server returns every answer: "
                "make them equal, and choose by the log probabilities.",
                "best_of",
            )
        scores_prompt = bool(self.echo) and self.logprobs is not None
        if scores_prompt and self.stream:
            raise RequestError(
                "echo and logprobs were given with stream, but the prompt's log probabilities come only with a "
                "whole reply; leave one of them out.",
                "stream",
            )
        most, name = self._limit()
        form = self._form()[0]
        if most == 0 and form:
            raise RequestError(f"{name} is 0, so no answer can have the requested form; raise it.", name)
        return self.sampling_options() | given(
            raw=True,
            max_tokens=most or None,
            prompt_only=most == 0 or None,
            logprobs=None if self.logprobs is None else True,
            top_logprobs=self.logprobs,
            prompt_logprobs=scores_prompt or None,
            **form,
        )


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
