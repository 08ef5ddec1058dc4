"""Cancelling at any moment, progress meanwhile, and memory that is used no longer than it must be."""

from __future__ import annotations

import itertools
import platform
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import MessageError, Model
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_types import choose_kv_type, kv_bytes
from edge_runtime.decoder.options import DecoderOptions
from edge_runtime.decoder.sequence_chunk import Cancelled, SequenceChunk
from edge_runtime.loading.memory_needs import estimate_memory
from edge_runtime.system import memory
from edge_runtime.vision.encoder import BATCH_PATCHES
from edge_runtime.weights.gguf_file import GGUFFile
from support.gguf_maker import U32, mini_decoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"
LAYER_S = 0.1


@pytest.fixture
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


def stream(model: Model, *content, **options):
    return model.chat([{"role": "user", "content": [*content]}], stream=True, greedy=True, max_tokens=12, **options)


@pytest.fixture
def slow_layers(model, monkeypatch):
    """Make every layer of the tower take a tenth of a second; returns when each of them ended."""
    ended, layers = [], model.engine.encoder.tower.layers

    def slow(*more):
        for layer in layers(*more):
            time.sleep(LAYER_S)
            ended.append(time.perf_counter())
            yield layer

    monkeypatch.setattr(model.engine.encoder.tower, "layers", slow)
    return ended


def wait_until_free(model: Model) -> float:
    """Seconds until no request is left and all sequences are free."""
    started, scheduler = time.perf_counter(), model.engine.scheduler
    while scheduler.n_tasks or len(scheduler.sequences.idle) < model.engine.decoder.n_sequences:
        time.sleep(0.005)
        assert time.perf_counter() - started < 30
    return time.perf_counter() - started


def test_cancelled_in_encoding_it_ends_at_once_and_is_left_between_two_layers(model, images, slow_layers):
    running = stream(model, images["wide"], "What is it?")
    cancelled_at = []

    def cancel(progress):
        if slow_layers and not cancelled_at:
            cancelled_at.append(time.perf_counter())
            running.cancel()

    running.on_progress = cancel
    assert running.result().finish_reason == "cancelled"
    assert time.perf_counter() - cancelled_at[0] < LAYER_S / 2
    assert wait_until_free(model) < 0.5
    n_layers, n_batches = model.engine.encoder.tower.config.layers, 2
    assert len(slow_layers) < n_layers * n_batches
    time.sleep(3 * LAYER_S)
    assert slow_layers[-1] < cancelled_at[0] + 2 * LAYER_S
    assert str(stream(model, "Hello").result())


def test_one_of_two_that_share_a_batch_ends_at_once_and_the_other_is_answered(model, images, slow_layers):
    expected_of = Image.open(images["square"]).convert("RGB")
    first, second = stream(model, images["tiny"], "Why?"), stream(model, expected_of, "What is it?")
    while not slow_layers:
        time.sleep(0.01)
    started = time.perf_counter()
    first.cancel()
    assert first.result().finish_reason == "cancelled"
    assert time.perf_counter() - started < 0.5
    answer = second.result()
    assert answer.finish_reason != "cancelled"
    wait_until_free(model)
    assert str(answer) == str(stream(model, expected_of, "What is it?").result())


def test_cancelled_before_anything_was_done_it_ends_at_once(model, images, slow_layers):
    first = stream(model, images["wide"], "Why?")
    waiting = [stream(model, f"{number}?") for number in range(20)]
    started = time.perf_counter()
    for one in waiting:
        one.cancel()
    assert {one.result().finish_reason for one in waiting} == {"cancelled"}
    assert time.perf_counter() - started < 0.5
    assert first.result().finish_reason != "cancelled"


def test_llama_cpp_stops_inside_a_call(exact_folder: Path):
    (path,) = (p for p in exact_folder.glob("*.gguf") if "mmproj" not in p.name)
    decoder = Decoder(path, DecoderOptions(n_ctx=512, exact=True))
    asked = itertools.count()
    decoder.step([SequenceChunk(0, [*range(200)])], lambda: next(asked) < 0)
    n_whole, asked = next(asked), itertools.count()
    with pytest.raises(Cancelled):
        decoder.step([SequenceChunk(1, [*range(200)])], lambda: next(asked) >= 3)
    assert next(asked) < n_whole / 2
    assert (decoder.held(0), decoder.held(1)) == (200, 0)
    decoder.step([SequenceChunk(1, [*range(200)])])  # what the aborted call had taken is free
    decoder.close()


def test_progress_is_told_layer_by_layer(model, images):
    running = stream(model, images["wide"], "What is it?")
    told = []
    running.on_progress = told.append
    running.result()
    encode = [progress.share for progress in told if progress.stage == "encode"]
    assert encode == sorted(encode)
    assert (encode[0], encode[-1]) == (0.0, 1.0)
    assert len(set(encode)) > model.engine.encoder.tower.config.layers
    assert [progress.share for progress in told if progress.stage == "prefill"][-1] == 1.0


def test_layers_of_a_batch_that_is_cut_into_runs_are_counted_together(model, images):
    """A group of many frames goes through the tower in several runs; whoever listens is an argument of each call."""
    (one,) = model.slices(images["square"], 1)
    # All different: equal ones are encoded once.
    slices = [replace(one, pixels=one.pixels ^ np.uint8(n)) for n in range(BATCH_PATCHES // one.n_patches + 1)]
    told: list[tuple[int, int]] = []
    encoder, layers = model.engine.encoder, model.engine.encoder.tower.config.layers
    tokens = model.engine.run(
        lambda: encoder.encode([[(item, n) for n, item in enumerate(slices)]], lambda *how: told.append(how))
    )
    total = told[-1][1]
    assert total % layers == 0
    assert total > layers, "this group was not cut into runs"
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert (told[0], told[-1]) == ((0, total), (total, total))
    told.clear()
    again = model.engine.run(lambda: encoder.encode([[(item, n) for n, item in enumerate(slices)]]))
    assert (again[0] == tokens[0]).all()
    assert not told, "a listener of one call heard of another"

    def stop(done: int, total: int) -> None:
        if done:
            raise Cancelled

    encoder.forget_slices()
    with pytest.raises(Cancelled):
        model.engine.run(lambda: encoder.encode([[(slices[0], -1)]], stop))


def test_low_memory_drops_the_vision_weights_and_changes_no_answer(exact_folder: Path, images):
    with Model.load(exact_folder, exact=True) as usual:
        expected = [str(stream(usual, images[name], "What is it?").result()) for name in ("tiny", "square")]
        tokens = usual.encode_image(images["tiny"])
        assert usual.engine.encoder.tower.is_loaded
    with Model.load(exact_folder, exact=True, low_memory=True) as model:
        for name, answer in zip(("tiny", "square"), expected, strict=True):
            assert str(stream(model, images[name], "What is it?").result()) == answer
            tower, resampler = model.engine.encoder.tower, model.engine.encoder.resampler
            assert not tower.is_loaded
            assert not {"_embedding", "_post_norm"} & tower.__dict__.keys()
            assert "_weights" not in resampler.__dict__
        assert (model.encode_image(images["tiny"])[0] == tokens[0]).all()
        assert not tower.is_loaded


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_kv_types_answer_and_take_the_memory_they_should(kv_type):
    with Model.load("demo", kv_type=kv_type) as model:
        answer = stream(model, EXAMPLE, "What does it say?").result()
        assert str(answer) == "CAFE" or kv_type == "q4_0"
        assert answer.completion_tokens > 0
        rows = model.engine.run(lambda: model.engine.decoder.read_rows(answer_sequence(model), 0, 10))
        layers, heads, width = 3, 2, 64
        assert rows.form.position_bytes == 2 * layers * kv_bytes(kv_type, heads * width)
        needs = estimate_memory(model.engine.decoder.file, model.engine.encoder, 1000, exact=False, kv_type=kv_type)
        assert needs.kv_cache == 1000 * rows.form.position_bytes


def answer_sequence(model: Model) -> int:
    return next(s for s in range(model.engine.decoder.n_sequences) if model.engine.decoder.held(s))


def test_bytes_of_a_kv_cache():
    assert [kv_bytes(kind, 1024) for kind in ("f32", "f16", "q8_0", "q4_0")] == [4096, 2048, 1088, 576]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_type": "q5"}, "KV type is 'q5'; expected one of f16, q8_0, q4_0"),
        ({"kv_type": "q8_0", "exact": True}, "expected 'f32', which exact"),
        ({"cache_limit": 0}, "cache_limit is 0"),
        ({"adapters": ["a.gguf"]}, "expected a mapping from names to files"),
    ],
)
def test_settings_that_do_not_go_together_are_told(exact_folder, options, reason):
    with pytest.raises(MessageError, match=reason):
        Model.load(exact_folder, **options)


def test_heads_that_do_not_fit_the_blocks_of_a_kv_type_are_told(tmp_path):
    file = GGUFFile(mini_decoder().key("qwen3.attention.key_length", U32, 16).write(tmp_path / "m.gguf"))
    assert choose_kv_type(file, None, exact=False) == "f16"
    with pytest.raises(MessageError, match=r"blocks of 32 numbers, but heads of m.gguf have 16"):
        choose_kv_type(file, "q8_0", exact=False)


def test_vision_and_decoder_take_turns_in_low_memory(exact_model):
    file, encoder = exact_model.engine.decoder.file, exact_model.engine.encoder
    usual, low = (estimate_memory(file, encoder, 1000, exact=False, low_memory=low) for low in (False, True))
    assert low.total == low.kv_cache + low.compute + max(low.weights, low.vision)
    assert low.total < usual.total
    assert low.compute < usual.compute


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what a mapping holds")
def test_the_decoders_pages_are_given_back_before_a_picture_is_encoded(exact_folder: Path, images, monkeypatch):
    with Model.load(exact_folder, exact=True, low_memory=True) as model:
        begin, held = model.engine.decoder._region.begin, []
        encode = model.engine.encoder.encode
        monkeypatch.setattr(
            model.engine.encoder, "encode", lambda *call: held.append(resident_bytes(begin)) or encode(*call)
        )
        first = str(stream(model, "Hello", reuse=False).result())
        assert resident_bytes(begin) > 1_000_000
        assert stream(model, images["tiny"], "What is it?").result().completion_tokens
        assert held == [0]
        assert str(stream(model, "Hello", reuse=False).result()) == first


def resident_bytes(begin: int) -> int:
    """Bytes in memory of the mapping that begins at an address."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = int(line.split("-")[0], 16) == begin
        found += int(line.split()[1]) * 1024 if inside and line.startswith("Rss:") else 0
    return found


def test_in_low_memory_an_answer_goes_on_while_a_picture_is_encoded(exact_folder: Path, images, monkeypatch):
    """Layers are packed for all slices together, and left for a step of the answer after as many as a slice takes."""
    monkeypatch.setattr("edge_runtime.generation.text_stream.RepetitionDetector.feed", lambda self, token_id: False)
    monkeypatch.setattr("edge_runtime.vision.encoder.BATCH_PATCHES", 1)
    with Model.load(exact_folder, exact=True, low_memory=True) as model:
        alone = str(stream(model, images["strip"], "What is it?").result())
        told = str(model.chat("Tell me a story.", greedy=True, max_tokens=200))
        model.engine.scheduler.encoding.visual_tokens.clear()
        steps: list[str] = []
        advance, step = model.engine.encoder.tower.advance, model.engine.decoder.step
        monkeypatch.setattr(
            model.engine.encoder.tower, "advance", lambda *call: steps.append("layer") or advance(*call)
        )
        monkeypatch.setattr(model.engine.decoder, "step", lambda *call: steps.append("token") or step(*call))
        story = model.chat("Tell me a story.", greedy=True, max_tokens=200, stream=True, reuse=False)
        next(story)
        assert str(stream(model, images["strip"], "What is it?", reuse=False).result()) == alone
        assert str(story.result()) == told
    layers = model.engine.encoder.tower.config.layers
    slices = len(model.slices(images["strip"]))
    assert slices > 1
    assert steps.count("layer") == layers * slices, "nothing was computed twice"
    at_work = "".join(step[0] for step in steps).strip("t")
    assert max(map(len, at_work.split("t"))) <= layers
    assert "t" in at_work, "the story waited for the whole picture"


def test_low_memory_drops_them_after_a_cancelled_request_too(exact_folder: Path, images):
    with Model.load(exact_folder, exact=True, low_memory=True) as model:
        running = stream(model, images["wide"], "What is it?")
        running.on_progress = lambda progress: running.cancel() if progress.share > 0 else None
        assert running.result().finish_reason == "cancelled"
        for _ in range(100):
            if not model.engine.encoder.tower.is_loaded:
                break
            time.sleep(0.05)
        assert not model.engine.encoder.tower.is_loaded


def test_a_cancelled_reader_may_not_be_kept_waiting_by_a_full_house(model, monkeypatch):
    """A request that was cancelled counts no more, even while the engine has not left it yet."""
    monkeypatch.setattr("edge_runtime.engine.engine.MAX_REQUESTS", 2)
    for _ in range(6):
        kept = [stream(model, "Tell me a story.") for _ in range(2)]
        for one in kept:
            one.cancel()
        assert {one.result().finish_reason for one in kept} == {"cancelled"}
    assert stream(model, "Hello").result().completion_tokens > 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give memory back by themselves")
def test_freed_memory_goes_back_when_the_engine_rests(model, images, monkeypatch):
    given_back = threading.Event()
    real = memory.give_back
    monkeypatch.setattr("edge_runtime.engine.encoding.give_back", lambda: real() or given_back.set())
    stream(model, "Hello").result()
    assert not given_back.wait(0.6)  # there was no picture
    stream(model, images["tiny"], "Hello").result()
    assert given_back.wait(5)
    assert memory._malloc_trim() is not None


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what a mapping holds")
def test_pages_of_the_vision_file_do_not_stay_beside_the_packed_weights(tmp_path, checkpoint, images):
    from edge_converters import convert_checkpoint

    files = convert_checkpoint(checkpoint, tmp_path, decoder_type="f32", vision_type="f32")

    def resident_kb() -> int:
        found, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            inside = str(files.mmproj) in line if "-" in line.split()[0] else inside
            found += int(line.split()[1]) if inside and line.startswith("Rss:") else 0
        return found

    with Model.load(tmp_path, exact=True, n_ctx=256) as model:
        model.engine.encoder.file.blocks("v.post_ln.weight").sum()
        assert resident_kb() > 0
        tokens = model.encode_image(images["tiny"])
        assert resident_kb() == 0
        assert (model.encode_image(images["tiny"])[0] == tokens[0]).all()  # what is read again is the same
