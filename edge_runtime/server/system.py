"""Routes for operators: health and metrics; and llama-server's routes for tokens."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from edge_runtime.model import Model
from edge_runtime.server import sse
from edge_runtime.server.errors import RequestError, TooLarge
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import State

router = APIRouter(tags=["system"], route_class=JSONRoute)

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class TokenizeRequest(BaseModel):
    """Body of /tokenize, as llama-server has it."""

    content: str
    model: str | None = None
    parse_special: bool = True
    """Whether `<|im_end|>` and the like are tokens of their own."""
    with_pieces: bool = False


class DetokenizeRequest(BaseModel):
    """Body of /detokenize."""

    tokens: list[int]
    model: str | None = None


class Health(BaseModel):
    """Reply of /health: enough for a proxy to choose the less busy of two servers."""

    status: str = "ok"
    open_requests: int
    """Waiting and running."""
    max_requests: int
    """Further ones are asked to try again later."""


@router.get("/health")
@router.get("/v1/health")
async def health(state: State) -> Health:
    """Say that the server answers, and how busy it is; needs no key."""
    return Health(open_requests=state.inference.n_open, max_requests=state.settings.max_queue)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: State) -> Response:
    """What the server did and does, for Prometheus."""
    return Response(state.metrics.text(), headers={"Content-Type": METRICS_TYPE})


@router.post("/tokenize", response_model=None, responses={200: {"content": {"application/json": {}}}})
async def tokenize(body: TokenizeRequest, state: State) -> Response:
    """Tokenize text."""
    most = state.settings.max_tokenize_bytes
    if (n_bytes := len(body.content.encode("utf-8", "surrogatepass"))) > most:
        raise TooLarge(f"content has {n_bytes} bytes, at most {most} are tokenised; send it in pieces.")
    with state.inference.admitted():
        async with state.registry.use(body.model) as use:
            reply = await run_in_threadpool(_tokens, use.model, body)
    return reply


def _tokens(model: Model, body: TokenizeRequest) -> Response:
    ids = _encode(model, body.content, special=body.parse_special)
    if not body.with_pieces:
        return sse.body({"tokens": ids})
    return sse.body({"tokens": [{"id": i, "piece": _piece(model.tokenizer.token_bytes(i))} for i in ids]})


@router.post("/detokenize", response_model=None, responses={200: {"content": {"application/json": {}}}})
async def detokenize(body: DetokenizeRequest, state: State) -> Response:
    """Turn tokens into text."""
    with state.inference.admitted():
        async with state.registry.use(body.model) as use:
            reply = await run_in_threadpool(_text, use.model, body.tokens)
    return reply


def _text(model: Model, ids: list[int]) -> Response:
    n_tokens = len(model.tokenizer.tokens)
    wrong = next((i for i in ids if not 0 <= i < n_tokens), None)
    if wrong is not None:
        raise RequestError(f"The token id {wrong} is out of range; expected 0 to {n_tokens - 1}.", "tokens")
    return sse.body({"content": b"".join(map(model.tokenizer.token_bytes, ids)).decode("utf-8", "replace")})


def _encode(model: Model, text: str, *, special: bool) -> list[int]:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of pairs are no text
    return model.tokenizer.encode_special(text, "") if special else model.tokenizer.encode(text)


def _piece(data: bytes) -> str | list[int]:
    """Text, or bytes if a token holds part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return [*data]
