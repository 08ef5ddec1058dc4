"""Batches of a real process that is killed in the middle, and what its remains are good for."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from edge_runtime.server.batches import ending, runner
from edge_runtime.server.batches.files import Files
from edge_runtime.server.batches.lines import Line, Reply, output_line
from edge_runtime.server.batches.records import BatchRecord, FileRecord, read_all
from edge_runtime.server.batches.work import Appended, Work
from edge_runtime.server.settings import Settings
from server.test_batches import CHAT, content, ended, jsonl, own_folder, request, start, upload
from server.test_serve_command import process

__all__ = ["own_folder"]
N = 60


def client(url: str) -> openai.OpenAI:
    plain = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60, http_client=plain)


def test_killed_in_the_middle_and_started_again(tmp_path: Path):
    """Every custom_id has exactly one line in the end, and the answers are those of one run."""
    draw = random.Random(7)
    lines = [request(f"id-{i}", f"Question {i}", temperature=0, max_tokens=6) for i in range(N)]
    seen: list[int] = []
    batch = ""
    for _ in range(3):
        with process(tmp_path, "--exact") as (server, url), client(url) as ai:
            batch = batch or start(ai, *lines).id
            goal = len(seen) * 12 + draw.randint(5, 12)
            end = time.monotonic() + 120
            while (found := ai.batches.retrieve(batch)).request_counts.completed < goal:
                assert found.status in ("validating", "in_progress")
                assert time.monotonic() < end
                time.sleep(0.005)
            seen.append(found.request_counts.completed)
            server.send_signal(signal.SIGKILL)
            server.wait(30)
    assert seen == sorted(seen)
    assert seen[-1] < N, "it was never killed in the middle"
    with process(tmp_path, "--exact") as (_, url), client(url) as ai:
        done = ended(ai, batch)
        answers = content(ai, done.output_file_id)
        assert (done.status, done.request_counts.completed, done.error_file_id) == ("completed", N, None)
        assert sorted(line["custom_id"] for line in answers) == sorted(line["custom_id"] for line in lines)
        again = content(ai, ended(ai, start(ai, *lines).id).output_file_id)
    assert said(answers) == said(again)


def said(answers: list[dict[str, Any]]) -> dict[str, str]:
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in answers}


def test_ended_by_a_signal_it_returns_what_is_at_hand(tmp_path: Path):
    lines = [request(f"{i}", max_tokens=3000) for i in range(30)]
    with process(tmp_path, "--grace", "20") as (server, url), client(url) as ai:
        batch = start(ai, *lines).id
        end = time.monotonic() + 60
        while ai.batches.retrieve(batch).status != "in_progress":
            assert time.monotonic() < end
            time.sleep(0.01)
        server.terminate()
        began = time.monotonic()
        server.wait(60)
        assert time.monotonic() - began < 18, "nobody waits for these answers: the grace time is not for them"
        assert server.returncode == 0
    (record,) = read_all(tmp_path / ".served" / "batches" / "batches", BatchRecord).values()
    assert (record.status, record.failed) == ("in_progress", 0)


# --- what a kill leaves -------------------------------------------------------------------------------------------


def line(custom_id: str) -> Line:
    return Line(1, custom_id, CHAT, {})


def answered(custom_id: str) -> bytes:
    return output_line(custom_id, Reply(200, b'{"text": "\xc3\xa9"}'))


@pytest.mark.parametrize("n_bytes", range(0, 130, 7))
def test_a_torn_line_is_cut_off_wherever_it_is_torn(tmp_path: Path, n_bytes: int):
    path = tmp_path / "a.output"
    whole, torn = answered("a"), answered("b")[:-1]
    path.write_bytes(whole + torn[:n_bytes])
    appended = Appended(path)
    assert appended.mend() == {"a": True}
    assert path.read_bytes() == whole
    appended.append(answered("b"))
    assert Appended(path).mend() == {"a": True, "b": True}


@pytest.mark.parametrize(
    "rest", [b"\0" * 4096, b"\0" * 10 + b"\n", b"{}\n", b"[1]\n", b"\xff\n", b'{"custom_id": 1}\n']
)
def test_so_is_what_a_power_failure_leaves(tmp_path: Path, rest: bytes):
    path = tmp_path / "a.output"
    path.write_bytes(answered("a") + rest)
    assert Appended(path).mend() == {"a": True}
    assert path.read_bytes().count(b"\n") == 1


def test_work_goes_on_with_what_has_no_line_yet(tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(jsonl(*(request(f"{i}") for i in range(6))))
    first = Work(tmp_path, "batch", source, Settings())
    first.open()
    taken = [first.take() for _ in range(4)]
    first.put(taken[0], answered("0"), is_answer=True)
    first.put(taken[2], answered("2"), is_answer=False)
    first.give_back(taken[3])
    first.close()
    second = Work(tmp_path, "batch", source, Settings())
    second.open()
    assert (second.completed, second.failed) == (1, 1)
    left = []
    while (found := second.take()) is not None:
        left.append(found.custom_id)
    second.close()
    assert left == ["1", "3", "4", "5"]


def test_a_returned_line_is_the_next_one(tmp_path: Path):
    source = tmp_path / "source"
    source.write_bytes(jsonl(request("a"), request("b")))
    work = Work(tmp_path, "batch", source, Settings())
    work.open()
    first = work.take()
    work.give_back(first)
    assert work.take() == first
    work.put(first, answered("a"), is_answer=True)
    assert not work.is_done
    second = work.take()
    assert work.take() is None
    assert not work.is_done, "a line is at hand"
    work.put(second, answered("b"), is_answer=True)
    assert work.is_done
    work.close()


def test_an_answer_that_does_not_fit_is_not_there_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    appended = Appended(tmp_path / "a.output")
    appended.append(answered("a"))
    write = os.write
    calls = []

    def full(handle: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(handle, data[:20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError):
            appended.append(answered("b"))
    assert (tmp_path / "a.output").read_bytes().count(b"\n") == 1
    assert len(calls) == 2
    appended.append(answered("b"))
    assert Appended(tmp_path / "a.output").mend() == {"a": True, "b": True}


@pytest.mark.parametrize("step", range(4))
def test_the_end_is_done_again_after_a_kill(own_folder: Path, serve: Any, monkeypatch: pytest.MonkeyPatch, step: int):
    """Killed at any step of making files of the answers, the next start makes the same files."""
    from server.conftest import openai_client, running

    class Killed(BaseException):
        pass

    calls = []
    put, replace = Files.put, Path.replace

    def dying_put(self: Any, record: FileRecord) -> None:
        calls.append("put")
        if step == 2 and record.purpose == "batch_output":
            raise OSError(5, "killed here")
        put(self, record)
        if step == 3 and record.purpose == "batch_output":
            raise OSError(5, "killed here")

    def dying_replace(self: Path, target: Path) -> Path:
        if step in (0, 1) and self.suffix == ".output":
            if step == 1:
                replace(self, target)
            raise OSError(5, "killed here")
        return replace(self, target)

    with running(Settings(port=0)) as served, openai_client(served) as ai, monkeypatch.context() as patch:
        patch.setattr(Files, "put", dying_put)
        patch.setattr(Path, "replace", dying_replace)
        patch.setattr(runner, "FULL_S", 0.01)
        batch = start(ai, request("a"), request("b")).id
        end = time.monotonic() + 60
        while ai.batches.retrieve(batch).status != "finalizing":
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.1)
    with running(Settings(port=0)) as served, openai_client(served) as ai:
        done = ended(ai, batch)
        assert sorted(line["custom_id"] for line in content(ai, done.output_file_id)) == ["a", "b"]
        assert (done.status, done.request_counts.completed, done.error_file_id) == ("completed", 2, None)
        assert len([*ai.files.list()]) == 2
    assert [path.suffix for path in (own_folder / "batches").iterdir()] == [".json"]


def test_it_goes_on_without_being_asked(own_folder: Path):
    from server.conftest import openai_client, running

    with running(Settings(port=0)) as served, openai_client(served) as ai:
        served.state.batches._is_asked = lambda: True
        batch = start(ai, request("a")).id
    with running(Settings(port=0)) as served:
        end = time.monotonic() + 60
        while served.state.batches.counts().get("completed") != 1:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert served.state.batches._kept.records[batch].completed == 1


def test_a_line_that_is_withdrawn_before_it_begins_goes_back(own_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A task that is cancelled before its first step never runs."""
    from server.conftest import openai_client, running

    withdrawn = []
    create_task = asyncio.create_task

    def cancelled_at_once(work: Any, **more: Any) -> Any:
        task = create_task(work, **more)
        if getattr(work, "__name__", "") == "_answer" and len(withdrawn) < 5:
            withdrawn.append(task.cancel())
        return task

    with running(Settings(port=0)) as served, openai_client(served) as ai:
        monkeypatch.setattr(runner.asyncio, "create_task", cancelled_at_once)
        done = ended(ai, start(ai, request("a"), request("b")).id)
        assert served.state.batches.n_answered[True] == 2
        assert sorted(line["custom_id"] for line in content(ai, done.output_file_id)) == ["a", "b"]
    assert len(withdrawn) == 5


def test_the_rest_of_an_expired_batch_waits_for_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "source"
    source.write_bytes(jsonl(*(request(f"{i}") for i in range(5))))
    work = Work(tmp_path, "batch", source, Settings())
    work.open()
    record = BatchRecord("batch_x", "", CHAT, "file-x", "24h", 1, 1, ends_as="expired")
    append, calls = Appended.append, []

    def full(self: Appended, data: bytes) -> None:
        calls.append(data)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        append(self, data)

    monkeypatch.setattr(Appended, "append", full)
    with pytest.raises(OSError):
        ending.put_rest(work, record)
    ending.put_rest(work, record)
    work.close()
    assert [*Appended(tmp_path / "batch.errors").mend()] == [f"{i}" for i in range(5)]
    assert (work.failed, work.unanswered) == (5, 5)


def test_damaged_records_and_leftovers_are_no_trouble(own_folder: Path, serve: Any):
    from server.conftest import openai_client, running

    with running(Settings(port=0)) as served, openai_client(served) as ai:
        kept = upload(ai, b"{}\n").id
        gone, damaged = upload(ai, b"{}\n").id, upload(ai, b"{}\n").id
    files = own_folder / "files"
    (files / f"{gone}.data").unlink()
    (files / f"{damaged}.json").write_bytes(b"\0" * 100)
    (files / f"file-{'0' * 32}.data").write_bytes(b"left over")
    (files / ".arriving.0123456789abcdef").write_bytes(b"left over")
    (files / "file-zzz.json").write_text("{}")
    (own_folder / "batches" / f"batch_{'1' * 32}.json").write_text('{"format": 1, "id": 5}')
    with running(Settings(port=0)) as served, openai_client(served) as ai:
        assert [file.id for file in ai.files.list()] == [kept]
        assert [*ai.batches.list()] == []
    left = {path.name for path in files.iterdir()}
    assert left == {f"{kept}.json", f"{kept}.data", f"{damaged}.json", "file-zzz.json"}
    assert json.loads((files / f"{kept}.json").read_text())["filename"] == "requests.jsonl"
