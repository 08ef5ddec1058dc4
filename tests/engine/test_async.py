"""The same engine from an event loop."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from edge_runtime import ImageError, Model, ModelFileError

QUESTIONS = ["What is it?", "Say something.", "Why?", "Count to three.", "Tell me a story.", "Hello", "One more."]


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


def test_many_answers_in_one_loop_are_those_of_chat(model, images):
    requests = [*QUESTIONS, *([{"role": "user", "content": [images["tiny"], q]}] for q in QUESTIONS)]
    alone = [str(model.chat(request, greedy=True, max_tokens=10)) for request in requests]

    async def ask() -> list[str]:
        answers = await asyncio.gather(*(model.achat(r, greedy=True, max_tokens=10) for r in requests))
        return [str(answer) for answer in answers]

    assert asyncio.run(ask()) == alone


def test_pieces_make_the_answer_and_the_loop_stays_free(model):
    async def ask() -> tuple[list[str], str, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)
                ticks += 1

        ticking = asyncio.create_task(tick())
        answer = model.achat("Tell me a story.", greedy=True, max_tokens=60)
        pieces = [piece.text async for piece in answer]
        ticking.cancel()
        return pieces, str(await answer), ticks

    pieces, text, ticks = asyncio.run(ask())
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert ticks > 5


def test_a_cancelled_task_ends_the_work_behind_it(model, monkeypatch):
    monkeypatch.setattr(
        "edge_runtime.generation.sampling.Sampler.sample", lambda self, context, row: 40
    )  # it never stops

    async def ask() -> None:
        task = asyncio.create_task(_read(model))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ask())
    end = time.monotonic() + 10
    while model.engine.scheduler.n_tasks and time.monotonic() < end:
        time.sleep(0.02)
    assert model.engine.scheduler.n_tasks == 0


async def _read(model: Model) -> None:
    async for _ in model.achat("Tell me a story.", greedy=True, max_tokens=4000, repetition_check=False):
        pass


def test_a_loop_that_ends_early_harms_nothing(model):
    async def look() -> str:
        async for piece in model.achat("Tell me a story.", greedy=True, max_tokens=500):
            return piece.text
        return ""

    assert asyncio.run(look())
    assert str(model.chat("Hello", greedy=True, max_tokens=3))


def test_errors_are_raised_where_the_answer_is_awaited(model, images, monkeypatch):
    async def ask(content: object) -> None:
        await model.achat([{"role": "user", "content": content}])

    with pytest.raises(ImageError):
        asyncio.run(ask([Path("missing.png"), "What is it?"]))

    def fail(groups, *more):
        raise ModelFileError("broken")

    monkeypatch.setattr(model.engine.encoder, "encode", fail)
    with pytest.raises(ModelFileError, match="broken"):
        asyncio.run(ask([images["wide"], "What is it?"]))
