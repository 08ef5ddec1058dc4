"""`RemoteModel`: `Model`'s public interface, with the answers of a server. Made by `Model.connect`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, Unpack, overload

from edge_runtime.answers import Answer, AnswerStream, AsyncAnswer, results
from edge_runtime.engine.events import Finished
from edge_runtime.errors import EndpointError, MessageError
from edge_runtime.generation.logprobs import TokenLogprobs
from edge_runtime.inputs.mistaken_paths import refuse_mistaken_paths
from edge_runtime.option_checks import ModelLimits
from edge_runtime.options import GenerationKeywords, GenerationOptions
from edge_runtime.remote.address import parse_address
from edge_runtime.remote.connection import Connection, Patience
from edge_runtime.remote.conversation import Conversation, translate
from edge_runtime.remote.dialects import Dialect, dialect_named, owner_of
from edge_runtime.remote.replies import Reader
from edge_runtime.remote.requests import LIMITS, checked, request_fields
from edge_runtime.structured_output.tools import chosen_functions

logger = logging.getLogger("edge_runtime")
MAX_SEED = 1 << 63
"""Seeds are signed in most servers."""


@dataclass(frozen=True)
class _Asked:
    """What is known of an answer when its request is sent."""

    conversation: Conversation
    options: GenerationOptions
    started: float
    image_s: float


class RemoteModel:
    """A model on a server. It answers from any thread, many requests in parallel; `close` it, or use it in a `with`.

    What only a loaded model has (visual tokens, logits, prompts, adapters) is missing; options that the server has no
    field for are refused by name.
    """

    is_remote = True
    is_toy = False
    uses_amx_prefill = False
    load_s = 0.0
    """A remote model is not loaded."""

    def __init__(self, connection: Connection, dialect: Dialect, name: str | None, n_ctx: int) -> None:
        self._connection = connection
        self.dialect = dialect
        """What the server understands."""
        self._model = name
        self.n_ctx = n_ctx
        """Context length in tokens, as the server tells; 0 if it does not."""

    @classmethod
    def connect(
        cls,
        url: str,
        model: str | None = None,
        *,
        dialect: str | None = None,
        key: str | None = None,
        patience: Patience | None = None,
    ) -> Self:
        """Connect to a server; see `Model.connect`."""
        address = parse_address(url, key)
        for warning in address.warnings():
            logger.warning(warning)
        connection = Connection(address, patience or Patience())
        try:
            listed = _listed(connection.get(f"{address}/models"))
            found = dialect_named(dialect) if dialect is not None else _recognised(connection, listed)
            if found.name == "vllm":
                found = dialect_named("vllm", _version(connection))
            name = model or _only(listed, found, address.host)
        except BaseException:
            connection.close()
            raise
        entry = next((entry for entry in listed if entry["id"] == name), listed[0] if listed and name is None else {})
        return cls(connection, found, name, _n_ctx(entry))

    @property
    def name(self) -> str:
        """What the server calls the model; `default` if it chooses one itself."""
        return self._model or "default"

    @property
    def url(self) -> str:
        """The address of the server's API."""
        return str(self._connection.address)

    @property
    def limits(self) -> ModelLimits:
        """What options are held against here; the server has limits of its own."""
        return LIMITS

    def check_usable(self) -> None:
        """It is, as far as this process knows."""

    def __repr__(self) -> str:
        return f"RemoteModel({self.url!r}, {self.name!r}, dialect={self.dialect.name!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(
            f"A model on a server has no {name!r}; load it on this machine with Model.load for that."
        )

    @overload
    def chat(
        self, messages: str | Sequence[Any], *, stream: Literal[False] = False, **options: Unpack[GenerationKeywords]
    ) -> Answer: ...
    @overload
    def chat(
        self, messages: str | Sequence[Any], *, stream: Literal[True], **options: Unpack[GenerationKeywords]
    ) -> AnswerStream: ...
    def chat(
        self, messages: str | Sequence[Any], *, stream: bool = False, **options: Unpack[GenerationKeywords]
    ) -> Answer | AnswerStream:
        """Answer a conversation; as `Model.chat`.

        Raises
        ------
        MessageError, ImageError
            Before anything is sent.
        EndpointError, PromptTooLongError
            When the server refuses, fails or breaks off; `received` is what had arrived.
        """
        (answering,) = self._submit(messages, 1, options)
        return answering if stream else answering.result()

    @overload
    def chat_n(
        self,
        messages: str | Sequence[Any],
        n: int,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerationKeywords],
    ) -> list[Answer]: ...
    @overload
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: Literal[True], **options: Unpack[GenerationKeywords]
    ) -> list[AnswerStream]: ...
    def chat_n(
        self, messages: str | Sequence[Any], n: int, *, stream: bool = False, **options: Unpack[GenerationKeywords]
    ) -> list[Answer] | list[AnswerStream]:
        """Several answers to one conversation, in parallel requests; as `Model.chat_n`. Pictures are read once."""
        answering = self._submit(messages, n, options)
        return answering if stream else results(answering)

    def achat(self, messages: str | Sequence[Any], **options: Unpack[GenerationKeywords]) -> AsyncAnswer:
        """Answer a conversation in an event loop; as `Model.achat`."""
        return AsyncAnswer(lambda streaming, options: self._submit(messages, 1, options)[0], options)

    def submit(
        self, messages: str | Sequence[Any], *, n: int = 1, **options: Unpack[GenerationKeywords]
    ) -> list[AnswerStream]:
        """Start answers to a conversation and return at once; as `Model.submit`."""
        started = time.perf_counter()
        asked, hooks = GenerationOptions.of({**options, "n": n})
        asked = checked(asked, self.dialect, self.limits)
        conversation = translate(messages, self.dialect, asked, hooks)
        address = self._connection.address
        fields: dict[str, Any] = {} if self._model is None else {"model": self._model}
        fields |= {"messages": conversation.messages}
        fields |= request_fields(asked, self.dialect, conversation.begun, host=address.base.host)
        if self.dialect.name == "vllm" and conversation.seen.videos:  # all frames that were sent, not 32 of them
            fields["media_io_kwargs"] = {"video": {"num_frames": -1}}
        known = _Asked(conversation, asked, started, time.perf_counter() - started)
        return [self._send(fields, known, i) for i in range(n)]

    def _submit(self, messages: str | Sequence[Any], n: int, options: Mapping[str, Any]) -> list[AnswerStream]:
        if "n" in options:
            raise MessageError(f"n is {options['n']!r}, but chat gives one answer; call chat_n.")
        refuse_mistaken_paths(messages)
        return self.submit(messages, n=n, **options)

    def _send(self, fields: dict[str, Any], known: _Asked, i: int) -> AnswerStream:
        if known.options.seed is not None:
            fields = fields | {"seed": (known.options.seed + i) % MAX_SEED}
        thinking = known.options.thinking and (
            known.conversation.begun is None or known.conversation.begun.is_reasoning
        )
        reader = Reader(
            thinking=thinking and not self.dialect.is_ours,
            stop=known.options.stop,
            title=self._connection.address.host,
            must_call=chosen_functions(known.options.tools, known.options.tool_choice) is not None,
        )
        running = self._connection.answer(json.dumps(fields).encode("ascii"), reader)
        return AnswerStream(running, partial(_finish, self.name, known, reader))

    def close(self) -> None:
        """Cancel all answers and close all connections."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _finish(
    name: str,
    known: _Asked,
    reader: Reader,
    text: str,
    reasoning: str | None,
    scores: list[TokenLogprobs],
    end: Finished,
) -> Answer:
    """The answer, when the server has finished it."""
    seen, begun, usage = known.conversation.seen, known.conversation.begun, reader.usage
    times = {"load": 0.0, "image": known.image_s, **end.timings_s, "total": time.perf_counter() - known.started}
    if times.get("first_token"):
        times["first_token"] += known.image_s
    return Answer(
        answer=text,
        reasoning=reasoning,
        finish_reason=end.reason,
        model=name,
        prompt_tokens=usage.prompt_tokens,
        visual_tokens=usage.visual_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=end.completion_tokens,
        slices=[],
        stop_string=end.stop_string,
        pictures=seen.pictures if seen.is_known else [],
        videos=seen.videos,
        timings_s={name: round(seconds, 6) for name, seconds in times.items()},
        logprobs=scores if known.options.logprobs else None,
        reasoning_tokens=end.reasoning_tokens,
        prefix=begun.content if begun else "",
        reasoning_prefix=begun.reasoning if begun else "",
    )


def _listed(found: Any) -> list[dict[str, Any]]:
    """Entries of a list of models; none if it is something else."""
    entries = found.get("data") if isinstance(found, Mapping) else None
    if not isinstance(entries, list):
        return []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]


def _recognised(connection: Connection, listed: Sequence[Mapping[str, Any]]) -> Dialect:
    """Find out what kind of server it is: its list of models tells, or our version at Ollama's route."""
    for entry in listed:
        if name := owner_of(entry):
            return dialect_named(name)
    try:
        found = connection.get(f"{connection.address.root}/api/version")
    except EndpointError:  # the list was answered, so it is there; it has no such route
        found = None
    version = found.get("version") if isinstance(found, Mapping) else None
    return dialect_named("edge-runtime" if "-edge-runtime-" in str(version) else "openai")


def _version(connection: Connection) -> str:
    """The version of a vLLM; empty if it does not tell."""
    try:
        found = connection.get(f"{connection.address.root}/version")
    except EndpointError:
        return ""
    return str(found.get("version", "")) if isinstance(found, Mapping) else ""


def _only(listed: Sequence[Mapping[str, Any]], dialect: Dialect, host: str) -> str | None:
    """The model to ask when none is named: the server's default, its first, or its only one.

    Raises
    ------
    MessageError
        When there are several and nothing says which.
    """
    if dialect.is_ours:
        return None
    if not listed:
        raise MessageError(f"{host} lists no models; name the one to ask.")
    if dialect.name == "openai" and len(listed) > 1:
        shown = ", ".join(str(entry["id"]) for entry in listed[:8])
        raise MessageError(f"{host} has {len(listed)} models; name the one to ask: {shown}, ...")
    return str(listed[0]["id"])


def _n_ctx(entry: Mapping[str, Any]) -> int:
    """Context length from an entry of the list: vLLM's and SGLang's name for it, llama-server's, or ours."""
    meta = entry.get("meta")
    candidates = (
        entry.get("max_model_len"),
        meta.get("n_ctx") if isinstance(meta, Mapping) else None,
        meta.get("n_ctx_train") if isinstance(meta, Mapping) else None,
    )
    return next((value for value in candidates if isinstance(value, int) and value > 0), 0)
