"""How many answers share a call: both widths are tried, the better one stays, nobody is left behind."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from edge_runtime import Model
from edge_runtime.engine.batch_width import ASK_AGAIN, BELOW_UNPACKING, BatchWidth


def run(width: BatchWidth, seconds: dict[int, float], calls: int, n_running: int = 8) -> list[int]:
    chosen = []
    for _ in range(calls):
        chosen.append(width.choose(n_running))
        width.record(chosen[-1], seconds[chosen[-1]])
    return chosen


@pytest.mark.parametrize(("seconds", "best"), [({8: 3.1, 7: 2.0}, 7), ({8: 0.5, 7: 0.5}, 8)])
def test_the_width_with_most_tokens_per_second_stays(seconds, best):
    chosen = run(BatchWidth(), seconds, 60)
    assert chosen[:6].count(8) == chosen[:6].count(7) == 3
    assert set(chosen[6:]) == {best}


def test_one_slow_call_decides_nothing():
    width = BatchWidth()
    run(width, {8: 1.0, 7: 2.0}, 6)
    width.record(8, 50.0)
    assert set(run(width, {8: 1.0, 7: 2.0}, 20)) == {8}


def test_it_notices_when_that_has_changed():
    width = BatchWidth()
    assert set(run(width, {8: 1.0, 7: 2.0}, 20)[6:]) == {8}
    changed = run(width, {8: 1.0, 7: 0.1}, 4 * ASK_AGAIN)
    assert changed[-10:].count(7) >= 9


def test_few_answers_are_never_cut():
    width = BatchWidth()
    assert [width.choose(n) for n in range(1, 8)] == [*range(1, 8)]
    assert BELOW_UNPACKING == 7


def test_answers_are_the_same_whatever_the_width(exact_folder, monkeypatch):
    """Calls of seven for eight answers: in rotation, and each says what it would alone."""
    questions = [f"{number}. What is it?" for number in range(8)]
    options = {"greedy": True, "max_tokens": 16, "repetition_check": False, "drafts": "off"}
    with Model.load(exact_folder, exact=True, n_ctx=1024, n_threads=1) as model:
        alone = [str(model.chat(question, **options)) for question in questions]
        widths: list[int] = []
        step = model.engine.decoder.step

        def seen(parts, *more):
            widths.append(sum(len(part.keys) for part in parts))
            return step(parts, *more)

        monkeypatch.setattr(model.engine.decoder, "step", seen)
        monkeypatch.setattr("edge_runtime.engine.batch_width.BatchWidth.choose", lambda self, n: min(n, 7))
        streams = [model.chat(question, stream=True, **options) for question in questions]
        assert [str(stream.result()) for stream in streams] == alone
    assert widths.count(7) > 8, "these answers were never eight at once"


def test_requests_that_come_together_share_their_first_call(exact_folder, monkeypatch):
    """A first request waits for others a little, by the time that its prompt takes."""
    calls: list[int] = []
    with Model.load(exact_folder, exact=True, n_ctx=1024, n_threads=1) as model:
        step, scheduler = model.engine.decoder.step, model.engine.scheduler
        monkeypatch.setattr(
            model.engine.decoder, "step", lambda parts, *more: calls.append(len(parts)) or step(parts, *more)
        )
        monkeypatch.setattr("edge_runtime.engine.engine.BATCH_WINDOW_MAX_S", 0.5)
        model.chat("Hello", max_tokens=1)  # what is built at the first request takes its time
        calls.clear()
        scheduler.planner.row_s = 10.0
        streams = [model.chat(f"{n}. Why?", stream=True, greedy=True, max_tokens=2) for n in range(4)]
        assert all(stream.result().completion_tokens for stream in streams)
        assert calls[0] == 4
        scheduler.planner.row_s, slept = 0.0, []
        clock = SimpleNamespace(perf_counter=time.perf_counter, sleep=slept.append)
        monkeypatch.setattr("edge_runtime.engine.engine.time", clock)
        model.chat("Hello you", max_tokens=1)
        assert not slept, "a prompt that takes no time waited for others"
