"""Routes for whoever runs the server: is it well, what is it, what does it do; and llama-server's way to tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from edge_runtime.model import Model
from edge_runtime.server.errors import RequestError
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

    tokens: list[int] = Field(max_length=1_000_000)
    model: str | None = None


@router.get("/health")
@router.get("/v1/health")
async def health() -> dict[str, str]:
    """Say that the server answers; needs no key."""
    return {"status": "ok"}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(state: State) -> Response:
    """What the server did and does, for Prometheus."""
    return Response(state.metrics.text(), headers={"Content-Type": METRICS_TYPE})


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, state: State) -> dict[str, Any]:
    """Cut text into tokens."""
    async with state.registry.use(body.model) as use:
        ids = await run_in_threadpool(_encode, use.model, body.content, special=body.parse_special)
        if not body.with_pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": i, "piece": _piece(use.model.tokenizer.token_bytes(i))} for i in ids]}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, state: State) -> dict[str, str]:
    """Put tokens together to text."""
    async with state.registry.use(body.model) as use:
        tokenizer = use.model.tokenizer
        wrong = [i for i in body.tokens if not 0 <= i < len(tokenizer.tokens)]
        if wrong:
            raise RequestError(f"The token {wrong[0]} is none of the {len(tokenizer.tokens)} there are.", "tokens")
        return {"content": b"".join(map(tokenizer.token_bytes, body.tokens)).decode("utf-8", "replace")}


def _encode(model: Model, text: str, *, special: bool) -> list[int]:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of pairs are no text
    return model.tokenizer.encode_special(text, "") if special else model.tokenizer.encode(text)


def _piece(data: bytes) -> str | list[int]:
    """Text, or bytes where a token holds a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return [*data]
