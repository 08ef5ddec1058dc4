"""Ollama's /api/chat and /api/generate → `ChatCall`, and events → its replies; pure translation.

Replies are one JSON object per line. While a picture is encoded or a prompt is read, lines with empty content keep
the stream alive (never an empty line: clients parse every one); their `progress` says how far the work is. Durations
are nanoseconds. Tool arguments are objects. Source: api/types.go and server/routes.go of Ollama.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from edge_runtime.answers import Answer
from edge_runtime.generation.logprobs import TokenLogprob, TokenLogprobs
from edge_runtime.generation.text_stream import Piece
from edge_runtime.server import replies
from edge_runtime.server.context_tokens import ids_of
from edge_runtime.server.errors import RequestError
from edge_runtime.server.fields.thinking import thinking_options
from edge_runtime.server.inference import Answering, ChatCall, Event, Heartbeat
from edge_runtime.server.ollama import models as ollama_models
from edge_runtime.server.ollama.options import format_options, keep_alive_seconds
from edge_runtime.server.ollama.requests import ChatBody, GenerateBody
from edge_runtime.server.registry.parameters import submit_options
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.state import ServerState, State
from edge_runtime.structured_output.tools import ToolCall
from edge_runtime.version import __version__

router = APIRouter(prefix="/api", tags=["Ollama"], route_class=JSONRoute)
router.include_router(ollama_models.router)

API_VERSION = "0.12.6"
"""Version of Ollama's API: clients check it before they use newer features."""

_ANY = "[img]"
"""The place of a picture in a raw prompt, whichever is next."""
Fields = dict[str, Any]
Part = Callable[..., Fields]
"""The part of a reply that holds text, reasoning and calls; differs between chat and generate."""


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of Ollama's API, followed by our own."""
    return {"version": f"{API_VERSION}-edge-runtime-{__version__}"}


@router.post("/chat")
async def chat(body: ChatBody, request: Request, state: State) -> Response:
    """Answer a conversation; without messages, load or unload the model."""
    _refuse_what_is_not_done(body)
    if not body.messages:
        return await _load_or_leave(body, state, _message)
    messages = [{**message, "role": _small(message.get("role"))} for message in body.messages]
    if body.system and not any(_is_system(message, body.system) for message in messages):
        messages.insert(0, {"role": "system", "content": body.system})
    given = {"tools": body.tools or None, "tool_choice": body.tool_choice}
    given["continue_final_message"] = body.continue_final_message
    options = {**_options(body), **{name: value for name, value in given.items() if value is not None}}
    messages = messages if body.continue_final_message is False else _joined_at_the_end(messages)
    call = ChatCall(body.wanted, messages, options, keep_alive_s=keep_alive_seconds(body.keep_alive))
    return await _answer(call, body, request, state, _message)


@router.post("/generate")
async def generate(body: GenerateBody, request: Request, state: State) -> Response:
    """Answer a prompt; without one, load or unload the model."""
    _refuse_what_is_not_done(body)
    _refuse_of_prompts(body)
    if not body.prompt and not body.images:
        return await _load_or_leave(body, state, _response)
    options = {**_options(body), **({"raw": True} if body.raw else {})}
    messages: list[Fields] = [{"role": "system", "content": body.system}] if body.system else []
    messages.append(
        _raw(body, state.settings.max_images)
        if body.raw
        else {"role": "user", "content": body.prompt or "", "images": body.images}
    )
    keep_s = keep_alive_seconds(body.keep_alive)
    call = ChatCall(body.wanted, messages, options, keep_alive_s=keep_s, context=body.context or None)
    return await _answer(call, body, request, state, _response)


def _raw(body: GenerateBody, max_images: int) -> Fields:
    """A prompt used verbatim: each picture at its `[img-N]` or `[img]`, the others before everything."""
    prompt = body.prompt or ""
    left = {n: {"type": "image", "image": image} for n, image in enumerate(body.images or [])}
    if len(left) > max_images:  # refused later; here, each would be searched for
        return {"role": "user", "content": [*left.values(), prompt]}
    places: dict[int, tuple[str, Fields]] = {}
    for n in [*left]:
        mark = f"[img-{n}]"
        if (place := prompt.find(mark)) >= 0:
            places[place] = mark, left.pop(n)
    place = -1
    for n in [*left]:
        if (place := prompt.find(_ANY, place + 1)) < 0:
            break
        places[place] = _ANY, left.pop(n)
    content: list[Any] = [*left.values()]
    done = 0
    for place in sorted(places):
        mark, picture = places[place]
        content += [prompt[done:place], picture]
        done = place + len(mark)
    return {"role": "user", "content": [piece for piece in (*content, prompt[done:]) if piece != ""]}


def _joined_at_the_end(messages: list[Fields]) -> list[Fields]:
    """Join the assistant texts that end a conversation into one message, with an empty line between them.

    Ollama joins them so; with two turns it would be unclear which one is continued.
    """
    start = len(messages)
    while start and _is_plain_answer(messages[start - 1]):
        start -= 1
    answers = messages[start:]
    if len(answers) < 2:
        return messages
    return [*messages[:start], {**answers[0], "content": "\n\n".join(answer["content"] for answer in answers)}]


def _is_plain_answer(message: Fields) -> bool:
    more = {name for name, value in message.items() if value not in (None, "", [])}
    return message.get("role") == "assistant" and more == {"role", "content"} and isinstance(message["content"], str)


def _is_system(message: Fields, text: str) -> bool:
    return message.get("role") == "system" and message.get("content") == text


def _small(role: Any) -> Any:
    return role.lower() if isinstance(role, str) else role


def _options(body: ChatBody | GenerateBody) -> Fields:
    return {
        **submit_options(body.options),
        **thinking_options(body.think),
        **format_options(body.format),
        **({"logprobs": True, "top_logprobs": body.top_logprobs or 0} if body.logprobs else {}),
        **({"context_shift": True} if body.truncate is not False else {}),
    }


def _refuse_what_is_not_done(body: ChatBody | GenerateBody) -> None:
    body.refuse_what_binds()
    if body.debug_render_only:
        raise RequestError(
            "_debug_render_only was given, but prompts are not shown here; leave it out.", "_debug_render_only"
        )


def _refuse_of_prompts(body: GenerateBody) -> None:
    for name, value, instead in (
        ("suffix", body.suffix, "the model cannot fill in text before a suffix; leave it out"),
        (
            "template",
            body.template,
            "prompts are made with the model's own template; send raw=true to write the whole prompt",
        ),
    ):
        if value:
            raise RequestError(f"{name} was given, but {instead}.", name)
    if body.raw and (body.system or body.context):
        name = "system" if body.system else "context"
        raise RequestError(f"raw mode does not support template, system, or context; leave {name} out.", name)
    if body.raw and (body.think or body.format):
        raise RequestError("raw was given together with think or format, which need the template; leave one out.")


def _message(text: str = "", reasoning: str = "", calls: list[ToolCall] | None = None) -> Fields:
    message: Fields = {"role": "assistant", "content": text}
    if reasoning:
        message["thinking"] = reasoning
    if calls:
        message["tool_calls"] = [{"function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return {"message": message}


def _response(text: str = "", reasoning: str = "", calls: list[ToolCall] | None = None) -> Fields:
    return {"response": text, **({"thinking": reasoning} if reasoning else {})}


def _head(model: str) -> Fields:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    return {"model": model, "created_at": now.replace("+00:00", "Z")}


async def _load_or_leave(body: ChatBody | GenerateBody, state: ServerState, part: Part) -> Response:
    keep_s = keep_alive_seconds(body.keep_alive)
    if keep_s == 0:
        await state.registry.forget(state.catalog.find(body.wanted))
        return JSONResponse({**_head(body.wanted), **part(), "done": True, "done_reason": "unload"})
    async with state.registry.use(body.wanted, keep_s) as use:
        loaded = {"load_duration": round(use.load_s * 1e9), "total_duration": round(use.load_s * 1e9)}
    return JSONResponse({**_head(body.wanted), **part(), "done": True, "done_reason": "load", **loaded})


async def _answer(
    call: ChatCall, body: ChatBody | GenerateBody, request: Request, state: ServerState, part: Part
) -> Response:
    """The reply to a call, whole or as a stream."""

    async def whole(answering: Answering) -> Response:
        (answer,) = await answering.whole()
        shown = part(answer.answer, answer.reasoning or "", answer.tool_calls)
        logprobs = {"logprobs": [_logprob(each) for each in answer.logprobs]} if answer.logprobs is not None else {}
        end = {**_end(answer, answering), **await _context(answer, answering, body)}
        return JSONResponse({**_head(body.wanted), **shown, **end, **logprobs})

    if body.stream is False:
        return await replies.whole(request, state.inference, call, whole)
    answering = await replies.begin(request, state.inference, call)

    async def lines(events: AsyncIterator[tuple[int, Event]]) -> AsyncIterator[Mapping[str, Any]]:
        async for _, event in events:
            if isinstance(event, Answer):
                end = {**_end(event, answering), **await _context(event, answering, body)}
                yield {**_head(body.wanted), **part(), **end}
            elif isinstance(event, Heartbeat):
                yield {**_head(body.wanted), **part(), "done": False, **_progress(event)}
            else:
                yield {**_head(body.wanted), **_piece(event, part), "done": False}

    return replies.AnswerStreamResponse(answering, lines, "ndjson", "ollama")


def _piece(piece: Piece, part: Part) -> Fields:
    if piece.call is not None:
        shown = part(calls=[piece.call])
    elif piece.kind == "reasoning":
        shown = part(reasoning=piece.text)
    else:
        shown = part(piece.text)
    return {**shown, **({"logprobs": [_logprob(each) for each in piece.logprobs]} if piece.logprobs else {})}


def _progress(beat: Heartbeat) -> Fields:
    """How far the work before the first token is; a field of our own, which other clients ignore."""
    if beat.progress is None:
        return {}
    at = beat.progress
    return {"progress": {"stage": at.stage, "done": at.done, "total": at.total, "share": round(at.share, 4)}}


def _end(answer: Answer, answering: Answering) -> Fields:
    """The facts about a finished answer."""
    times = answer.timings_s
    prompt_s = sum(times.get(stage, 0.0) for stage in ("image", "encode", "prefill"))
    return {
        "done": True,
        # A repetitive answer was cut, like one that ran out of tokens.
        "done_reason": "stop" if answer.finish_reason == "stop" else "length",
        "total_duration": _nanoseconds(time.perf_counter() - answering.outcome.started),
        "load_duration": _nanoseconds(answering.use.load_s),
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(prompt_s),
        "eval_count": answer.completion_tokens,
        "eval_duration": _nanoseconds(times.get("decode", 0.0)),
        # A field of our own: how many of the oldest turns did not fit and were dropped.
        **({"dropped_turns": answer.dropped_turns} if answer.dropped_turns else {}),
    }


async def _context(answer: Answer, answering: Answering, body: ChatBody | GenerateBody) -> Fields:
    """The conversation as ids, which clients of /api/generate may send with their next prompt."""
    if not isinstance(body, GenerateBody) or body.raw:
        return {}
    turns, model = [*answering.messages, {"role": "assistant", "content": answer.answer}], answering.use.model
    return {"context": await asyncio.to_thread(ids_of, turns, model.tokenizer, model.n_ctx)}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _logprob(each: TokenLogprobs) -> Fields:
    def fields(token: TokenLogprob) -> Fields:
        return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}

    return {**fields(each), "top_logprobs": [fields(other) for other in each.top_logprobs]}
