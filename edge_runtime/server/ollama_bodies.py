"""Bodies of requests to Ollama's API. Fields that are not named here are let through and ignored, as Ollama does."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Named(_Body):
    """A request about a model; older clients call its name `name`."""

    model: str = ""
    name: str = ""

    @property
    def wanted(self) -> str:
        """The name, whatever it is called."""
        return self.model or self.name


class _Answered(_Named):
    """What /api/chat and /api/generate have in common."""

    stream: bool | None = None
    format: Any = None
    options: dict[str, Any] | None = None
    keep_alive: Annotated[float, Strict()] | str | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class ChatBody(_Answered):
    """Body of /api/chat."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class GenerateBody(_Answered):
    """Body of /api/generate."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
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
