"""What is kept on disk: the next process neither encodes nor prefills it, and never takes it for something else."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import Model
from edge_runtime.cache.prefixes import BLOCK
from edge_runtime.decoder import kv_rows as kv_state

QUESTION, ANOTHER = "What is it?", "Which colour has it?"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def load(model_folder: Path, folder: Path | None, **options) -> Model:
    return Model.load(model_folder, **{"exact": True, "cache_dir": folder} | options)


def ask(model: Model, *content, **options):
    return model.chat([{"role": "user", "content": [*content]}], greedy=True, max_tokens=6, **options)


@pytest.fixture
def count_encoded(monkeypatch):
    """Count the slices that a model's vision tower gets from now on."""

    def watch(model: Model) -> list[int]:
        batches, encode = [], model.engine.encoder.tower.encode
        monkeypatch.setattr(
            model.engine.encoder.tower,
            "encode",
            lambda slices, *more: batches.append(len(slices)) or encode(slices, *more),
        )
        return batches

    return watch


def test_after_a_restart_a_picture_is_neither_encoded_nor_prefilled(exact_folder, folder, images, count_encoded):
    with load(exact_folder, folder) as model:
        first = ask(model, images["wide"], QUESTION)
        assert first.cached_tokens == 0
    with load(exact_folder, folder) as model:
        encoded = count_encoded(model)
        second = ask(model, images["wide"], ANOTHER)
    assert not encoded
    assert second.cached_tokens >= second.visual_tokens
    assert second.cached_tokens % BLOCK == 0
    with load(exact_folder, None) as fresh:
        assert str(second) == str(ask(fresh, images["wide"], ANOTHER))
        assert str(first) == str(ask(fresh, images["wide"], QUESTION))


def test_logits_after_a_restart_are_those_of_a_fresh_run(exact_folder, folder, images, monkeypatch):
    """Through the sampler: what it sees for the first token."""
    seen = []

    def logits_of(model: Model) -> np.ndarray:
        view = type(model.engine.decoder).logits_view
        monkeypatch.setattr(
            type(model.engine.decoder),
            "logits_view",
            lambda self, row=-1: seen.append(view(self, row).copy()) or seen[-1],
        )
        ask(model, images["wide"], ANOTHER)
        monkeypatch.undo()
        found, seen[:] = seen[0], []
        return found

    with load(exact_folder, None) as fresh:
        expected = logits_of(fresh)
    with load(exact_folder, folder) as model:
        ask(model, images["wide"], QUESTION)
    with load(exact_folder, folder) as model:
        np.testing.assert_allclose(logits_of(model), expected, atol=1e-4)


def test_a_picture_in_another_place_is_not_encoded_again(exact_folder, folder, images, count_encoded):
    with load(exact_folder, folder) as model:
        ask(model, images["square"], QUESTION)
    with load(exact_folder, folder) as model:
        encoded = count_encoded(model)
        answer = ask(model, images["tiny"], images["square"], "Which?")
    assert sum(encoded) == 1  # the tiny one
    with load(exact_folder, None) as fresh:
        assert str(answer) == str(ask(fresh, images["tiny"], images["square"], "Which?"))


def test_a_conversation_that_goes_on_adds_its_own_part_alone(exact_folder, folder, images):
    question = {"role": "user", "content": [images["wide"], QUESTION]}
    with load(exact_folder, folder) as model:
        first = model.chat([question], greedy=True, max_tokens=6)
    before = {path.name for path in folder.iterdir()}
    chat = [question, {"role": "assistant", "content": str(first)}, {"role": "user", "content": "And now? " * 30}]
    with load(exact_folder, folder) as model:
        second = model.chat(chat, greedy=True, max_tokens=6)
        assert second.cached_tokens >= second.visual_tokens
    new = {path.name for path in folder.iterdir()} - before
    assert len(new) == second.prompt_tokens // BLOCK - second.cached_tokens // BLOCK
    with load(exact_folder, folder) as model:
        third = model.chat(chat, greedy=True, max_tokens=6)
    assert third.prompt_tokens - third.cached_tokens <= BLOCK
    assert str(third) == str(second)


@pytest.mark.parametrize("change", ["nothing", "exact", "decoder", "mmproj"])
def test_another_setup_finds_nothing(exact_folder, folder, images, change, tmp_path, count_encoded):
    copy = tmp_path / "model"
    shutil.copytree(exact_folder, copy)
    with load(copy, folder) as model:
        ask(model, images["wide"], QUESTION)
    options = {"exact": False} if change == "exact" else {}
    if change in ("decoder", "mmproj"):
        (path,) = (p for p in copy.glob("*.gguf") if ("mmproj" in p.name) == (change == "mmproj"))
        times, raw = path.stat(), bytearray(path.read_bytes())
        signs = np.frombuffer(raw, np.uint8)[len(raw) // 8 * 4 + 3 :: 4]
        signs ^= 0x80  # other weights in a file of the same length and time of change
        path.write_bytes(raw)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with load(copy, folder, **options) as model:
        encoded = count_encoded(model)
        answer = ask(model, images["wide"], QUESTION)
    if change == "nothing":
        assert answer.cached_tokens >= answer.visual_tokens
    else:
        assert answer.cached_tokens == 0
        assert bool(encoded) == (change != "decoder")


def test_damaged_entries_are_computed_again_and_never_reach_llama_cpp(exact_folder, folder, images, monkeypatch):
    with load(exact_folder, folder) as model:
        first = ask(model, images["wide"], QUESTION)
    for path in folder.iterdir():
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    with monkeypatch.context() as patch:
        patch.setattr(kv_state, "build", lambda *args: pytest.fail("built from damaged bytes"))
        patch.setattr(
            "edge_runtime.decoder.llama_context.build", lambda *args: pytest.fail("built from damaged bytes")
        )
        with load(exact_folder, folder) as model:
            again = ask(model, images["wide"], QUESTION)
    assert (str(again), again.cached_tokens) == (str(first), 0)
    with load(exact_folder, folder) as model:
        assert ask(model, images["wide"], QUESTION).cached_tokens > 0


def test_one_damaged_block_leaves_what_precedes_it(exact_folder, folder, images):
    with load(exact_folder, folder) as model:
        ask(model, images["wide"], QUESTION)
        keys = model.engine.decoder.keys(0)
        names = model.engine.caches.prefixes.names(keys)
        model.engine.caches.disk.flush()
        cache = model.engine.caches.disk
    raw = bytearray(cache.path(names[1]).read_bytes())
    raw[-1] ^= 1
    cache.path(names[1]).write_bytes(raw)
    with load(exact_folder, folder) as model:
        assert ask(model, images["wide"], QUESTION).cached_tokens in (0, BLOCK)  # a single block is not worth it


def test_the_folder_never_grows_beyond_its_limit(exact_folder, folder, images):
    limit = 300_000
    with load(exact_folder, folder, cache_limit=limit) as model:
        for number in range(12):
            picture = Image.open(images["square"]).convert("RGB").rotate(number)
            ask(model, picture, QUESTION)
            model.engine.run(model.engine.caches.disk.flush)  # after the answer, on the same thread as the saving
            assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
        assert any(folder.iterdir())


def test_a_cancelled_request_keeps_what_it_had_computed(exact_folder, folder, images):
    with load(exact_folder, folder) as model:
        stream = model.chat([{"role": "user", "content": [images["wide"], "Tell me."]}], stream=True, greedy=True)
        next(stream)
        stream.cancel()
        assert stream.result().finish_reason in ("cancelled", "stop")
    with load(exact_folder, folder) as model:
        assert ask(model, images["wide"], QUESTION).cached_tokens > 0


def test_a_beginning_that_does_not_fit_beside_others_makes_room(exact_folder, folder, images):
    with load(exact_folder, folder, n_ctx=512) as model:
        expected = str(ask(model, images["wide"], QUESTION))
    with load(exact_folder, folder, n_ctx=512) as model:
        for number in range(4):
            ask(model, f"{number} tell me about this. " * 12)
        answer = ask(model, images["wide"], QUESTION)
    assert (str(answer), answer.cached_tokens > 0) == (expected, True)
