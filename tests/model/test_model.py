"""Model and engine: goldens end to end, streams, limits, cancelling, threads, life and death."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import EdgeRuntimeError, MessageError, Model, ModelFileError, PromptTooLongError
from edge_runtime.engine.events import Progress
from prompt.test_build import CHATS, case_of
from tolerances import LOGITS

EXAMPLE = Path(__file__).parents[2] / "examples" / "sign.png"


@pytest.mark.parametrize("name", CHATS)
def test_answers_equal_the_goldens(exact_model: Model, images, name):
    messages, options, want = case_of(name, images)
    trace = exact_model.trace(messages, len(want["greedy"]), **options)
    np.testing.assert_allclose(trace.logits, want["logits_last"], rtol=0, atol=LOGITS)
    assert trace.greedy == want["greedy"].tolist()


def test_chunks_change_nothing(exact_model: Model, images, monkeypatch):
    """A prompt may be cut anywhere, also inside a picture: only the size of the chunks decides."""
    messages = [{"role": "user", "content": [images["tiny"], "What is it?"]}]
    whole = exact_model.trace(messages, 4)
    monkeypatch.setattr("edge_runtime.decoder.decoder.CHUNK_TOKENS", 37)
    cut = exact_model.trace(messages, 4)
    np.testing.assert_allclose(cut.logits, whole.logits, rtol=0, atol=LOGITS)
    assert cut.greedy == whole.greedy


def test_embeddings_decode_like_tokens(exact_model: Model):
    """Prefill from looked-up embedding rows gives the logits that llama.cpp gives for the ids themselves."""
    ids = exact_model.build_prompt("Say something.").ids
    first = exact_model.trace("Say something.", 0).logits

    def by_tokens() -> np.ndarray:
        decoder = exact_model.engine.decoder
        decoder.prefill(decoder.embed(np.array(ids[:1])))
        for token in ids[1:]:
            decoder.decode(token)
        return decoder.logits()

    np.testing.assert_allclose(exact_model.engine.run(by_tokens), first, rtol=0, atol=LOGITS)


def test_the_demo_model_reads(demo: Model):
    with Image.open(EXAMPLE) as picture:
        answer = demo.chat([{"role": "user", "content": [picture, "What does it say?"]}], greedy=True)
    assert str(answer) == "CAFE"
    assert answer.finish_reason == "stop"
    assert answer.reasoning is None
    assert answer.slices == [[154, 84]] + [[126, 98]] * 6
    assert answer.visual_tokens == 7 * 16
    assert set(answer.timings_s) == {"load", "image", "encode", "prefill", "first_token", "decode", "total"}
    assert 0 < answer.timings_s["encode"] < answer.timings_s["first_token"] <= answer.timings_s["total"]


def test_the_answer_depends_on_the_picture(demo: Model):
    """Nothing is worse than an answer that never looked."""
    blank = Image.new("RGB", (320, 160), (246, 240, 225))
    assert str(demo.chat([{"role": "user", "content": [blank, "What does it say?"]}], greedy=True)) != "CAFE"


def test_a_stream_is_the_answer_in_pieces(demo: Model):
    picture = Image.open(EXAMPLE).convert("RGB").point(lambda value: value ^ 1)  # none of its slices was seen before
    messages = [{"role": "user", "content": [picture, "What does it say?"]}]
    stream = demo.chat(messages, stream=True, greedy=True)
    progress: list[Progress] = []
    stream.on_progress = progress.append
    pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == str(stream.result()) == "CAFE"
    assert len(pieces) > 1
    encoded = [p.done for p in progress if p.stage == "encode"]
    assert encoded[0] == 0
    assert encoded[-1] == 7
    assert [p.stage for p in progress][-1] == "prefill"


def test_thinking_is_split_by_ids(exact_model: Model, monkeypatch):
    """Force the ids that a thinking model would write; random weights never write `</think>`."""
    tokenizer = exact_model.tokenizer
    end, stop = tokenizer.special_ids["</think>"], tokenizer.special_ids["<|im_end|>"]
    script = iter([*tokenizer.encode("it says </think>, hm\n"), end, *tokenizer.encode("\n\nblue"), stop])
    monkeypatch.setattr("edge_runtime.generation.sampling.Sampler.sample", lambda self, context, row: next(script))
    answer = exact_model.chat("Why?", thinking=True)
    assert (answer.reasoning, answer.answer, answer.finish_reason) == ("it says </think>, hm", "blue", "stop")


def test_max_tokens_and_stop_strings(exact_model: Model):
    whole = exact_model.chat("Tell me.", greedy=True, max_tokens=12)
    assert (whole.finish_reason, whole.completion_tokens) == ("length", 12)
    marker = whole.answer[3:5]
    cut = exact_model.chat("Tell me.", greedy=True, max_tokens=12, stop=[marker])
    assert cut.finish_reason == "stop"
    assert cut.answer == whole.answer[: whole.answer.index(marker)]


def test_the_context_ends_an_answer(exact_folder: Path):
    with Model.load(exact_folder, exact=True, n_ctx=64) as model:
        model.tokenizer.stop_ids = frozenset()
        answer = model.chat("Tell me.", greedy=True)
        assert answer.finish_reason == "length"
        assert answer.prompt_tokens + answer.completion_tokens == 64


def test_a_prompt_that_does_not_fit_is_refused_with_numbers(exact_folder: Path, images):
    with Model.load(exact_folder, exact=True, n_ctx=64) as model:
        with pytest.raises(PromptTooLongError, match=r"\d+ tokens, but the context holds 64"):
            model.chat([{"role": "user", "content": [images["tiny"], "What is it?"]}])
        assert model.chat("Hi", max_tokens=1).completion_tokens == 1


def test_cancelling_ends_an_answer_and_not_the_model(exact_model: Model):
    stream = exact_model.chat("Tell me.", stream=True, greedy=True, max_tokens=400)
    pieces = iter(stream)
    next(pieces)
    stream.cancel()
    rest = list(pieces)
    assert stream.result().finish_reason == "cancelled"
    assert len(rest) < 398
    assert exact_model.chat("Tell me.", max_tokens=2).completion_tokens == 2


def test_cancelling_before_the_first_token(exact_model: Model, images):
    stream = exact_model.chat([{"role": "user", "content": [images["large"], "What?"]}], stream=True)
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    assert stream.result().completion_tokens == 0


def test_a_stream_left_early_stops_the_work(exact_model: Model):
    for _ in exact_model.chat("Tell me.", stream=True, greedy=True, max_tokens=3000):
        break
    started = time.perf_counter()
    exact_model.chat("Tell me.", max_tokens=1)
    assert time.perf_counter() - started < 60  # it would never come if the first answer held the thread


def test_requests_from_several_threads_do_not_mix(demo: Model):
    """Eight threads, each with its own picture; numba and llama.cpp see one thread."""
    questions = {"What does it say?": "CAFE", "Who are you?": "I am a tiny demo model."}
    answers: list[tuple[str, str]] = []

    def ask(question: str, content: list) -> None:
        answers.append((question, str(demo.chat([{"role": "user", "content": content}], greedy=True))))

    threads = [
        threading.Thread(target=ask, args=(q, [EXAMPLE, q] if q.startswith("What") else [q]))
        for q in [*questions] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert all(questions[question] == answer for question, answer in answers)


def test_a_closed_model_says_so(exact_folder: Path):
    model = Model.load(exact_folder)
    model.close()
    model.close()
    with pytest.raises(EdgeRuntimeError, match="closed"):
        model.chat("Hi")


def test_a_forgotten_model_frees_its_memory(exact_folder: Path):
    model = Model.load(exact_folder)
    model.chat("Hi", max_tokens=1)
    engine = weakref.ref(model.engine)
    thread = model.engine.thread
    del model
    gc.collect()
    assert engine() is None
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_wrong_options_are_refused_before_anything_is_computed(exact_model: Model, exact_folder: Path):
    wrong = {"max_tokens": (0, "many", True), "max_slices": (0, "two"), "temperature": (-1,), "stop": (5, [5])}
    wrong |= {"tools": (5, [5])}
    for options in ({name: value} for name, values in wrong.items() for value in values):
        with pytest.raises(MessageError, match=next(iter(options))):
            exact_model.chat("Hi", **options)
    with pytest.raises(TypeError, match="colour"):
        exact_model.chat("Hi", colour="red")
    with pytest.raises(MessageError, match="n_ctx"):
        Model.load(exact_folder, n_ctx=0)
    with pytest.raises(MessageError, match="n_threads"):
        Model.load(exact_folder, n_threads=0)


def test_weights_that_are_not_numbers_are_an_error_not_an_answer(exact_folder: Path, tmp_path: Path, images):
    """NaN in the vision tower or the decoder: an answer would be made up."""
    for name, tensor in (
        ("mmproj-model-f32.gguf", "v.post_ln.weight"),
        ("ggml-model-F32.gguf", "output_norm.weight"),
    ):
        folder = tmp_path / tensor
        folder.mkdir()
        for file in exact_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        with Model.load(exact_folder) as good:
            reader = good.engine.encoder.file if "mmproj" in name else good.engine.decoder.file
            info = reader.tensors[tensor]
        with (folder / name).open("rb+") as file:
            file.seek(info.offset)
            file.write(np.full(4, np.nan, np.float32).tobytes())
        with Model.load(folder) as model, pytest.raises(ModelFileError, match="not finite"):
            model.chat([{"role": "user", "content": [images["tiny"], "What?"]}])
