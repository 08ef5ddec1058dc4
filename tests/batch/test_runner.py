"""The runner and what it writes, with answers that are made up."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.batch.answering import RETRY_S, Answering, may_pass
from edge_runtime.batch.items import Failure, Item
from edge_runtime.batch.lines import line_of, read_line
from edge_runtime.batch.output import Output
from edge_runtime.batch.runner import Runner, in_order, pending
from edge_runtime.batch.work import GIVE_UP_AFTER, NothingAnswers, write_all
from edge_runtime.errors import EngineBusy, ImageError, MessageError

LASTING, PASSING = Failure("ImageError", "No."), Failure("EngineBusy", "Later.", may_pass=True)


class Said:
    """An answer."""

    is_answer, kind, reason = True, "", ""


def items(n: int) -> list[Item]:
    return [Item(str(i), {}, [], number=i) for i in range(n)]


def pairs(runner: Runner) -> list[tuple[int, Any]]:
    return [(pair[0].number, pair[1]) for pair in runner.results() if pair is not None]


def test_every_item_has_one_result_and_few_are_at_work():
    at_work, most, lock = 0, 0, threading.Lock()

    def answer(item: Item) -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.001)
        with lock:
            at_work -= 1
        return item.number**2

    found = pairs(Runner(items(200), answer, 5))
    assert sorted(found) == [(i, i * i) for i in range(200)]
    assert most <= 5


def test_items_are_taken_only_when_there_is_a_place():
    taken = []

    def source() -> Iterator[Item]:
        for item in items(50):
            taken.append(item.number)
            yield item

    free = threading.Semaphore(0)
    results = Runner(source(), lambda item: free.acquire(), 4).results()
    assert next(results) is None
    assert len(taken) <= 4
    free.release(50)
    assert len([pair for pair in results if pair is not None]) == 50


def test_order_is_kept_and_few_wait_for_a_slow_one():
    first, begun = threading.Event(), []

    def answer(item: Item) -> int:
        begun.append(item.number)
        if item.number == 0:
            first.wait()
        return item.number

    results = in_order(Runner(items(100), answer, 4, ahead=10).results())
    assert next(results) is None
    assert max(begun) < 10
    first.set()
    assert [pair[0].number for pair in results if pair is not None] == [*range(100)]


def test_a_stop_finishes_what_is_at_work():
    runner: Runner

    def answer(item: Item) -> int:
        if item.number == 20:
            runner.stop()
        return item.number

    runner = Runner(items(1000), answer, 3)
    found = [number for number, _ in pairs(runner)]
    assert len(found) < 1000
    assert 20 in found
    assert sorted(found) == [*range(len(found))]


def test_an_error_of_the_source_comes_after_the_results():
    def source() -> Iterator[Item]:
        yield from items(3)
        raise MessageError("Line 4 is odd.")

    results = Runner(source(), lambda item: 0, 2).results()
    seen = [next(results) for _ in range(3)]
    assert sorted(pair[0].number for pair in seen if pair is not None) == [0, 1, 2]
    with pytest.raises(MessageError, match="Line 4"):
        next(results)


# --- lines ----------------------------------------------------------------------------------------


def written(path: Path, results: list[Any], **options: Any) -> list[str]:
    given = [(item, result) for item, result in zip(items(len(results)), results, strict=True)]
    with Output(path, read_line) as output:
        output.open()
        write_all(given, output, line_of, **options)
    return [line.split('"')[3] for line in path.read_text("utf-8").splitlines()]


def test_failures_are_lines_in_their_place(tmp_path):
    found = written(tmp_path / "o", [Said(), LASTING, PASSING, LASTING, Said(), PASSING])
    assert found == ["0", "1", "2", "3", "4", "5"]


def test_when_everything_fails_for_a_while_nothing_is_recorded(tmp_path):
    with pytest.raises(NothingAnswers, match=r"in a row failed, the last one with: Later\."):
        written(tmp_path / "o", [Said(), *[PASSING] * GIVE_UP_AFTER])
    assert (tmp_path / "o").read_text("utf-8").count("\n") == 1
    assert written(tmp_path / "p", [Said(), PASSING], is_stopped=lambda: True) == ["0"]


def test_what_is_done_is_not_asked(tmp_path):
    with Output(tmp_path / "o", read_line) as output:
        output.open()
        output.append(line_of(Item("1", {}, []), LASTING), is_error=True)
    with Output(tmp_path / "o", read_line) as output:
        output.open()
        done: list[int] = []
        left = [*pending(items(3), output, lambda: done.append(1))]
    assert [(item.id, item.number) for item in left] == [("0", 0), ("2", 1)]
    assert len(done) == 1


# --- retries --------------------------------------------------------------------------------------


class Refusing:
    """A model that raises."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.n_calls = list(errors), 0

    def submit(self, messages: Any, **options: Any) -> list[Any]:
        self.n_calls += 1
        raise self.errors[min(self.n_calls, len(self.errors)) - 1]


@pytest.fixture
def at_once(monkeypatch):
    """No pauses between tries."""
    monkeypatch.setattr("edge_runtime.batch.answering.RETRY_S", tuple(0.0 for _ in RETRY_S))


def test_what_may_pass_is_tried_again_and_what_cannot_is_not(at_once):
    model = Refusing(EngineBusy("Full."), ImageError("Damaged."))
    assert Answering(model)(items(1)[0]) == Failure("ImageError", "Damaged.")
    assert model.n_calls == 2
    model = Refusing(EngineBusy("Full."))
    assert Answering(model)(items(1)[0]) == Failure("EngineBusy", "Full.", may_pass=True)
    assert model.n_calls == 1 + len(RETRY_S)


def test_an_item_that_cannot_be_asked_is_not():
    assert Answering(Refusing())(Item("a", {}, [], failure=LASTING)) is LASTING


def test_which_errors_may_pass():
    stale = ImageError("It cannot be read.")
    stale.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    missing = ImageError("It does not exist.")
    missing.__cause__ = FileNotFoundError(errno.ENOENT, "No such file")
    named = RuntimeError("Away.")
    named.may_pass = False  # type: ignore[attr-defined]
    errors = (stale, missing, named, MemoryError(), TypeError(), TimeoutError(errno.ETIMEDOUT, ""))
    assert [may_pass(error) for error in errors] == [True, False, False, True, False, True]
