"""Types of the replies of OpenAI's chat completions, completions and models.

The type checker enforces them, and FastAPI describes them. Source: openai-python's types.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic cannot describe typing's own before Python 3.12

FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(TypedDict):
    """One of the most probable tokens at a position."""

    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(TopLogprob):
    """A token of an answer."""

    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """Log probabilities of an answer's tokens, without the reasoning."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """A function and its arguments, which are JSON in a string."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call that the model makes."""

    index: NotRequired[int]
    """In a stream only."""
    id: str
    type: Literal["function"]
    function: CalledFunction


class PromptDetails(TypedDict):
    """Parts of the prompt's tokens."""

    cached_tokens: int
    image_tokens: int


class CompletionDetails(TypedDict):
    """Parts of the answer's tokens."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    """Of the request's `prediction`: tokens that were checked and said."""
    rejected_prediction_tokens: int


class Usage(TypedDict):
    """Tokens of a request: the prompt once, the answers together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class RunningTimings(TypedDict):
    """How the time was spent so far, in milliseconds; llama-server's, not OpenAI's."""

    cache_n: int
    """Tokens of the prompt that were cached."""
    prompt_n: int
    """Tokens of the prompt that were computed: all but the cached ones."""
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float
    draft_n: NotRequired[int]
    """Guessed tokens that were checked, if any."""
    draft_n_accepted: NotRequired[int]


class Timings(RunningTimings):
    """How the time of an answer was spent."""

    image_ms: float
    """Decoding, cutting and encoding pictures."""
    first_token_ms: float
    """From the start of the request's preparation."""


class PromptProgress(TypedDict):
    """How much of a prompt was read; llama-server's."""

    total: int
    cache: int
    """Tokens that were cached."""
    processed: int
    """Cached and computed tokens."""
    time_ms: int


class Message(TypedDict):
    """A whole answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    """As Ollama calls it."""
    reasoning_content: NotRequired[str]
    """The same, as llama-server and vLLM call it."""
    tool_calls: NotRequired[list[ToolCall]]


class Choice(TypedDict):
    """One of the answers."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """Reply to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    timings: Timings
    """Of the first answer."""


class Delta(TypedDict, total=False):
    """What is added to an answer."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCall]


class ChunkChoice(TypedDict):
    """A piece of one of the answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
    """If asked for: null except in the last chunk."""
    timings: NotRequired[Timings | RunningTimings]
    """With the usage; without one, with the finish reason; with every piece if asked for."""
    prompt_progress: NotRequired[PromptProgress]
    """If asked for, before the answer."""


class TextLogprobs(TypedDict):
    """Log probabilities of a completion's tokens, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for a prompt's first token, which nothing precedes."""
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class TextChoice(TypedDict):
    """A completion, or a piece of it."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(TypedDict):
    """Reply to `POST /v1/completions`, and an event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: NotRequired[Usage | None]
    timings: NotRequired[Timings | RunningTimings]
    prompt_progress: NotRequired[PromptProgress]
    """Both as in chats."""


class ModelEntry(TypedDict):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """Reply to `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class InputTokens(TypedDict):
    """Tokens of a request that is not answered."""

    object: Literal["response.input_tokens"]
    input_tokens: int


def input_tokens(n: int) -> InputTokens:
    """A count of tokens."""
    return {"object": "response.input_tokens", "input_tokens": n}


class ErrorBody(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    """Reply to a request that failed."""

    error: ErrorBody
