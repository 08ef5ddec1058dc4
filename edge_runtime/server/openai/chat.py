"""OpenAI's API → `ChatCall`, and events → its replies; pure translation.

`requests` reads requests, `replies` writes replies; the responses API is in `responses`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_runtime.answers import Answer
from edge_runtime.generation.logprobs import TokenLogprobs
from edge_runtime.server import sse
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.constraints import fields_as_sent
from edge_runtime.server.fields.loose import Loose
from edge_runtime.server.fields.refused import with_warnings
from edge_runtime.server.inference import Answering, ChatCall
from edge_runtime.server.openai import reply_types as shapes
from edge_runtime.server.openai import responses
from edge_runtime.server.openai.chunks import ProgressReport, lines, one_call, whole_answers
from edge_runtime.server.openai.llama_server_facts import entry_fields, list_fields
from edge_runtime.server.openai.replies import (
    ChatChunks,
    TextCompletions,
    add_usage,
    chat_completion,
    usage,
)
from edge_runtime.server.openai.requests import ChatCompletionRequest, CompletionRequest
from edge_runtime.server.registry.catalog import Listed
from edge_runtime.server.replies import AnswerStreamResponse, begin, while_connected, whole
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import ServerState, State

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)
router.include_router(responses.router)

Described = dict[int | str, dict[str, Any]]
ERRORS: Described = {"4XX": {"model": shapes.ErrorReply}, "5XX": {"model": shapes.ErrorReply}}


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": shapes.ChatCompletion, "content": sse.DESCRIBED}, **ERRORS},
)
async def chat_completions(request: Request, state: State, body: ChatCompletionRequest) -> Response:
    """Answer a conversation, with pictures, documents and videos in it, whole or as a stream of chunks."""
    warnings = body.all_warnings()
    state.inference.check_answers(body.n_answers)
    call = ChatCall(
        body.model, body.conversation(), body.options(), n=body.n_answers, reports_progress=body.reports_progress
    )
    model = body.model or state.catalog.default
    with fields_as_sent(body.names()):
        if body.stream:
            chunks = ChatChunks(model, body.n_answers, include_usage=body.include_usage, max_calls=body.max_calls)
            answering = await begin(request, state.inference, call)
            report = ProgressReport(answering, times=bool(body.timings_per_token))
            stream = AnswerStreamResponse(answering, lambda events: lines(events, chunks, report), "sse", "openai")
            return with_warnings(stream, warnings)

        async def reply(answering: Answering) -> Response:
            return sse.body(chat_completion(await answering.whole(), model, max_calls=body.max_calls))

        return with_warnings(await whole(request, state.inference, call, reply), warnings)


@router.post(
    "/v1/chat/completions/input_tokens",
    response_model=None,
    responses={200: {"model": shapes.InputTokens}, **ERRORS},
)
async def input_tokens(request: Request, state: State, body: ChatCompletionRequest) -> Response:
    """Count the tokens of a conversation, its pictures included, without answering it, as in llama-server."""
    warnings = body.all_warnings()
    call = ChatCall(body.model, body.conversation(), body.prompt_options())
    with fields_as_sent(body.names()):
        n = await while_connected(request, state.inference.count_tokens(call))
    return with_warnings(sse.body(shapes.input_tokens(n)), warnings)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": shapes.TextCompletion, "content": sse.DESCRIBED}, **ERRORS},
)
async def completions(request: Request, state: State, body: CompletionRequest) -> Response:
    """Continue a text verbatim, without the chat template, as in llama-server and vLLM."""
    warnings, options, prompts = body.all_warnings(), body.options(), body.prompts
    state.inference.check_answers(body.n_answers)
    texts = TextCompletions(
        body.model or state.catalog.default,
        include_usage=body.include_usage,
        n_top=body.logprobs or 0,
    )
    calls = [_text_call(body, prompt, options) for prompt in prompts]
    with fields_as_sent(body.names()):
        if body.stream:
            answering = await begin(request, state.inference, one_call(calls))
            texts.echoed = [_echoed(body, prompts[0], answering)] * body.n_answers
            report = ProgressReport(answering, times=bool(body.timings_per_token))
            stream = AnswerStreamResponse(answering, lambda events: lines(events, texts, report), "sse", "openai")
            return with_warnings(stream, warnings)
        found = await while_connected(request, whole_answers(state.inference, calls))
    return with_warnings(_whole_texts(body, texts, found), warnings)


def _text_call(body: CompletionRequest, prompt: str | list[int], options: dict[str, Any]) -> ChatCall:
    text, ids = (prompt, {}) if isinstance(prompt, str) else ("", {"prompt_ids": prompt})
    return ChatCall(body.model, text, {**options, **ids}, n=body.n_answers, reports_progress=body.reports_progress)


def _echoed(body: CompletionRequest, prompt: str | list[int], answering: Answering) -> str:
    """The prompt to repeat before an answer."""
    if not body.echo:
        return ""
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(answering.use.model.tokenizer.token_bytes, prompt)).decode("utf-8", "replace")


def _whole_texts(
    body: CompletionRequest, texts: TextCompletions, found: Sequence[tuple[Answering, list[Answer]]]
) -> Response:
    """Answers to all prompts, numbered consecutively."""
    answers: list[Answer] = []
    echoed: list[str] = []
    scores: dict[int, list[TokenLogprobs]] = {}
    for prompt, (answering, of_prompt) in zip(body.prompts, found, strict=True):
        first = of_prompt[0].prompt_logprobs or []  # only the first answer carries the prompt's scores
        scores |= {len(answers) + i: first for i in range(len(of_prompt))}
        echoed += [_echoed(body, prompt, answering)] * len(of_prompt)
        answers += of_prompt
    return sse.body(texts.whole(answers, echoed, add_usage([usage(of_prompt) for _, of_prompt in found]), scores))


def _contexts(state: ServerState) -> dict[tuple[Path, ...], int]:
    """Files of the loaded models → tokens of their context."""
    return {slot.listed.files: slot.model.n_ctx for slot in state.registry.loaded() if slot.model is not None}


def _entry(listed: Listed, contexts: Mapping[tuple[Path, ...], int]) -> shapes.ModelEntry:
    entry: shapes.ModelEntry = {
        "id": listed.name,
        "object": "model",
        "created": int(listed.modified.timestamp()),
        "owned_by": "library",
    }
    entry.update(entry_fields(listed, contexts.get(listed.files)))  # type: ignore[typeddict-item]
    return entry


@router.get("/v1/models", response_model=None, responses={200: {"model": shapes.ModelList}, **ERRORS})
async def models(state: State) -> Response:
    """List the models of this machine."""
    contexts = _contexts(state)

    def listed() -> dict[str, Any]:
        found = state.catalog.all()
        data: shapes.ModelList = {"object": "list", "data": [_entry(item, contexts) for item in found]}
        return {**data, **list_fields(found)}

    return sse.body(await asyncio.to_thread(listed))


@router.get("/v1/models/{model:path}", response_model=None, responses={200: {"model": shapes.ModelEntry}, **ERRORS})
async def model(state: State, model: str) -> Response:
    """Describe one model; its name may contain slashes."""
    return sse.body(_entry(await asyncio.to_thread(state.catalog.find, model), _contexts(state)))


class EmbeddingsRequest(Loose):
    """Body of `POST /v1/embeddings`."""

    model: str | None = None
    input: Any = None


@router.post("/v1/embeddings", response_model=None, responses=ERRORS)
async def embeddings(state: State, body: EmbeddingsRequest) -> Response:
    """Refuse: the model makes no embeddings."""
    listed = await asyncio.to_thread(state.catalog.find, body.model)
    raise RequestError(
        f"{listed.name} answers questions and makes no embeddings; use a model made for them on another server.",
        "model",
    )
