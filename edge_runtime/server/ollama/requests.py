"""Bodies of requests to Ollama's API.

Unknown fields are ignored, as in Ollama, unless they constrain the answer: then they are refused by name, since an
answer that ignores one would look like one that follows it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, Strict

from edge_runtime.server.errors import RequestError

MAX_TOP_LOGPROBS = 20


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Named(_Body):
    """A request about a model; older clients name it under `name`."""

    model: str = ""
    name: str = ""

    @property
    def wanted(self) -> str:
        """The model's name, from either field."""
        return self.model or self.name


_AS_FORMAT = "send the schema as format"
_AS_OPTION = "it belongs in options"
BINDING = {
    **dict.fromkeys(
        ("schema", "json_schema", "response_format", "structured_outputs", "guided_json", "output_format"), _AS_FORMAT
    ),
    **dict.fromkeys(
        ("grammar", "guided_grammar", "guided_regex", "guided_choice"),
        "answers can follow a JSON schema (format) but no other grammar",
    ),
    **dict.fromkeys(("stop", "num_predict", "n_predict", "max_slices", "image_max_tokens"), _AS_OPTION),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "it belongs in options, as num_predict"),
    **dict.fromkeys(("logit_bias", "bad_words"), "tokens cannot be forced or forbidden here"),
    **dict.fromkeys(("n", "best_of"), "a request gets one answer; send it again for more"),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_effort"), "send think"),
    "adapter": "name a model that was made with it",
}
"""Fields of other APIs, and options beside `options`: what to do instead."""


class _Answered(_Named):
    """What /api/chat and /api/generate have in common."""

    model_config = ConfigDict(extra="allow")
    elsewhere: ClassVar[dict[str, str]] = {}
    """Fields of the other route: what to do instead."""

    stream: bool | None = None
    format: Any = None
    options: dict[str, Any] | None = None
    keep_alive: Annotated[float, Strict()] | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    truncate: bool | None = None
    """Whether a conversation that does not fit loses its oldest turns (the default) or is refused."""
    shift: bool | None = None
    """Ignored: answers that reach the end of the context end there, and say so (`length`)."""
    debug_render_only: bool | None = Field(None, alias="_debug_render_only")

    def refuse_what_binds(self) -> None:
        """Refuse unknown fields that constrain the answer.

        Raises
        ------
        RequestError
            Names the field.
        """
        for name, value in (self.model_extra or {}).items():
            instead = self.elsewhere.get(name) or BINDING.get(name)
            if instead and value not in (None, "", [], {}, False):
                raise RequestError(f"{name} was given, which this route cannot follow: {instead}.", name)
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}; expected a number from 0 to {MAX_TOP_LOGPROBS}.",
                "top_logprobs",
            )


class ChatBody(_Answered):
    """Body of /api/chat."""

    elsewhere: ClassVar[dict[str, str]] = {
        "prompt": "send it as the last of messages, or to /api/generate",
        "images": "they belong in the messages that they are about",
        "suffix": "the model cannot fill in text before a suffix",
        "template": "prompts are made with the model's own template",
        "raw": "raw prompts go to /api/generate",
        "context": "send the turns as messages, or the ids to /api/generate",
        "functions": "send tools",
    }
    messages: list[dict[str, Any]] | None = None
    system: str | None = None
    """Not a field of Ollama's /api/chat, but Open WebUI sends it: put before the messages unless they contain it."""
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    """Not a field of Ollama's: as in OpenAI's API."""
    continue_final_message: bool | None = None
    """Not a field of Ollama's: whether a final assistant message is continued (None: it is) or closed."""


class GenerateBody(_Answered):
    """Body of /api/generate."""

    elsewhere: ClassVar[dict[str, str]] = {
        "messages": "conversations go to /api/chat",
        "tools": "tools are supported by /api/chat only",
        "tool_choice": "tools are supported by /api/chat only",
        "functions": "tools are supported by /api/chat only",
        "continue_final_message": "conversations go to /api/chat",
        **dict.fromkeys(("width", "height", "steps"), "the model writes text and generates no pictures"),
    }
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[Annotated[int, Strict()]] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class ShowBody(_Named):
    """Body of /api/show."""

    verbose: bool | None = None
    system: str | None = None
    template: str | None = None


class PullBody(_Named):
    """Body of /api/pull."""

    stream: bool | None = None
    insecure: bool | None = None


class DeleteBody(_Named):
    """Body of /api/delete."""


class CopyBody(_Body):
    """Body of /api/copy."""

    source: str
    destination: str


class EmbedBody(_Named):
    """Body of /api/embed and /api/embeddings."""

    input: Any = None
    prompt: Any = None


class CreateBody(_Named):
    """Body of /api/create."""

    stream: bool | None = None
    source: str | None = Field(None, alias="from")
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    quantize: str | None = None
    modelfile: str | None = None
    path: str | None = None
