"""Log probabilities of a prompt's tokens against logits computed one token at a time, and prompts given in tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_runtime import Model
from edge_runtime.errors import MessageError
from edge_runtime.generation.logprobs import log_softmax

TEXT = "I am a tiny demo model. Send me a picture of a red square, please, and tell me what it says. " * 2


def expected(model: Model, ids: list[int]) -> list[float]:
    """Of every token but the first, from logits behind each beginning."""

    def compute() -> list[float]:
        decoder = model.engine.decoder
        decoder.prefill(decoder.embed(np.array(ids[:1])))
        found = []
        for token_id in ids[1:]:
            found.append(float(log_softmax(decoder.logits())[token_id]))
            decoder.decode(token_id)
        return found

    return model.engine.run(compute)


def scores(model: Model, **options: object) -> list[tuple[int, float]]:
    answer = model.chat(options.pop("text", ""), raw=True, logprobs=True, prompt_logprobs=True, **options)
    return [(item.id, item.logprob) for item in answer.prompt_logprobs]


def test_they_are_the_models_own(exact_model):
    ids = exact_model.build_prompt(TEXT, raw=True).ids
    assert len(ids) > 70, "several calls are needed"
    told = scores(exact_model, text=TEXT, max_tokens=2)
    assert [token_id for token_id, _ in told] == ids
    assert math.isnan(told[0][1])
    np.testing.assert_allclose([value for _, value in told[1:]], expected(exact_model, ids), atol=2e-4)


def test_what_was_computed_before_does_not_matter(exact_model):
    """A beginning that is known has no logits: it is computed anew, beside other requests, too."""
    first = scores(exact_model, text=TEXT, max_tokens=1)
    others = [exact_model.submit(TEXT, raw=True, max_tokens=20)[0] for _ in range(3)]
    again = scores(exact_model, text=TEXT, max_tokens=1)
    for other in others:
        other.result()
    np.testing.assert_allclose([v for _, v in again[1:]], [v for _, v in first[1:]], atol=2e-4)


def test_the_answer_is_as_without(exact_model):
    plain = exact_model.chat(TEXT, raw=True, max_tokens=8, temperature=0)
    told = exact_model.chat(TEXT, raw=True, max_tokens=8, temperature=0, logprobs=True, prompt_logprobs=True)
    assert told.answer == plain.answer
    assert told.cached_tokens == 0


def test_the_most_probable_tokens_are_told(exact_model):
    answer = exact_model.chat("I am", raw=True, max_tokens=1, logprobs=True, top_logprobs=3, prompt_logprobs=True)
    assert [len(item.top_logprobs) for item in answer.prompt_logprobs] == [0, *[3] * (answer.prompt_tokens - 1)]
    assert {item.kind for item in answer.prompt_logprobs} == {"prompt"}


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 65])
def test_prompts_of_every_length(exact_model, n):
    ids = [5 + i % 60 for i in range(n)]
    told = scores(exact_model, prompt_ids=ids, prompt_only=True)
    assert [token_id for token_id, _ in told] == ids
    np.testing.assert_allclose([value for _, value in told[1:]], expected(exact_model, ids), atol=2e-4)


def test_one_answer_of_several_tells_them(exact_model):
    one, other = exact_model.chat_n("I am", 2, raw=True, max_tokens=1, logprobs=True, prompt_logprobs=True)
    assert len(one.prompt_logprobs) == one.prompt_tokens
    assert other.prompt_logprobs == []


def test_the_prompt_alone(demo):
    answer = demo.chat("I am a", raw=True, prompt_only=True)
    assert (answer.answer, answer.completion_tokens, answer.finish_reason) == ("", 0, "length")
    assert answer.prompt_logprobs is None


def test_prompts_in_tokens(demo):
    ids = demo.build_prompt("I am a", raw=True).ids
    by_text = demo.chat("I am a", raw=True, max_tokens=6, temperature=0)
    by_ids = demo.chat("", raw=True, prompt_ids=ids, max_tokens=6, temperature=0)
    assert (by_ids.answer, by_ids.prompt_tokens) == (by_text.answer, len(ids))
    for wrong in ([], [1 << 30], [-1], ["a"], [True], 5):
        with pytest.raises(MessageError, match="prompt"):
            demo.chat("", raw=True, prompt_ids=wrong)
    with pytest.raises(MessageError, match="raw"):
        demo.chat("", prompt_ids=[1])


def test_the_token_that_ends_an_answer_is_told_apart(demo):
    answer = demo.chat("Who are you?", temperature=0, logprobs=True, top_logprobs=1)
    assert answer.end_logprobs.id in demo.tokenizer.stop_ids
    assert answer.completion_tokens == len(answer.logprobs) + 1
    assert demo.chat("Who are you?", temperature=0, logprobs=True, max_tokens=2).end_logprobs is None
    assert demo.chat("Who are you?", temperature=0).end_logprobs is None


def test_what_cannot_be_scored_is_refused(demo, images):
    with pytest.raises(MessageError, match="logprobs is off"):
        demo.chat("Hi", prompt_logprobs=True)
    with pytest.raises(MessageError, match="beam search"):
        demo.chat("Hi", prompt_logprobs=True, logprobs=True, beams=2)
    picture = next(iter(images.values()))
    with pytest.raises(MessageError, match="pictures"):
        demo.chat([{"role": "user", "content": [picture, "What?"]}], prompt_logprobs=True, logprobs=True)
