"""Beam search: token for token what transformers finds, in the KV cache that all requests share."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edge_runtime import MessageError, Model
from edge_runtime.cli.program import main
from edge_runtime.decoder.embedding import embed
from edge_runtime.generation.beam_search import BeamSearch
from naive_beams import beam_search
from support.command import refused

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "sign.png")
QUESTIONS = ["What is it?", "Say something.", "Why?", "Tell me a story.", "Hello", "the the the the"]


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


def full_prefill(model: Model, messages):
    """A function from generated ids to the next logits that computes everything anew, without a shared cache."""
    prepared = model.prepare(messages)
    prompt = model.engine.run(lambda: model.embeddings(prepared))

    def logits_after(ids):
        rows = embed(model.engine.decoder, np.array(ids, np.int64), {}) if ids else prompt[:0]

        def compute():
            model.engine.decoder.prefill(np.concatenate([prompt, rows]))
            return model.engine.decoder.logits()

        return model.engine.run(compute)

    return logits_after


def ids_of(answer) -> list[int]:
    return [token.id for token in answer.logprobs]


def check(model: Model, messages, n_beams=3, penalty=1.2, bias=None, most_tokens=24) -> str:
    """Compare with the definition; returns why the answer ended."""
    stop_ids = sorted(model.tokenizer.stop_ids)
    want = beam_search(
        full_prefill(model, messages),
        n_beams,
        stop_ids=stop_ids,
        most_tokens=most_tokens,
        repetition_penalty=penalty,
        logit_bias=bias,
    )
    options = {"repetition_penalty": penalty, "max_tokens": most_tokens, "logprobs": True, "logit_bias": bias}
    got = model.chat(messages, beams=n_beams, **options)
    ended = want[-1] in stop_ids
    assert ids_of(got) == (want[:-1] if ended else want)
    assert (got.finish_reason, got.completion_tokens) == ("stop" if ended else "length", len(want))
    return got.finish_reason


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_answer_is_the_one_transformers_finds(model, question):
    check(model, question)


@pytest.mark.parametrize("n_beams", [2, 3, 5, 8])
def test_answers_that_end_are_those_transformers_finds(model, n_beams):
    """Stop tokens made likely, so that hypotheses finish, beat each other and end the search."""
    first, last = sorted(model.tokenizer.stop_ids)
    reasons = [
        check(model, question, n_beams, penalty, {first: bias, last: bias - 1.0, 40: -2.0}, 30)
        for question, penalty, bias in zip(QUESTIONS, (1.2, 1.0, 3.0, 1.2, 0.7, 1.2), (2, 3, 4, 5, 6, 8), strict=True)
    ]
    assert reasons.count("stop") >= 3


def test_a_picture_in_the_prompt(model, images):
    check(model, [{"role": "user", "content": [images["square"], "What is it?"]}], most_tokens=12)


def test_sampling_false_is_the_official_search(model):
    answers = {
        str(model.chat(QUESTIONS[0], max_tokens=16, **options))
        for options in ({"sampling": False}, {"beams": 3}, {"beams": 3, "repetition_penalty": 1.2, "seed": 5})
    }
    assert len(answers) == 1
    assert str(model.chat(QUESTIONS[0], max_tokens=16, sampling=False, beams=1)) == str(
        model.chat(QUESTIONS[0], max_tokens=16, greedy=True, repetition_penalty=1.2)
    )


def test_a_search_among_other_requests_finds_the_same(model, images):
    def begin():
        others = [model.chat(question, stream=True, greedy=True, max_tokens=40) for question in QUESTIONS]
        searches = [model.submit(question, beams=3, max_tokens=20)[0] for question in QUESTIONS[:4]]
        picture = [{"role": "user", "content": [images["tiny"], "Which?"]}]
        return [one.result() for one in [*others, *searches, *model.submit(picture, beams=8, max_tokens=10)]]

    alone = [str(model.chat(question, beams=3, max_tokens=20)) for question in QUESTIONS[:4]]
    answers = [str(answer) for answer in begin()]
    assert answers[len(QUESTIONS) : -1] == alone
    assert answers[: len(QUESTIONS)] == [str(model.chat(q, greedy=True, max_tokens=40)) for q in QUESTIONS]
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


def test_the_prompt_is_computed_once_and_held_once(model, monkeypatch):
    rows, step = [], model.engine.decoder.step
    monkeypatch.setattr(
        model.engine.decoder,
        "step",
        lambda parts, *rest: rows.append([len(p.keys) for p in parts]) or step(parts, *rest),
    )
    answer = model.chat("A question that nobody has asked before.", beams=3, max_tokens=10)
    assert sum(rows[0]) == answer.prompt_tokens - answer.cached_tokens
    assert all(counts == [1, 1, 1] for counts in rows[1:])
    assert len(rows) == 10


def test_a_full_cache_preempts_a_search_and_changes_no_answer(exact_folder, monkeypatch):
    with Model.load(exact_folder, exact=True, n_ctx=256) as small:  # llama.cpp makes it 256 at least
        scheduler, thrown = small.engine.scheduler, []
        release = scheduler.sequences.release
        monkeypatch.setattr(scheduler.sequences, "release", lambda task: thrown.append(task.beams) or release(task))
        options = {"max_tokens": 30, "repetition_penalty": 1.2}
        alone = [str(small.chat(question, beams=3, **options)) for question in QUESTIONS[:3]]
        ends = len(thrown)
        (long,) = small.submit("Tell me more of it. " * 11, greedy=True, max_tokens=100)
        searches = [small.submit(question, beams=3, **options)[0] for question in QUESTIONS[:3]]
        assert [str(one.result()) for one in searches] == alone
        assert long.result().finish_reason in ("stop", "length")
        assert sum(run is not None for run in thrown[ends:]) > len(searches), "no search was preempted"
        assert sorted(scheduler.sequences.idle) == list(range(small.engine.decoder.n_sequences))


def test_beams_that_fill_the_cache_alone_end_with_length(exact_folder):
    with Model.load(exact_folder, exact=True, n_ctx=256) as small:
        question = "Tell me more of it. " * 12
        room = 256 - len(small.build_prompt(question).ids)
        assert 16 < room < 100
        answer = small.chat(question, beams=8, logit_bias=dict.fromkeys(small.tokenizer.stop_ids, -100.0))
        assert answer.finish_reason == "length"
        assert 0 < answer.completion_tokens < room
        assert answer.answer


def test_a_search_can_be_cancelled(model):
    (stream,) = model.submit("Tell me a story.", beams=3, max_tokens=2000)
    threading.Timer(0.2, stream.cancel).start()
    assert stream.result().finish_reason == "cancelled"
    while model.engine.scheduler.is_busy:  # the reader is told at once, the sequences are free after the step at work
        time.sleep(0.01)
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


def test_stop_strings_and_reasoning(model):
    whole = model.chat("Why?", beams=3, max_tokens=16).answer
    cut = model.chat("Why?", beams=3, max_tokens=16, stop=whole[3:5])
    assert (cut.answer, cut.finish_reason) == (whole[: whole.index(whole[3:5])], "stop")
    thought = model.chat("Why?", beams=3, max_tokens=16, thinking=True)
    assert thought.reasoning
    assert not thought.answer


def test_log_probabilities_are_those_of_the_model(model):
    answer = model.chat("Why?", beams=3, max_tokens=6, logprobs=True, top_logprobs=2, logit_bias={40: 5.0})
    logits_after = full_prefill(model, "Why?")
    for i, token in enumerate(answer.logprobs):
        logits = logits_after(ids_of(answer)[:i]).astype(np.float64)
        want = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert token.logprob == pytest.approx(want[token.id], abs=1e-4)
        assert [other.id for other in token.top_logprobs] == np.argsort(-want)[:2].tolist()


def test_enough_beams_find_the_best_of_all_answers():
    """Against all 4^4 answers of a small chain, which ends at token 0 or after four tokens."""
    table = np.random.default_rng(3).normal(0, 2, (5, 4)).astype(np.float32)
    logs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))

    def mean(ids):
        return sum(logs[before, token] for before, token in zip([4, *ids], ids, strict=False)) / len(ids)

    complete = [
        ids
        for n in range(1, 5)
        for ids in itertools.product(range(4), repeat=n)
        if 0 not in ids[:-1] and (ids[-1] == 0 or n == 4)
    ]
    search = BeamSearch(128, stop_ids={0}, most_tokens=4)
    while not search.is_done:
        search.advance([table[beam.ids[-1] if beam.ids else 4] for beam in search.beams])
    assert search.best.ids == max(complete, key=mean)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beams": 3, "stream": True}, "stream"),
        ({"sampling": False, "stream": True}, "stream"),
        ({"beams": 0}, "beams is 0"),
        ({"beams": 9}, "beams is 9; expected a whole number from 1 to 8"),
        ({"beams": True}, "beams"),
        ({"beams": 3, "temperature": 0.7}, "temperature"),
        ({"sampling": False, "greedy": True}, "greedy"),
        ({"beams": 3, "thinking_budget": 5, "thinking": True}, "thinking_budget"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_search_is_refused(model, options, named):
    with pytest.raises(MessageError, match=named):
        model.chat("Hello", **options)


def test_several_answers_do_not_go_with_a_search(model):
    with pytest.raises(MessageError, match="n is 2, but a beam search finds one answer"):
        model.chat_n("Hello", 2, beams=3)


def test_an_event_loop_may_wait_for_a_search_but_not_stream_it(model):
    async def both():
        with pytest.raises(MessageError, match="stream was given together with a beam search"):
            async for _ in model.achat("Why?", beams=3):
                pass
        return await model.achat("Why?", beams=3, max_tokens=8)

    assert str(asyncio.run(both())) == str(model.chat("Why?", beams=3, max_tokens=8))


def test_the_command_searches_and_refuses_in_one_sentence():
    result = CliRunner().invoke(main, ["run", EXAMPLE, "What does it say?", "--beams", "3"])
    assert (result.exit_code, result.stdout) == (0, "CAFE\n")
    refused(["run", "Hello", "--beams", "3", "--temperature", "0.5"], "temperature was given together")
    refused(["run", "Hello", "--beams", "99"], "beams is 99")
