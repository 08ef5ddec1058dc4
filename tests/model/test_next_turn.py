"""Between two turns: the answer is read as history while nobody waits, and nobody waits for that."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_runtime import Model
from edge_runtime.decoder.sequence_chunk import Cancelled, SequenceChunk
from edge_runtime.engine import call_plan
from edge_runtime.engine.call_plan import CallPlan
from edge_runtime.next_turn import next_beginning

QUESTIONS = ("What is shown here?", "And what is behind it?")
GREEDY: dict[str, Any] = {"greedy": True, "max_tokens": 12, "repetition_check": False}


@pytest.fixture
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True, n_ctx=1024, n_threads=1) as loaded:
        yield loaded


def first_turn(picture: Path) -> list[Any]:
    return [{"role": "user", "content": [picture, QUESTIONS[0]]}]


def second_turn(picture: Path, said: str, question: str = QUESTIONS[1]) -> list[Any]:
    return [*first_turn(picture), {"role": "assistant", "content": said}, {"role": "user", "content": question}]


def wait_until_idle(model: Model) -> None:
    deadline = time.monotonic() + 20
    while model.engine.scheduler.n_tasks or not model.engine.inbox.empty():
        assert time.monotonic() < deadline, "reading ahead does not end"
        time.sleep(0.005)


@pytest.mark.parametrize("thinking", [False, True])
def test_the_next_turn_begins_with_its_question(model, images, thinking):
    picture, options = images["wide"], GREEDY | {"thinking": thinking}
    before = model.chat(first_turn(picture), follow_up=True, **options)
    wait_until_idle(model)
    prompts = [model.build_prompt(second_turn(picture, before.answer, q), thinking=thinking).ids for q in "AB"]
    shared = next(i for i, (one, other) in enumerate(zip(*prompts, strict=False)) if one != other)
    after = model.chat(second_turn(picture, before.answer), **options)
    assert after.cached_tokens == shared
    assert shared > before.prompt_tokens  # the answer was read, and what stands between the turns
    with Model.load(model.paths.decoder.parent, exact=True, n_ctx=1024, n_threads=1) as fresh:
        assert str(fresh.chat(second_turn(picture, before.answer), **options)) == str(after)


def test_without_a_word_nothing_is_read(model, images):
    before = model.chat(first_turn(images["wide"]), **GREEDY)
    wait_until_idle(model)
    after = model.chat(second_turn(images["wide"], before.answer), **GREEDY)
    assert after.cached_tokens < before.prompt_tokens


def test_whoever_asks_does_not_wait_for_it(model, images, monkeypatch):
    """Read token by token; a question ends it, and what was read stays."""
    monkeypatch.setattr(call_plan, "PREFETCH_CHUNK", 1)
    alone = str(model.chat("Why?", **GREEDY))
    seen: list[int] = []
    step = model.engine.decoder.step

    def slow(parts, cancelled=lambda: False, adapter=None):
        if len(parts) == 1 and not parts[0].wants_logits:
            seen.append(model.engine.decoder.held(parts[0].sequence))
            deadline = time.monotonic() + (0.05 if len(seen) < 4 else 20)
            while time.monotonic() < deadline:
                if cancelled():
                    raise Cancelled
                time.sleep(0.001)
        return step(parts, cancelled, adapter)

    monkeypatch.setattr(model.engine.decoder, "step", slow)
    before = model.chat(first_turn(images["wide"]), follow_up=True, **GREEDY)
    while len(seen) < 4:
        time.sleep(0.005)
    started = time.monotonic()
    assert str(model.chat("Why?", **GREEDY)) == alone
    assert time.monotonic() - started < 5
    wait_until_idle(model)
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))
    after = model.chat(second_turn(images["wide"], before.answer), **GREEDY)
    assert after.cached_tokens == seen[-1]


def test_closing_ends_it(exact_folder, images, monkeypatch):
    monkeypatch.setattr(call_plan, "PREFETCH_CHUNK", 1)
    model = Model.load(exact_folder, exact=True, n_ctx=1024, n_threads=1)
    model.chat(first_turn(images["wide"]), follow_up=True, **GREEDY | {"max_tokens": 60})
    started = time.monotonic()
    model.close()
    assert time.monotonic() - started < 5


def test_pictures_that_were_forgotten_are_not_encoded_for_it(model, images, monkeypatch):
    """An answer is read ahead only as long as the question before it is still held."""
    before = model.chat(first_turn(images["wide"]), **GREEDY)
    request = _request(model, second_turn(images["wide"], before.answer))

    def forget() -> None:
        for sequence in range(model.engine.decoder.n_sequences):
            model.engine.decoder.rewind(sequence)
        model.engine.scheduler.encoding.visual_tokens.clear()

    model.engine.run(forget)
    encoded: list[int] = []
    monkeypatch.setattr(model.engine.encoder, "encode", lambda groups, *more: encoded.append(len(groups)))
    running = model.engine.prefetch(request)
    assert running.next_event().reason == "cancelled"
    assert not encoded


def _request(model: Model, messages: list[Any]):
    from dataclasses import replace

    seen: list[Any] = []
    submit_all = model.engine.submit_all
    model.engine.submit_all = lambda requests: seen.extend(requests) or submit_all(requests)
    try:
        model.chat(messages, **GREEDY)
    finally:
        del model.engine.submit_all
    return replace(seen[0], is_prefetch=True)


def test_a_conversation_that_fills_the_context_has_no_next_turn(exact_folder):
    with Model.load(exact_folder, exact=True, n_ctx=64) as small:
        answer = small.chat("Tell me a story.", follow_up=True, **GREEDY | {"max_tokens": 1000})
        assert answer.finish_reason == "length"
        wait_until_idle(small)
        assert str(small.chat("Why?", **GREEDY | {"max_tokens": 2}))


def test_the_beginning_is_what_all_questions_share(model):
    prepared = model.prepare(QUESTIONS[0])
    answer = SimpleNamespace(message=lambda: {"role": "assistant", "content": "A house."})
    beginning = next_beginning(prepared.with_more, answer)
    for question in ("Who?", "Is it red?", "1"):
        messages = [QUESTIONS[0], "A house.", question]
        turns = [
            {"role": role, "content": m} for role, m in zip(("user", "assistant", "user"), messages, strict=True)
        ]
        ids = model.build_prompt(turns).ids
        assert ids[: len(beginning.ids)] == beginning.ids
    text = b"".join(model.tokenizer.token_bytes(i) for i in beginning.ids).decode()
    assert text.endswith("<|im_start|>assistant\nA house.<|im_end|>\n<|im_start|>user\n")


# --- leaving a call that several share ------------------------------------------------------------------------


def sized(*parts: tuple[int, bool]):
    tasks = [SimpleNamespace(is_cancelled=lambda gone=gone: gone) for _, gone in parts]
    return tasks, [SequenceChunk(i, [0] * n) for i, (n, _) in enumerate(parts)]


@pytest.mark.parametrize(
    ("parts", "passed", "expected"),
    [
        ([(256, False), (256, False)], 0.0, False),  # nobody was cancelled
        ([(256, True), (256, True)], 0.9, True),  # nobody waits
        ([(256, True), (256, False)], 0.4, True),  # less is lost than would be computed for nobody
        ([(256, True), (256, False)], 0.6, False),
        ([(500, True), (12, False)], 0.9, True),
        ([(1, True), (1, False), (1, False)], 0.5, False),
    ],
)
def test_a_call_is_left_when_that_is_sooner_for_the_others(monkeypatch, parts, passed, expected):
    n_rows = sum(n for n, _ in parts)
    monkeypatch.setattr("edge_runtime.engine.call_plan.time.perf_counter", lambda: 10 + passed * n_rows * 0.01)
    assert CallPlan(*sized(*parts)).is_worth_leaving(started=10, row_s=0.01) is expected


def test_the_others_of_a_call_that_was_left_are_computed_again(model, monkeypatch):
    """One of two prompts that share a call is cancelled in it: the call ends at once, the other answer is whole."""
    questions = ["a " * 150, "b " * 150]
    alone = str(model.chat(questions[1], **GREEDY))
    model.engine.run(lambda: [model.engine.decoder.rewind(s) for s in range(model.engine.decoder.n_sequences)])
    step, left = model.engine.decoder.step, []
    streams: list[Any] = []

    def cancel_inside(parts, cancelled=lambda: False, adapter=None):
        if len(parts) == 2 and not left and len(streams) == 2:
            assert not cancelled()
            streams[0].cancel()
            left.append(cancelled())
            if left[0]:
                raise Cancelled
        return step(parts, cancelled, adapter)

    monkeypatch.setattr(model.engine.decoder, "step", cancel_inside)
    monkeypatch.setattr("edge_runtime.engine.call_plan.MAX_PREFILL_S", 1e9)
    model.engine.scheduler.planner.row_s = 1.0  # so that little of the call seems to have passed
    gate = _hold(model)
    streams += [model.chat(question, stream=True, **GREEDY) for question in questions]
    gate.set()
    assert str(streams[1].result()) == alone
    assert left == [True]
    assert streams[0].result().finish_reason == "cancelled"
    wait_until_idle(model)
    assert sorted(model.engine.scheduler.sequences.idle) == list(range(model.engine.decoder.n_sequences))


def _hold(model: Model):
    """Keep the inference thread busy until the event is set."""
    import threading

    gate = threading.Event()
    threading.Thread(target=lambda: model.engine.run(lambda: gate.wait(20)), daemon=True).start()
    return gate
