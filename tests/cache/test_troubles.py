"""A cache folder that is broken, full, read-only or gone costs speed and one warning, never an answer."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from edge_runtime import EdgeRuntimeError, MessageError, Model
from edge_runtime.cache.caches import usual_folder
from edge_runtime.cache.disk import DiskCache, usable_folder
from edge_runtime.cache.prefixes import SavedPrefixes
from edge_runtime.engine.request import Request
from edge_runtime.engine.task import Task
from edge_runtime.loading.load import LoadOptions
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.build import Prompt
from edge_runtime.store.find import find_model
from edge_runtime.system.atomic_files import make_folder

A, B = "a" * 32, "b" * 32
TEXT = "a question that is longer than a block of thirty-two positions, " * 3


def load(folder: Path, cache: Path, **options) -> Model:
    return Model.load(folder, **{"exact": True, "n_threads": 1, "cache_dir": cache} | options)


def endless(model: Model, question: str, n: int):
    on = dict.fromkeys(model.tokenizer.stop_ids, -100.0)
    return model.chat(question + TEXT, stream=True, max_tokens=n, logit_bias=on, greedy=True, repetition_check=False)


def deny(monkeypatch, code: int, *calls: str) -> None:
    """Let system calls on the cache's files fail, as they do for whom the rights are taken."""

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    for call in calls:
        monkeypatch.setattr(Path, call, fail)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOTDIR, errno.ESTALE, errno.ENAMETOOLONG])
def test_a_folder_that_cannot_be_read_any_more_fails_nobody(exact_folder, tmp_path, monkeypatch, caplog, code):
    with load(exact_folder, tmp_path) as model:
        expected = str(endless(model, "long", 30).result())
        long, short = endless(model, "long", 30), endless(model, "short", 5)
        next(long), next(short)
        deny(monkeypatch, code, "stat", "open", "unlink", "replace", "mkdir")
        answers = long.result(), short.result(), endless(model, "new", 5).result()
        assert [answer.finish_reason for answer in answers] == ["length"] * 3
        assert str(answers[0]) == expected
        assert caplog.text.count("nothing further is kept there") == 1
        assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), MemoryError(), RuntimeError("new"), ValueError("x")]
)
def test_the_writing_thread_outlives_every_error(tmp_path, caplog, error):
    def fail() -> bytes:
        raise error

    cache = DiskCache(tmp_path, 100_000)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        for name in (A, B):
            cache.put(name, {}, fail, 10)
        cache.flush()
    assert cache._writer.is_alive()
    assert cache._waiting_bytes == 0
    is_transient = isinstance(error, MemoryError)
    assert cache.has_room == is_transient
    assert caplog.text.count("WARNING") == (2 if is_transient else 1)
    cache.close()


def test_flushing_does_not_wait_for_a_thread_that_is_gone(tmp_path):
    cache = DiskCache(tmp_path, 100_000)
    cache.close()
    waiting = threading.Thread(target=cache.flush, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    assert not cache.has_room


def test_an_error_while_an_answer_is_saved_is_nobodys(exact_folder, tmp_path, monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("unexpected")

    with load(exact_folder, tmp_path) as model:
        monkeypatch.setattr(SavedPrefixes, "save", fail)
        streams = [endless(model, name, 8) for name in ("one", "two", "three")]
        assert [stream.result().finish_reason for stream in streams] == ["length"] * 3
        model.engine.run(lambda: None)
    assert "could not be kept on disk" in caplog.text


def test_too_little_memory_for_what_was_kept_computes_it_again(exact_folder, tmp_path, monkeypatch):
    with load(exact_folder, tmp_path) as model:
        expected = str(endless(model, "long", 5).result())

    def fail(*args):
        raise MemoryError

    with load(exact_folder, tmp_path) as model:
        monkeypatch.setattr("edge_runtime.cache.prefixes.Saved.rows", fail)
        answer = endless(model, "long", 5).result()
        assert (str(answer), answer.cached_tokens) == (expected, 0)


def test_a_folder_that_was_deleted_is_made_again(exact_folder, tmp_path, caplog):
    cache = tmp_path / "cache"
    with load(exact_folder, cache) as model:
        endless(model, "one", 3).result()
        model.engine.run(model.engine.caches.disk.flush)  # on its thread, which saves prompts behind their answers
        shutil.rmtree(cache)
        endless(model, "two", 3).result()
    assert [*cache.iterdir()]
    assert not caplog.text
    if os.name != "nt":
        assert cache.stat().st_mode & 0o077 == 0


def test_a_folder_may_be_deleted_while_something_is_written_to_it(exact_folder, tmp_path, caplog, monkeypatch):
    cache = tmp_path / "cache"

    def make_and_lose(path, mode):
        make_folder(path, mode)
        shutil.rmtree(path)

    with load(exact_folder, cache) as model:
        monkeypatch.setattr("edge_runtime.cache.disk.make_folder", make_and_lose)
        endless(model, "one", 3).result()
        model.engine.run(model.engine.caches.disk.flush)
        assert not cache.exists()
        monkeypatch.undo()
        endless(model, "two", 3).result()
    assert [*cache.iterdir()]
    assert not caplog.text


def test_requests_do_not_wait_for_the_disk(exact_folder, tmp_path, monkeypatch):
    """What is not written yet when somebody asks is written later."""
    gate, write_file = threading.Event(), DiskCache._write_file

    def slow(self, *args):
        gate.wait(60)
        write_file(self, *args)

    monkeypatch.setattr(DiskCache, "_write_file", slow)
    with load(exact_folder, tmp_path) as model:
        monkeypatch.setattr("edge_runtime.cache.disk.QUEUE_BYTES", 2 * 400_000)
        first = endless(model, "one", 3).result()
        second = endless(model, "one", 3).result()  # nobody has opened the gate
        assert second.cached_tokens == first.prompt_tokens - 1
        assert not any(tmp_path.iterdir())
        gate.set()
    with load(exact_folder, tmp_path) as model:
        assert endless(model, "one", 3).result().cached_tokens >= first.prompt_tokens // 32 * 32 - 32


@pytest.mark.parametrize("what", ["file", "below a file", "\0"])
def test_a_folder_that_is_none(exact_folder, tmp_path, caplog, what):
    (tmp_path / "file").write_text("x")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}.get(what, tmp_path / "\0")
    with pytest.raises(MessageError, match=r"cannot be used .*choose another --cache-dir"):
        usable_folder(folder)
    with pytest.raises(MessageError):
        load(exact_folder, folder)
    with caplog.at_level(logging.WARNING, "edge_runtime"):
        # As a server loads: what has become of the folder since its start is no client's trouble.
        options = LoadOptions(exact=True, cache_dir=folder, needs_cache=False)
        with Model(find_model(exact_folder), options) as model:
            assert model.chat("Why?", max_tokens=2).completion_tokens
    assert caplog.text.count("cannot be used") == 1


def test_the_usual_folder_is_its_owners(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    folder = usual_folder()
    assert folder == tmp_path / "edge-runtime" / "prompts"
    if os.name != "nt":
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        assert usual_folder().stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert usual_folder() is None
    assert "are not kept" in caplog.text


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_the_type_of_the_kv_cache_is_part_of_what_is_kept(exact_folder, tmp_path, kv_type):
    options = {"exact": False, "cache_dir": tmp_path}
    for first, known in (("f16", False), (kv_type, False), (kv_type, True), ("f16", True)):
        with load(exact_folder, tmp_path, **options, kv_type=first) as model:
            assert (endless(model, "long", 2).result().cached_tokens > 0) == known


# --- the end of an engine, and a request's own errors ------------------------------------------------------------


def test_a_request_that_is_submitted_while_the_engine_closes_ends(exact_folder, tmp_path):
    model = load(exact_folder, tmp_path)
    inside, go_on = threading.Event(), threading.Event()
    prefixes = model.engine.caches.prefixes
    find = prefixes.find

    def slow_disk(*args, **options):
        inside.set()
        go_on.wait(30)
        return find(*args, **options)

    prefixes.find = slow_disk
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(model.chat("Why?", max_tokens=1).finish_reason)
        except EdgeRuntimeError as error:
            outcome.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert inside.wait(30)
    model.close()
    go_on.set()
    asking.join(30)
    assert not asking.is_alive()
    assert "was closed" in str(outcome[0])
    for late in (lambda: model.chat("Why?"), lambda: model.engine.run(lambda: 1)):
        with pytest.raises(EdgeRuntimeError, match="was closed"):
            late()
    model.warm_up()  # there is nothing left to be warmed


def test_a_task_that_cannot_be_taken_in_fails_alone(exact_folder, tmp_path):
    with load(exact_folder, tmp_path) as model:
        request = Request(Prompt("", [1, 2, 3], [(0, 2)]), [], [], GenerationOptions(max_tokens=1))
        with pytest.raises(MessageError, match="1 places for visual tokens, expected 0"):
            model.engine.submit(request)
        task = Task(request, lambda: False)
        model.engine.inbox.put(task)  # past the check: the thread goes on
        assert isinstance(task.events.get(), MessageError)
        assert model.chat("Why?", max_tokens=2).completion_tokens


def test_progress_of_a_prompt_of_nothing():
    task = Task(Request(Prompt("", [], []), [], [], GenerationOptions(max_tokens=1)), lambda: False)
    task.report_prefill(0)
    assert task.events.get().share == 0.0
