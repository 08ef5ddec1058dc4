"""llama-server's own routes, and OpenAI's without `/v1`, as its clients call them; pure translation.

`llama_server_requests` reads requests, `llama_server_replies` writes replies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from edge_runtime.generation.sampling import MAX_NEW_TOKENS
from edge_runtime.model import Model
from edge_runtime.server import sse
from edge_runtime.server.errors import NotOffered
from edge_runtime.server.fields.constraints import fields_as_sent
from edge_runtime.server.fields.refused import with_warnings
from edge_runtime.server.inference import ChatCall
from edge_runtime.server.openai.chunks import ProgressReport, lines, one_call, whole_answers
from edge_runtime.server.openai.llama_server_facts import MEDIA_MARKER, props, sampling_settings
from edge_runtime.server.openai.llama_server_replies import LlamaCompletions
from edge_runtime.server.openai.llama_server_requests import LlamaCompletionRequest, TextReader
from edge_runtime.server.openai.requests import ChatCompletionRequest
from edge_runtime.server.replies import AnswerStreamResponse, begin, while_connected
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import State

router = APIRouter(tags=["llama-server"], route_class=JSONRoute)

WITHOUT_VERSION = frozenset(
    f"/v1/{name}"
    for name in ("chat/completions", "chat/completions/input_tokens", "models", "responses", "responses/input_tokens")
)
"""Routes that llama-server also has without `/v1`; its `/completions` differs from OpenAI's."""
_PICTURE = re.compile(r"(?:<image_id>\d+</image_id>)?<image>(?:<unk>)+</image>(?:(?:\n?<slice>(?:<unk>)+</slice>)*)")


def without_version(*routers: APIRouter) -> APIRouter:
    """The routes of these routers that llama-server also has without `/v1`."""
    found = APIRouter(route_class=JSONRoute)
    for route in [route for router in routers for route in router.routes]:
        if isinstance(route, APIRoute) and route.path in WITHOUT_VERSION:
            found.add_api_route(
                route.path.removeprefix("/v1"),
                route.endpoint,
                methods=[*(route.methods or ())],
                response_model=None,
                include_in_schema=False,
            )
    return found


@router.post("/completion", response_model=None, responses={200: {"content": sse.DESCRIBED}})
@router.post("/completions", response_model=None, responses={200: {"content": sse.DESCRIBED}})
async def completion(request: Request, state: State, body: LlamaCompletionRequest) -> Response:
    """Continue a prompt verbatim: text, token ids, pictures at their marks; whole or as a stream."""
    warnings = body.all_warnings()
    state.inference.check_answers(body.n_answers)
    async with state.registry.use(body.model) as use:  # reading the prompt needs its vocabulary
        name, most = body.model or use.listed.name, state.settings.max_tokens

        def read(check: Callable[[], None]) -> tuple[list[ChatCall], LlamaCompletions]:
            reader = TextReader(use.model.tokenizer, use.model.n_ctx, check)
            return body.calls(reader), _replies(body, use.model, reader, name, most)

        calls, replies = await while_connected(request, state.inference.read(read))
        with fields_as_sent(body.names()):
            if body.stream:
                answering = await begin(request, state.inference, one_call(calls))
                report = ProgressReport(answering, times=bool(body.timings_per_token))
                replies.progress = lambda: answering.progress
                stream = AnswerStreamResponse(
                    answering, lambda events: lines(events, replies, report, last=""), "sse", "llama"
                )
                return with_warnings(stream, warnings)
            whole = await while_connected(request, whole_answers(state.inference, calls))
    answers = [answer for _, of_prompt in whole for answer in of_prompt]
    found = [replies.whole(index, answer, body.response_fields or ()) for index, answer in enumerate(answers)]
    is_list = isinstance(body.prompt, list) and len(calls) > 1
    return with_warnings(sse.body(found if is_list or len(found) > 1 else found[0]), warnings)


def _replies(
    body: LlamaCompletionRequest, model: Model, reader: TextReader, name: str, max_tokens: int
) -> LlamaCompletions:
    options, texts = body.settings(reader), body.texts(reader)
    most = min(MAX_NEW_TOKENS if body.most_tokens is None else body.most_tokens, max_tokens)
    settings = sampling_settings(options) | {
        "n_predict": most,
        "max_tokens": most,
        "stop": [body.stop] if isinstance(body.stop, str) else body.stop or [],
        "ignore_eos": bool(body.ignore_eos),
        "stream": bool(body.stream),
        "n_probs": body.n_top,
        "logit_bias": _biases(options.logit_bias, body, model),
        "grammar": body.grammar if isinstance(body.grammar, str) else "",
        "timings_per_token": bool(body.timings_per_token),
        "post_sampling_probs": False,
    }
    return LlamaCompletions(
        name,
        settings,
        [text for text in texts for _ in range(body.n_answers)],
        model.n_ctx,
        n_top=body.n_top,
        returns_ids=body.returns_ids,
    )


def _biases(pairs: Iterable[tuple[int, float]], body: LlamaCompletionRequest, model: Model) -> list[dict[str, Any]]:
    """What is added to logits; null stands for minus infinity: tokens that are never chosen."""
    never = sorted(model.tokenizer.stop_ids) if body.ignore_eos else []
    return [{"token": token, "bias": bias} for token, bias in pairs] + [
        {"token": token, "bias": None} for token in never
    ]


@router.post("/apply-template", response_model=None)
async def apply_template(request: Request, state: State, body: ChatCompletionRequest) -> Response:
    """Render the prompt of a conversation, with a mark for each picture; nothing is computed."""
    warnings = body.all_warnings()
    call = ChatCall(body.model, body.conversation(), body.prompt_options())
    with fields_as_sent(body.names()):
        prompt = await while_connected(request, state.inference.build_prompt(call))
    text = _PICTURE.sub(MEDIA_MARKER, prompt.text) if prompt.bounds else prompt.text
    return with_warnings(sse.body({"prompt": text}), warnings)


@router.get("/props", response_model=None)
async def get_props(state: State, model: str | None = None) -> Response:
    """Properties and capabilities of a model; loads it if needed."""
    async with state.registry.use(model) as use:
        return sse.body(props(use.listed, use.model))


@router.get("/lora-adapters", response_model=None)
async def lora_adapters(state: State, model: str | None = None) -> Response:
    """Adapters of a model. The first one is applied to all its answers."""
    async with state.registry.use(model) as use:
        names = [*use.listed.adapters.values()]
    return sse.body([{"id": i, "path": path.name, "scale": float(i == 0)} for i, path in enumerate(names)])


NOT_OFFERED = {
    "/slots": "This server does not list its slots; GET /metrics reports how busy it is.",
    "/slots/{number}": "This server does not save slots; start it with --cache-dir to keep computed prompts.",
    "/infill": "This model cannot fill in text between two others; use /completion with the text before.",
    "/embedding": "This model answers questions and makes no embeddings; use an embedding model.",
    "/embeddings": "This model answers questions and makes no embeddings; use an embedding model.",
    "/rerank": "This model answers questions and ranks no documents; use a reranking model.",
    "/reranking": "This model answers questions and ranks no documents; use a reranking model.",
    "/v1/rerank": "This model answers questions and ranks no documents; use a reranking model.",
    "/v1/reranking": "This model answers questions and ranks no documents; use a reranking model.",
    "/audio/transcriptions": "This model takes no audio; use a speech model.",
    "/v1/audio/transcriptions": "This model takes no audio; use a speech model.",
    "/props": "A model's properties cannot be changed while it is served; see GET /props.",
    "/lora-adapters": "Adapters are chosen by model name here; request the model that has them.",
    "/models/load": "Models are loaded on demand; send the request.",
    "/models/unload": "Models are unloaded automatically; POST /api/generate with keep_alive 0 unloads one now.",
}
"""llama-server's routes that this server does not have → what to do."""


def _not_offered(path: str, why: str) -> None:
    async def refuse() -> Response:
        raise NotOffered(why)

    methods = ["POST"] if path in ("/props", "/lora-adapters") else ["GET", "POST"]
    router.add_api_route(path, refuse, methods=methods, response_model=None, include_in_schema=False)


for _path, _why in NOT_OFFERED.items():
    _not_offered(_path, _why)
