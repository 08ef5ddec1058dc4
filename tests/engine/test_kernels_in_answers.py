"""Whole answers with our kernels inside llama.cpp: batches, beams, adapters, KV types, caches, cancels and forks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import Model
from edge_runtime.decoder.kernel_products import VARIABLE
from support.forks import in_a_fork
from support.lora_maker import make_adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
DECODER = Path(__file__).parents[2] / "edge_runtime" / "demo" / "ggml-model-Q4_K_M.gguf"
SIGN = [{"role": "user", "content": [EXAMPLES / "sign.png", "What does it say?"]}]
QUESTIONS = [SIGN, "Who are you?", "What can you do?", "Say something.", SIGN, "Why?"]


def load(**options: Any) -> Model:
    """The demo model, whose decoder is smaller than those that take our kernels by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "on")
        model = Model.load("demo", n_ctx=2048, **options)
    assert model.engine.decoder.uses_kernels
    return model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load() as loaded:
        yield loaded


def test_requests_together_get_the_answers_they_get_alone(model):
    alone = [str(model.chat(question, greedy=True, max_tokens=6)) for question in QUESTIONS]
    streams = [model.chat(question, greedy=True, max_tokens=6, stream=True) for question in QUESTIONS]
    assert [str(stream.result()) for stream in streams] == alone
    assert alone[0] == "CAFE"


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantised_caches(kv_type):
    with load(kv_type=kv_type) as model:
        assert str(model.chat(SIGN, greedy=True, max_tokens=6)) == "CAFE"


def test_beams(model):
    answer = model.chat(SIGN, beams=3, max_tokens=6)
    assert str(answer) == "CAFE"
    others = [model.chat("Who are you?", greedy=True, max_tokens=20, stream=True) for _ in range(2)]
    (search,) = model.submit(SIGN, beams=3, max_tokens=6)
    assert str(search.result()) == str(answer)
    assert len({str(other.result()) for other in others}) == 1


def test_adapters(tmp_path):
    path = tmp_path / "adapter.gguf"
    make_adapter(path, DECODER, seed=0, scale=2.0)
    with load(adapters={"one": path}) as model:
        plain, adapted = (str(model.chat(SIGN, greedy=True, max_tokens=6, adapter=name)) for name in (None, "one"))
        assert plain == "CAFE"
        assert adapted != plain
        streams = [
            model.chat(SIGN, greedy=True, max_tokens=6, adapter=name, stream=True) for name in (None, "one", None)
        ]
        assert [str(stream.result()) for stream in streams] == [plain, adapted, plain]


def test_saved_prefixes(tmp_path):
    question = [{"role": "user", "content": [EXAMPLES / "sign.png", "What does it say? " * 20]}]
    answers = []
    for _ in range(2):
        with load(cache_dir=tmp_path) as model:
            answers.append(model.chat(question, greedy=True, max_tokens=6))
    first, second = answers
    assert first.cached_tokens == 0
    assert second.cached_tokens > 100
    assert str(first) == str(second)


def test_a_long_prompt_is_cancelled_and_leaves_nothing(model):
    stream = model.chat("Tell me about the sea. " * 120, max_tokens=6, stream=True)
    other = model.chat(SIGN, greedy=True, max_tokens=6, stream=True)
    stream.cancel()
    assert stream.result().finish_reason == "cancelled"
    assert str(other.result()) == "CAFE"
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_is_refused_and_ends_without_harm(model):
    assert "load models after the fork" in in_a_fork(lambda: model.chat("Why?", max_tokens=2))
    assert "load no model before the fork" in in_a_fork(load)
    assert in_a_fork(model.close) == "None"
    assert in_a_fork(lambda: 1, leave=sys.exit) == "1"  # with what is registered for exit
    assert str(model.chat(SIGN, greedy=True, max_tokens=6)) == "CAFE"
