"""What was computed for one question is not computed again for the next, and never used for another picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime import Model
from edge_runtime.cache.visual_tokens import VisualTokenCache
from edge_runtime.pipeline import group_digest


@pytest.fixture
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


@pytest.fixture
def encoded(model: Model, monkeypatch) -> list[int]:
    """Slices of every batch that goes through the vision tower from now on."""
    batches, encode = [], model.engine.encoder.tower.encode
    monkeypatch.setattr(
        model.engine.encoder.tower,
        "encode",
        lambda slices, *more: batches.append(len(slices)) or encode(slices, *more),
    )
    return batches


def ask(model: Model, *content, **options):
    return model.chat([{"role": "user", "content": [*content]}], greedy=True, max_tokens=6, **options)


def alone(folder: Path, *content) -> str:
    with Model.load(folder, exact=True) as fresh:
        return str(ask(fresh, *content))


def test_the_second_question_about_a_picture_neither_encodes_nor_prefills_it(model, exact_folder, images, encoded):
    first = ask(model, images["wide"], "What is it?")
    assert first.cached_tokens == 0
    assert sum(encoded) == len(first.slices)
    encoded.clear()
    second = ask(model, images["wide"], "Which colour has it?")
    assert not encoded
    assert second.cached_tokens > second.visual_tokens
    assert second.cached_tokens < second.prompt_tokens
    assert str(second) == alone(exact_folder, images["wide"], "Which colour has it?")


def test_a_chat_goes_on_where_it_stopped(model, exact_folder, images, encoded):
    question = {"role": "user", "content": [images["square"], "What is it?"]}
    first = model.chat([question], greedy=True, max_tokens=6)
    encoded.clear()
    chat = [question, {"role": "assistant", "content": str(first)}, {"role": "user", "content": "And now?"}]
    second = model.chat(chat, greedy=True, max_tokens=6)
    assert not encoded
    assert second.cached_tokens > second.visual_tokens
    with Model.load(exact_folder, exact=True) as fresh:
        assert str(second) == str(fresh.chat(chat, greedy=True, max_tokens=6))


def test_the_same_question_again_computes_one_token_of_the_prompt(model, images):
    first, second = (ask(model, images["tiny"], "What is it?") for _ in range(2))
    assert second.cached_tokens == second.prompt_tokens - 1
    assert str(second) == str(first)


def test_a_prompt_is_computed_anew_where_that_is_asked_for(model, images, encoded):
    """Of memory only the visual tokens are taken; what was computed serves the next request."""
    first = ask(model, images["tiny"], "What is it?")
    anew = ask(model, images["tiny"], "What is it?", reuse=False)
    assert (first.cached_tokens, anew.cached_tokens, len(encoded)) == (0, 0, 1)
    assert str(anew) == str(first)
    assert ask(model, images["tiny"], "What is it?").cached_tokens == first.prompt_tokens - 1


def test_answers_to_one_prompt_compute_it_once_and_take_nothing_from_others(model, monkeypatch):
    question = "Is this a longer question than most, whose prompt is worth waiting for?"
    asked = model.chat(question, greedy=True, max_tokens=4)
    rows = []
    step = model.engine.decoder.step
    monkeypatch.setattr(
        model.engine.decoder,
        "step",
        lambda parts, *more: rows.append(sum(len(p.keys) for p in parts)) or step(parts, *more),
    )
    answers = model.chat_n(question, 3, seed=1, max_tokens=4, reuse=False)
    assert answers[0].cached_tokens == 0
    assert asked.prompt_tokens <= sum(rows) < 2 * asked.prompt_tokens + 20
    rows.clear()
    streams = [*model.submit(question, reuse=False, max_tokens=4), *model.submit(question, reuse=False, max_tokens=4)]
    assert [stream.result().cached_tokens for stream in streams] == [0, 0], "nor from one that began beside it"


def test_another_picture_of_the_same_size_is_another_picture(model, exact_folder, images, encoded):
    picture = Image.open(images["square"]).convert("RGB")
    other = picture.copy()
    other.putpixel((3, 3), tuple(255 - value for value in picture.getpixel((3, 3))))
    ask(model, picture, "What is it?")
    encoded.clear()
    answer = ask(model, other, "What is it?")
    assert encoded
    assert answer.cached_tokens < answer.prompt_tokens - answer.visual_tokens
    assert str(answer) == alone(exact_folder, other, "What is it?")


def test_a_picture_seen_before_is_not_encoded_in_another_place(model, exact_folder, images, encoded):
    ask(model, images["tiny"], images["square"], "Which?")
    encoded.clear()
    answer = ask(model, images["square"], images["tiny"], images["square"], "Which?")
    assert not encoded
    assert str(answer) == alone(exact_folder, images["square"], images["tiny"], images["square"], "Which?")


def test_times_are_part_of_a_group(model, images):
    frames = model.slices(images["tiny"], 1), model.slices(images["tiny"], 1)
    pairs = [[(frames[0][0], a), (frames[1][0], b)] for a, b in ((0, 1), (1, 0), (0, 2))]
    assert len({group_digest(pair) for pair in pairs}) == 3


def test_a_cancelled_request_leaves_nothing_wrong_behind(model, exact_folder, images, monkeypatch):
    monkeypatch.setattr("edge_runtime.engine.call_plan.CHUNK_TOKENS", 16)
    stream = model.chat([{"role": "user", "content": [images["wide"], "Tell me more."]}], stream=True, greedy=True)
    stream.on_progress = lambda progress: stream.cancel() if progress.stage == "prefill" else None
    assert stream.result().finish_reason == "cancelled"
    assert str(ask(model, images["wide"], "Tell me less.")) == alone(exact_folder, images["wide"], "Tell me less.")


def test_the_cache_forgets_what_was_not_used_for_longest():
    cache, tokens = VisualTokenCache(limit_bytes=100), np.zeros((2, 5), np.float32)
    for name in (b"a", b"b"):
        cache.put(name, tokens)
    assert cache.get(b"a") is not None
    cache.put(b"c", tokens)
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert cache.get(b"c") is not None
    cache.put(b"d", np.zeros(100, np.float32))
    assert cache.get(b"d") is None
    assert cache.get(b"a") is not None
