"""Requests that give way: computed only while no other one is here, whatever they were doing when it came."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from edge_runtime import EngineBusy, MessageError, Model
from edge_runtime.engine.engine import Engine

QUESTIONS = ["What is it?", "Say something.", "Why?", "Count to three.", "Hello", "Who are you?", "One more.", "And?"]


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end at `max_tokens`."""
    monkeypatch.setattr("edge_runtime.generation.text_stream.RepetitionDetector.feed", lambda self, token_id: False)


def ask(model: Model, *content, waits=None, **options):
    options = {"greedy": True, "max_tokens": 12, "gives_way": waits} | options
    return model.submit([{"role": "user", "content": [*content]}], **options)[0]


def never() -> bool:
    return False


class Steps:
    """What each step of the decoder computed, and who was there."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[int, int]] = []
        """Tasks that give way in the step, and other tasks that waited or ran."""
        plan = engine.scheduler.planner.plan

        def planned(active):
            found = plan(active)
            self.found.append((sum(task.gives_way for task in found.tasks), engine.scheduler.n_urgent))
            return found

        monkeypatch.setattr(engine.scheduler.planner, "plan", planned)

    @property
    def mixed(self) -> list[tuple[int, int]]:
        """Steps in which somebody who gives way was computed while another task was there."""
        return [step for step in self.found if step[0] and step[1]]


def wait_until(is_so, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)


def test_no_step_of_it_while_another_request_is_here(model, images, endless, monkeypatch):
    contents = [(images["tiny"], QUESTIONS[0]), *((question,) for question in QUESTIONS[1:4])]
    alone = [str(ask(model, *content, max_tokens=60).result()) for content in contents]
    urgent = str(ask(model, images["wide"], "What now?", max_tokens=20).result())
    steps = Steps(model.engine, monkeypatch)
    behind = [ask(model, *content, waits=never, max_tokens=60) for content in contents]
    next(behind[-1])  # it is at work
    for _ in range(3):
        assert str(ask(model, images["wide"], "What now?", max_tokens=20).result()) == urgent
    assert [str(one.result()) for one in behind] == alone
    assert steps.mixed == []
    assert any(step[0] for step in steps.found)
    assert any(step[1] for step in steps.found)


def test_it_waits_as_long_as_it_is_told_to(model, endless, monkeypatch):
    held = threading.Event()
    alone = str(ask(model, "Tell me a story.", max_tokens=100).result())
    steps = Steps(model.engine, monkeypatch)
    behind = ask(model, "Tell me a story.", waits=held.is_set, max_tokens=100)
    next(behind)
    held.set()
    wait_until(lambda: not model.engine.scheduler.is_busy)
    done = len(steps.found)
    other = ask(model, "Hello").result()  # others go on meanwhile
    assert other.completion_tokens
    assert all(step[0] == 0 for step in steps.found[done:])
    held.clear()
    assert str(behind.result()) == alone


def test_a_request_takes_the_sequences_of_those_that_give_way(model, endless, monkeypatch):
    n = model.engine.decoder.n_sequences
    questions = [f"{question} {i}" for i, question in enumerate(QUESTIONS)][:n]
    assert len(questions) == n
    alone = [str(ask(model, question, max_tokens=40).result()) for question in questions]
    answer = str(ask(model, "Now!").result())
    steps = Steps(model.engine, monkeypatch)
    behind = [ask(model, question, waits=never, max_tokens=40) for question in questions]
    wait_until(lambda: len(model.engine.scheduler.active) == n)
    assert str(ask(model, "Now!").result()) == answer
    assert [str(one.result()) for one in behind] == alone
    assert steps.mixed == []


def test_a_search_takes_them_too(model, endless):
    alone = str(ask(model, "Search!", greedy=False, beams=3).result())
    n = model.engine.decoder.n_sequences
    behind = [ask(model, f"{i}", waits=never, max_tokens=40) for i in range(n)]
    wait_until(lambda: len(model.engine.scheduler.active) == n)
    assert str(ask(model, "Search!", greedy=False, beams=3).result()) == alone
    assert {one.result().finish_reason for one in behind} <= {"length", "stop"}


@pytest.mark.parametrize("with_tokens", [False, True], ids=["prompt", "answer"])
def test_a_step_at_work_is_interrupted(model, endless, monkeypatch, with_tokens):
    """The step asks whether to leave, as llama.cpp does between parts of its graph; then nothing of it is kept."""
    at_work, outcome = threading.Event(), []
    step, planner = model.engine.decoder.step, model.engine.scheduler.planner
    alone = str(ask(model, "Tell me a story.", max_tokens=30).result())
    is_first = [True]

    def slow(chunks, is_cancelled, adapter=None):
        is_behind = all(task.gives_way for task in model.engine.scheduler.active)
        if is_behind and is_first[0] and (len(chunks[0].keys) == 1) == with_tokens:
            is_first[0] = False
            outcome.append(is_cancelled())
            at_work.set()
            wait_until(is_cancelled)
            outcome.append(is_cancelled())
        return step(chunks, is_cancelled, adapter)

    assert planner is not None
    monkeypatch.setattr(model.engine.decoder, "step", slow)
    behind = ask(model, "Tell me a story.", waits=never, max_tokens=30, reuse=False)
    assert at_work.wait(60)
    assert ask(model, "Hello").result().completion_tokens
    assert outcome == [False, True]
    assert str(behind.result()) == alone


def test_encoding_is_interrupted_between_layers(model, images, monkeypatch):
    encode, layers, at_work = model.engine.encoder.encode, [], threading.Event()

    def slow(groups, on_layer=lambda done, total: None):
        def watched(done, total):
            layers.append(done)
            if len(layers) == 1:
                at_work.set()
                wait_until(model.engine.scheduler.has_arrivals)
            on_layer(done, total)

        return encode(groups, watched)

    monkeypatch.setattr(model.engine.encoder, "encode", slow)
    behind = ask(model, images["edge"], "What is it?", waits=never)
    assert at_work.wait(60)
    assert ask(model, "Hello").result().completion_tokens
    assert layers[:2] != [1, 2], "the encoder went on to the next layer"
    assert behind.result().visual_tokens


def test_in_low_memory_it_goes_on_where_it_was_interrupted(exact_folder, images, monkeypatch):
    """Layers are packed for all slices of a picture: starting again each time, a large one would never be done."""
    with Model.load(exact_folder, exact=True, low_memory=True) as model:
        layers, at_work = [], threading.Event()
        encode = model.engine.encoder.encode

        def slow(groups, on_layer=lambda done, total: None):
            def watched(done, total):
                layers.append(done)
                if len(layers) == 3:
                    at_work.set()
                    wait_until(model.engine.scheduler.has_arrivals)
                on_layer(done, total)

            return encode(groups, watched)

        monkeypatch.setattr(model.engine.encoder, "encode", slow)
        behind = ask(model, images["strip"], "What is it?", waits=never)
        assert at_work.wait(60)
        assert ask(model, "Hello").result().completion_tokens
        assert behind.result().visual_tokens
        assert layers == [0, 1, 2, *range(2, layers[-1] + 1)]


def test_an_arrival_that_gives_way_interrupts_nobody(model, endless):
    first = ask(model, "Tell me a story.", waits=never, max_tokens=50)
    next(first)
    second = ask(model, "Another one.", waits=never)
    assert not model.engine.scheduler.has_arrivals()
    assert {one.result().finish_reason for one in (first, second)} <= {"length", "stop"}


def test_cancelled_while_it_waits(model):
    behind = ask(model, "Tell me a story.", waits=lambda: True)
    wait_until(lambda: model.engine.scheduler.n_tasks == 1)
    behind.cancel()
    wait_until(lambda: model.engine.scheduler.n_tasks == 0)
    assert len(model.engine.scheduler.sequences.idle) == model.engine.decoder.n_sequences


def test_a_model_can_be_closed_while_it_waits(exact_folder):
    with Model.load(exact_folder, exact=True) as model:
        behind = ask(model, "Tell me a story.", waits=lambda: True)
        wait_until(lambda: model.engine.scheduler.n_tasks == 1)
    assert behind.result().finish_reason == "cancelled"


def test_what_is_no_function_is_refused(model):
    with pytest.raises(MessageError, match="gives_way is True; expected a function"):
        ask(model, "Hello", waits=True)


def test_it_takes_nobodys_place(model, monkeypatch):
    monkeypatch.setattr("edge_runtime.engine.engine.MAX_REQUESTS", 2)
    held = threading.Event()
    held.set()
    behind = [ask(model, question, waits=held.is_set) for question in QUESTIONS[:2]]
    with pytest.raises(EngineBusy, match="2 requests"):
        ask(model, "Hello", waits=held.is_set)
    assert ask(model, "Hello").result().completion_tokens
    held.clear()
    assert all(one.result().completion_tokens for one in behind)


def test_a_full_cache_takes_their_cells_first(exact_folder, endless):
    with Model.load(exact_folder, exact=True, n_ctx=256) as small:
        questions = ["Tell me a story about a dog and a cat, please."[: 20 + i] for i in range(4)]
        alone = [str(ask(small, question, max_tokens=90).result()) for question in questions]
        behind = [ask(small, question, waits=never, max_tokens=90) for question in questions[:2]]
        next(behind[-1])
        urgent = [ask(small, question, max_tokens=90) for question in questions[2:]]
        assert [str(one.result()) for one in urgent] == alone[2:]
        assert [str(one.result()) for one in behind] == alone[:2]
