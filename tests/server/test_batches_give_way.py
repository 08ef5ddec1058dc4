"""Who comes first: whoever waits for an answer. Asserted by the order of work, not by time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from edge_runtime import NotEnoughMemoryError
from edge_runtime.server import inference as inference_module
from edge_runtime.server.middleware.shares import in_background
from server.attacking import wait_until
from server.conftest import Served, openai_client
from server.test_batches import content, ended, own_folder, request, start

__all__ = ["own_folder"]
QUESTION: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture
def served(own_folder: Path, serve: Callable[..., Served]) -> Served:
    return serve(models=("demo",))


@pytest.fixture
def ai(served: Served) -> Iterator[openai.OpenAI]:
    with openai_client(served) as client:
        yield client


@pytest.fixture
def steps(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each step: tasks of batches in it, and calls of people that were open when it was planned."""
    (slot,) = served.state.registry.loaded()
    planner, found = slot.model.engine.scheduler.planner, []
    plan = planner.plan

    def planned(active: Any) -> Any:
        n_open, made = served.state.inference.n_open, plan(active)
        found.append((sum(task.gives_way for task in made.tasks), n_open))
        return made

    monkeypatch.setattr(planner, "plan", planned)
    return found


def test_no_step_of_a_batch_while_somebody_waits(ai, served, steps, endless):
    batch = start(ai, *(request(f"{i}", max_tokens=150) for i in range(12)))
    wait_until(lambda: any(in_batch for in_batch, _ in steps), 60)
    for _ in range(3):
        answer = ai.chat.completions.create(**QUESTION, max_tokens=20)
        assert answer.usage.completion_tokens == 20
    done = ended(ai, batch.id)
    assert done.request_counts.completed == 12
    asked = [n for n, n_open in steps if n_open]
    # A step is planned a moment after the look whether somebody asks: one for each question may have begun by then.
    assert sum(n > 0 for n in asked) <= 3
    assert sum(n == 0 for n in asked) >= 20
    bodies = [line["response"]["body"] for line in content(ai, done.output_file_id)]
    assert {body["usage"]["completion_tokens"] for body in bodies} == {150}


def test_a_batch_waits_from_the_moment_a_question_arrives(ai, served, steps, endless, monkeypatch):
    """While the question is still being prepared, the processor is its own."""
    go_on, arrived, brought_in = asyncio.Event(), [], inference_module.brought_in

    async def slow(messages: Any, *more: Any) -> Any:
        if in_background() is None:
            arrived.append(messages)
            await go_on.wait()
        return await brought_in(messages, *more)

    monkeypatch.setattr(inference_module, "brought_in", slow)
    batch = start(ai, *(request(f"{i}", max_tokens=400) for i in range(6)))
    wait_until(lambda: any(in_batch for in_batch, _ in steps), 60)
    (slot,) = served.state.registry.loaded()
    loop = _loop(served)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(lambda: ai.chat.completions.create(**QUESTION, max_tokens=5))
        try:
            wait_until(lambda: bool(arrived))
            wait_until(lambda: not slot.model.engine.scheduler.is_busy, 60)
            before = len(steps)
            time.sleep(0.3)
            assert len(steps) <= before + 1  # the one that was planned at that moment
        finally:
            loop.call_soon_threadsafe(go_on.set)
        assert asked.result(60).choices
    assert ended(ai, batch.id).request_counts.completed == 6


def _loop(served: Served) -> asyncio.AbstractEventLoop:
    running = served.state.batches._running
    assert running is not None
    return running.get_loop()


def test_lines_take_nobodys_place(own_folder, serve, endless):
    served = serve(models=("demo",), max_queue=1)
    with openai_client(served) as ai:
        batch = start(ai, *(request(f"{i}", max_tokens=300) for i in range(4)))
        wait_until(lambda: len(served.state.batches._at_hand) > 1, 60)
        assert served.state.inference.n_open == 0
        assert ai.chat.completions.create(**QUESTION, max_tokens=2).choices
        assert ended(ai, batch.id).request_counts.completed == 4


def test_lines_have_all_the_time_they_need(own_folder, serve, endless):
    served = serve(models=("demo",), request_timeout_s=0.01)
    with openai_client(served) as ai:
        done = ended(ai, start(ai, *(request(f"{i}", max_tokens=200) for i in range(4))).id)
        assert (done.request_counts.completed, done.request_counts.failed) == (4, 0)


def test_a_model_that_only_lines_use_makes_room_for_another(own_folder, serve, endless, monkeypatch):
    """Its lines go back to the batch, and are answered when nobody needs the memory any more."""
    served = serve()
    registry = served.state.registry
    with openai_client(served) as ai:
        batch = start(ai, *(request(f"{i}", max_tokens=800) for i in range(5)))
        wait_until(lambda: any(slot.n_background for slot in registry.loaded()), 60)
        (slot,) = registry.loaded()
        assert asyncio.run_coroutine_threadsafe(registry._evict(), _loop(served)).result(60)
        assert slot.model is None
        done = ended(ai, batch.id)
        answers = content(ai, done.output_file_id)
        assert sorted(line["custom_id"] for line in answers) == [f"{i}" for i in range(5)]
        assert done.request_counts.failed == 0


def test_what_may_pass_is_tried_again(own_folder, serve, monkeypatch):
    served = serve()
    monkeypatch.setattr("edge_runtime.server.batches.at_hand.RETRY_S", (0.01,) * 3)
    begin, calls = served.state.inference.begin, []

    async def short_of_memory(call: Any) -> Any:
        calls.append(call)
        if len(calls) < 3:
            raise NotEnoughMemoryError("Not now.")
        return await begin(call)

    monkeypatch.setattr(served.state.inference, "begin", short_of_memory)
    with openai_client(served) as ai:
        done = ended(ai, start(ai, request("a")).id)
        assert (done.request_counts.completed, len(calls)) == (1, 3)
        calls.clear()
        monkeypatch.setattr("edge_runtime.server.batches.at_hand.RETRY_S", (0.01,))
        done = ended(ai, start(ai, request("a")).id)
        (line,) = content(ai, done.error_file_id)
        assert line["response"]["status_code"] == 503


def test_stored_responses_belong_to_the_batchs_owner(ai):
    line = request("a", url="/v1/responses") | {"body": {"input": "Hi", "max_output_tokens": 16, "store": True}}
    done = ended(ai, start(ai, line, endpoint="/v1/responses").id)
    (answer,) = content(ai, done.output_file_id)
    assert ai.responses.retrieve(answer["response"]["body"]["id"]).status
    with pytest.raises(openai.NotFoundError):
        ai.with_options(api_key="another").responses.retrieve(answer["response"]["body"]["id"])
