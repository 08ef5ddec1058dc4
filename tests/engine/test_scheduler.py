"""Many requests at once: the same answers as one after the other, flowing side by side, whatever becomes of some."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime import CacheFull, EngineBusy, Model, ModelFileError, PromptTooLongError
from edge_runtime.engine.scheduler import Scheduler
from edge_runtime.engine.sequences import Sequences

ENDS = ("stop", "length", "repetition")
FLIP = Image.Transpose.FLIP_LEFT_RIGHT
QUESTIONS = [
    "What is it?", "Say something.", "Why?", "Count to three.", "Which colour is the sky?", "Tell me a story.",
    "Hello", "Who are you?", "What does it say?", "One more.",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


def stream(model: Model, *content, **options):
    options = {"greedy": True, "max_tokens": 12} | options
    return model.chat([{"role": "user", "content": [*content]}], stream=True, **options)


def text(answers) -> list[str]:
    return [str(answer.result()) for answer in answers]


def test_answers_are_those_of_requests_one_after_the_other(model, images):
    requests = [(question,) for question in QUESTIONS]
    requests += [(images["tiny"], QUESTIONS[0]), (images["wide"], QUESTIONS[1]), (images["square"], QUESTIONS[0])]
    alone = [str(stream(model, *content).result()) for content in requests]
    together = text([stream(model, *content) for content in requests])
    assert together == alone
    assert len(set(alone)) > 5, "these answers do not tell requests apart"


def test_answers_flow_while_a_long_prompt_is_worked_on(model, images, monkeypatch):
    monkeypatch.setattr("edge_runtime.engine.call_plan.MAX_PREFILL_S", 0.0)  # the smallest chunks
    first = stream(model, "Tell me a story.", max_tokens=200)
    next(first)
    second = stream(model, images["large"], "What is it?")
    seen: list[str] = []
    second.on_progress = lambda progress: seen.append(progress.stage)
    waiting = threading.Thread(target=second.result)
    waiting.start()
    pieces_meanwhile = 0
    for _ in first:
        pieces_meanwhile += waiting.is_alive() and "encode" in seen
    waiting.join()
    assert pieces_meanwhile > 10
    assert second.result().finish_reason in ENDS


def test_a_seed_repeats_its_answer_among_others(model):
    options = {"greedy": False, "temperature": 1.0, "seed": 7}
    alone = str(stream(model, "Say something.", **options).result())
    others = [stream(model, question) for question in QUESTIONS[:4]]
    among = stream(model, "Say something.", **options)
    assert str(among.result()) == alone
    text(others)


def test_more_requests_than_sequences_wait_their_turn(model):
    alone = str(stream(model, QUESTIONS[3]).result())
    assert set(text([stream(model, QUESTIONS[3]) for _ in range(30)])) == {alone}
    assert model.engine.scheduler.n_tasks == 0


def test_a_picture_that_many_ask_about_is_encoded_and_prefilled_once(model, images, monkeypatch):
    batches, encode = [], model.engine.encoder.encode
    monkeypatch.setattr(
        model.engine.encoder, "encode", lambda groups, *more: batches.append(len(groups)) or encode(groups, *more)
    )
    picture = Image.open(images["wide"]).convert("RGB").transpose(Image.Transpose.ROTATE_180)
    answers = [one.result() for one in [stream(model, picture, question) for question in QUESTIONS[:6]]]
    assert sum(batches) == len(answers[0].slices)
    assert answers[0].cached_tokens < answers[0].visual_tokens
    assert all(answer.cached_tokens > answer.visual_tokens for answer in answers[1:])
    assert [str(answer) for answer in answers] == [str(stream(model, picture, q).result()) for q in QUESTIONS[:6]]


def test_a_context_smaller_than_the_number_of_sequences_is_no_trouble(exact_folder):
    with Model.load(exact_folder, exact=True, n_ctx=3) as tiny, pytest.raises(PromptTooLongError):
        tiny.chat("Hello")


def test_too_many_requests_are_refused(model, monkeypatch):
    monkeypatch.setattr("edge_runtime.engine.engine.MAX_REQUESTS", 3)
    kept = [stream(model, "Tell me a story.", max_tokens=2000) for _ in range(3)]
    with pytest.raises(EngineBusy, match="3 requests are waiting or running"):
        stream(model, "Hello")
    for one in kept:
        one.cancel()
    assert {one.result().finish_reason for one in kept} <= {"cancelled", *ENDS}
    assert stream(model, "Hello").result().finish_reason in ENDS


def test_a_full_cache_preempts_requests_and_changes_no_answer(exact_folder, images):
    requests = [(images["tiny"], question) for question in QUESTIONS[:6]]
    with Model.load(exact_folder, exact=True, n_ctx=256) as small:
        alone = [str(stream(small, *content, max_tokens=60).result()) for content in requests]
        together = text([stream(small, *content, max_tokens=60) for content in requests])
        # They share the picture's tokens; with a picture each there is no room for all.
        others = [(images[name], "What is it?") for name in ("tiny", "square", "edge", "strip")]
        fitting = [content for content in others if len(small.build_prompt(_user(*content)).ids) < 190]
        apart = [str(stream(small, *content, max_tokens=60).result()) for content in fitting]
        crowded = text([stream(small, *content, max_tokens=60) for content in fitting])
    assert together == alone
    assert crowded == apart
    assert len(fitting) > 1


def test_a_cache_that_nothing_can_empty_is_told_by_an_error_of_its_own(model, monkeypatch):
    """Idle sequences are given up first, one in each step; then there is nothing left but to say so."""
    str(stream(model, "Something to be remembered.").result())
    given_up, calls = [], []
    give_up_one = model.engine.scheduler.sequences.give_up_one

    def full(*_: object, **__: object) -> None:
        calls.append(1)
        raise CacheFull

    with monkeypatch.context() as patch:
        patch.setattr(model.engine.decoder, "step", full)
        patch.setattr(
            model.engine.scheduler.sequences, "give_up_one", lambda: given_up.append(give_up_one()) or given_up[-1]
        )
        with pytest.raises(CacheFull, match=r"The KV cache is full; load the model with a larger --ctx\."):
            stream(model, "Why?").result()
        with pytest.raises(CacheFull, match="larger --ctx"):
            model.trace("Why?", 1)  # outside any request, too
    assert given_up.count(True) >= 1
    assert given_up[-1] is False
    assert len(calls) == len(given_up) + 1
    assert model.engine.scheduler.n_tasks == 0
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))
    assert str(stream(model, "Why?").result())


def _user(*content):
    return [{"role": "user", "content": [*content]}]


def test_prompts_that_are_together_longer_than_a_small_context_are_computed_in_parts(exact_folder):
    """llama.cpp takes no more rows per call than the context has, and ends the process when it is given more."""
    with Model.load(exact_folder, exact=True, n_ctx=256) as small:
        questions = [letter * 2 + " Tell me more of it." * 9 for letter in "abcd"]
        assert 2 * len(small.build_prompt(questions[0]).ids) > 256
        blocker = stream(small, "Why?", max_tokens=3)
        together = text([stream(small, question) for question in questions])
        assert together == [str(stream(small, question).result()) for question in questions]
        assert blocker.result().finish_reason in ENDS


def test_a_failing_request_does_not_touch_the_others(model, images, monkeypatch):
    encode = model.engine.encoder.encode

    def fail_on_wide(groups, *more):
        if any(item.tgt_size[1] > item.tgt_size[0] for group in groups for item, _ in group):
            raise ModelFileError("broken")
        return encode(groups, *more)

    monkeypatch.setattr(model.engine.encoder, "encode", fail_on_wide)
    text_only = stream(model, "Tell me a story.", max_tokens=30)
    next(text_only)  # while an answer is running, pictures are encoded one by one
    new = {name: Image.open(images[name]).convert("RGB").transpose(FLIP) for name in ("wide", "square")}
    wide, square = stream(model, new["wide"], "Why?", max_slices=1), stream(model, new["square"], "How?")
    answers = text_only.result(), square.result()
    with pytest.raises(ModelFileError, match="broken"):
        wide.result()
    assert all(answer.finish_reason in ENDS for answer in answers)
    assert model.engine.scheduler.n_tasks == 0


def test_reasoning_ends_with_its_budget(model):
    answer = model.chat("Why?", thinking=True, thinking_budget=5, max_tokens=20, temperature=0.7, seed=1)
    cut = model.chat("Why?", thinking=True, max_tokens=5, temperature=0.7, seed=1)
    assert (answer.reasoning, bool(answer.answer)) == (cut.reasoning, True)
    longer = model.chat("Why?", thinking=True, max_tokens=20, temperature=0.7, seed=1)
    assert not longer.answer
    assert len(longer.reasoning) > len(cut.reasoning) > 0


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("form", [{}, {"schema": {"enum": ["yes", "no"]}}], ids=["free", "schema"])
def test_reasoning_has_as_many_tokens_as_its_budget(model, budget, form):
    """They, and the token that ends it, which counts as well; then comes the answer."""
    options = {"thinking": True, "greedy": True, "max_tokens": 40}
    answer = model.chat("Why?", **options, **form, thinking_budget=budget)
    assert answer.reasoning_tokens == budget + 1
    assert answer.completion_tokens > budget + 1
    assert answer.answer
    if budget == 0:
        assert answer.reasoning is None


def test_stop_strings_end_reasoning_only_when_asked(model):
    options = {"thinking": True, "max_tokens": 12, "greedy": True}
    whole = model.chat("Why?", **options).reasoning
    stop = whole[2:5]
    assert model.chat("Why?", stop=stop, **options).reasoning == whole
    cut = model.chat("Why?", stop=stop, stop_in_reasoning=True, **options)
    assert (cut.reasoning, cut.answer, cut.finish_reason) == (whole[: whole.index(stop)], "", "stop")


def test_an_answer_that_goes_in_circles_ends(model, monkeypatch):
    monkeypatch.setattr(
        "edge_runtime.generation.sampling.Sampler.sample", lambda self, context, row: 40 + self.seed % 2
    )
    ended = model.chat("Why?", greedy=True, max_tokens=600)
    assert ended.finish_reason == "repetition"
    assert ended.completion_tokens < 300
    going_on = model.chat("Why?", greedy=True, max_tokens=600, repetition_check=False)
    assert (going_on.finish_reason, going_on.completion_tokens) == ("length", 600)


def test_an_error_nobody_expected_reaches_everybody_and_the_thread_goes_on(model, monkeypatch):
    def fail(task):
        raise RuntimeError("unexpected")

    with monkeypatch.context() as patch:
        patch.setattr(model.engine.scheduler.sequences, "take", fail)
        for one in [stream(model, question) for question in QUESTIONS[:3]]:
            with pytest.raises(RuntimeError, match="unexpected"):
                one.result()
    assert str(stream(model, QUESTIONS[0]).result())
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "where"),
    [(Scheduler, "_report_prefill"), (Scheduler, "_begin_prefill"), (Sequences, "take"), (Sequences, "restore")],
)
def test_an_error_in_what_one_request_needs_is_its_own(model, images, monkeypatch, owner, where):
    """Nobody else's answer ends, no sequence is lost, and the next request is answered."""
    before, hit = getattr(owner, where), []

    def fail(self, task, *more):
        if len(task.request.prompt.ids) not in lengths:
            hit.append(task)
            raise ZeroDivisionError("division by zero")
        return before(self, task, *more)

    lengths = {len(model.build_prompt("Tell me a story.").ids)}
    monkeypatch.setattr(owner, where, fail)
    first = stream(model, "Tell me a story.", max_tokens=150, repetition_check=False, seed=1, greedy=False)
    next(first)
    for _ in range(2 * model.activity.slots):
        with pytest.raises(ZeroDivisionError):
            stream(model, images["tiny"], "What is it, and why is it there at all?").result()
    assert hit
    assert first.result().finish_reason in ENDS
    monkeypatch.undo()
    assert stream(model, images["tiny"], "What is it?").result().finish_reason in ENDS


def test_two_hundred_requests_with_random_cancels_leave_nothing_behind(model, images):
    rng = random.Random(5)
    expected = {question: str(stream(model, question).result()) for question in QUESTIONS}
    running = []
    for number in range(200):
        question = rng.choice(QUESTIONS)
        content = (rng.choice([images["tiny"], images["square"]]), question) if number % 3 == 0 else (question,)
        running.append((len(content), question, stream(model, *content)))
        if rng.random() < 0.3:
            rng.choice(running)[2].cancel()
        if rng.random() < 0.1:
            running.pop(rng.randrange(len(running)))  # nobody listens any more
        while len(running) > 20:
            size, question, one = running.pop(0)
            answer = one.result()
            assert answer.finish_reason in (*ENDS, "cancelled")
            if size == 1 and answer.finish_reason != "cancelled":
                assert str(answer) == expected[question]
    for _, _, one in running:
        one.result()
    for _ in range(100):
        if model.engine.scheduler.n_tasks == 0:
            break
        time.sleep(0.05)
    scheduler = model.engine.scheduler
    assert scheduler.n_tasks == 0
    assert sorted(scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))
