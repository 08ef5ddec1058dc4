"""System prompt and tools are computed once: for the next chat, after a restart, and beside single chats."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from decoder.test_adapters import make_adapter
from edge_runtime import Model, PromptTooLongError
from edge_runtime.cache.prefixes import BLOCK, Recorded, Saved
from edge_runtime.cache.shared_prefixes import MIN_SHARED, Beginnings, HeldBeginnings
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.store.find import find_model
from many_tools import many_tools

SYSTEM = "You help with notes and calendars. Answer in short sentences, and say so when you do not know. " * 3
N_CTX = 24_576
GREEDY: dict[str, Any] = {"greedy": True, "max_tokens": 4, "repetition_check": False}


def load(folder: Path, cache: Path | None = None, **options: Any) -> Model:
    return Model.load(folder, **{"n_ctx": 1024, "n_threads": 1, "cache_dir": cache, "exact": True} | options)


def chat(model: Model, question: str, system: str = SYSTEM, **options: Any):
    return model.chat(system_and(question, system), **GREEDY | options)


def system_and(question: str, system: str = SYSTEM) -> list[dict[str, str]]:
    """A conversation that begins."""
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def wait_until_idle(model: Model) -> None:
    """Until nothing is at work, expected or to be saved."""
    scheduler, deadline = model.engine.scheduler, time.monotonic() + 120
    while (
        scheduler.n_tasks
        or scheduler.warm_up.expected
        or scheduler.sequences.saver.unsaved
        or not model.engine.inbox.empty()
    ):
        assert time.monotonic() < deadline, "it does not come to rest"
        time.sleep(0.01)


def wait_until_warm(model: Model, n: int = 1) -> None:
    """Until a model has computed what it expects at its start."""
    deadline = time.monotonic() + 300
    while len([*model.engine.scheduler.sequences.shared]) < n:
        assert time.monotonic() < deadline, "what chats share is not computed at the start"
        time.sleep(0.01)


def crowd_out(model: Model) -> None:
    """Fill the KV cache with other chats, one after the other, until none of the first is left in a sequence."""
    for number in range(2 * model.engine.decoder.n_sequences):
        model.chat(f"{number} " + "tell me of it. " * 30, **GREEDY)


def shared_by(model: Model, system: str = SYSTEM, **options: Any) -> int:
    """Positions that two chats with different questions have in common."""
    one, other = (model.build_prompt(system_and(question, system), **options).ids for question in "AB")
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def test_thirty_six_tools_are_computed_once(exact_folder, tmp_path, monkeypatch):
    """The second chat computes at most 5 % of the first one's prompt, and so does the first after a restart."""
    tools = many_tools()
    options = {"n_ctx": N_CTX, "exact": False}
    with load(exact_folder, tmp_path / "cache", **options) as model:
        first = chat(model, "What is on my list?", tools=tools)
        second = chat(model, "Where was I yesterday?", tools=tools)
        wait_until_idle(model)
    assert first.cached_tokens == 0
    assert first.prompt_tokens > 5000
    assert second.prompt_tokens - second.cached_tokens <= 0.05 * first.prompt_tokens
    with load(exact_folder, tmp_path / "cache", **options) as model:
        model.warm_up()
        wait_until_warm(model)
        monkeypatch.setattr(model.engine.caches.prefixes, "find", lambda *_: Saved())  # it is held already
        third = chat(model, "Who wrote to me?", tools=tools)
    assert third.prompt_tokens - third.cached_tokens <= 0.05 * first.prompt_tokens


def test_a_chat_before_the_warm_up_brings_it_in_from_disk(exact_folder, tmp_path):
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        first = chat(model, "Why?", tools=many_tools()[:3])
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        model.warm_up()
        second = chat(model, "How?", tools=many_tools()[:3])
    assert second.prompt_tokens - second.cached_tokens <= 0.15 * first.prompt_tokens


def test_single_chats_do_not_drive_it_out(exact_folder):
    with load(exact_folder) as model:
        assert chat(model, "Why?").cached_tokens == 0
        crowd_out(model)
        again = chat(model, "How?")
        assert again.cached_tokens >= shared_by(model) > MIN_SHARED
        with load(exact_folder) as fresh:
            assert str(again) == str(chat(fresh, "How?"))


def test_it_is_given_up_where_a_request_would_lack_room_and_computed_again(exact_folder):
    with load(exact_folder, n_ctx=512) as model:
        chat(model, "Why?")
        n = shared_by(model)
        long = "a " * (508 - n // 2)
        answer = model.chat(long[: 2 * (500 - len(model.build_prompt("").ids)) - 8], **GREEDY)
        assert answer.prompt_tokens + n > 512
        assert [*model.engine.scheduler.sequences.shared] == []
        again = chat(model, "How?")
        assert again.cached_tokens < n
        assert chat(model, "Where?").cached_tokens >= n
        with load(exact_folder) as fresh:
            assert str(again) == str(chat(fresh, "How?"))


def test_what_is_at_work_is_not_given_up_for_nothing(exact_folder):
    """What an active chat holds anyway gives no room."""
    with load(exact_folder) as model:
        chat(model, "Why?")
        (held,) = model.engine.scheduler.sequences.shared
        sequence = next(s for s in range(8) if model.engine.decoder.held(s) > model.engine.decoder.held(held))
        beginnings = model.engine.scheduler.sequences.shared
        assert model.engine.run(lambda: beginnings.give_up([sequence])) is False
        assert model.engine.run(lambda: beginnings.give_up([])) is True
        assert model.engine.decoder.held(held) == 0


def test_two_are_held_and_short_ones_do_not_drive_out_long_ones(exact_folder):
    with load(exact_folder, n_ctx=2048) as model:
        for question in ("Why?", "What?", "Who?"):
            chat(model, question, SYSTEM * 3)
        for number in range(6):  # each with a system prompt of its own
            chat(model, "Why?", f"{number} speaks. " + SYSTEM)
        crowd_out(model)
        assert chat(model, "How?", SYSTEM * 3).cached_tokens >= shared_by(model, SYSTEM * 3)
        assert len([*model.engine.scheduler.sequences.shared]) == 2
        for number in range(20):  # but nothing stays for ever
            chat(model, "Why?", f"{number} writes. " + SYSTEM)
        held = [len(keys) for keys, _ in model.engine.scheduler.sequences.shared.by_worth()]
        assert max(held) < shared_by(model, SYSTEM * 3)


def test_chats_with_other_tools_or_another_system_prompt_share_nothing_wrong(exact_folder):
    tools = many_tools()[:2]
    with load(exact_folder, n_ctx=4096) as model, load(exact_folder, n_ctx=4096) as fresh:
        chat(model, "Why?", tools=tools)
        for system, others in (
            (SYSTEM, many_tools("!")[:2]),
            (SYSTEM, tools[:1]),
            (SYSTEM, ()),
            (SYSTEM + "Now.", tools),
        ):
            answer = chat(model, "How?", system, tools=others)
            assert str(answer) == str(chat(fresh, "How?", system, tools=others))


def test_after_a_restart_it_is_computed_while_nobody_asks(exact_folder, tmp_path):
    """Even if nothing of the KV cache was kept on disk: the record has the ids."""
    cache = tmp_path / "cache"
    with load(exact_folder, cache) as model:
        chat(model, "Why?")
        n, record = shared_by(model), model.engine.caches.prefixes.record_name
    for path in cache.iterdir():
        if path.stem != record:
            path.unlink()
    with load(exact_folder, cache) as model:
        model.warm_up()
        wait_until_warm(model)
        assert chat(model, "How?").cached_tokens >= n


def test_the_record_holds_no_word_of_the_conversation(exact_folder, tmp_path):
    with load(exact_folder, tmp_path) as model:
        chat(model, "My number is 1234.")
        model.engine.caches.prefixes.flush()
        (recorded,) = model.engine.caches.prefixes.recorded()
        n = shared_by(model)
        assert recorded.ids == model.build_prompt(system_and("Why?")).ids[:n]


def test_a_record_that_is_not_one_is_passed_over(exact_folder, tmp_path):
    with load(exact_folder, tmp_path) as model:
        prefixes = model.engine.caches.prefixes
        for facts in ({}, {"beginnings": 5}, {"beginnings": [[3]]}, {"beginnings": [[1, "xyz"]]}):
            prefixes._cache.put(prefixes.record_name, facts, lambda: b"12345678", 8, replace=True)
            prefixes.flush()
            assert prefixes.recorded() == []
        prefixes.record([Recorded([10**6], b"gone")])
        prefixes.flush()
        model.warm_up()
        assert str(chat(model, "Why?")) is not None


def test_a_request_during_the_warm_up_waits_for_one_chunk_only(exact_folder, tmp_path, monkeypatch):
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        chat(model, "Why?", SYSTEM * 6)
        n, record = shared_by(model, SYSTEM * 6), model.engine.caches.prefixes.record_name
    for path in tmp_path.iterdir():
        if path.stem != record:
            path.unlink()
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        calls: list[tuple[int, bool]] = []
        step = model.engine.decoder.step

        def slow(parts, cancelled=lambda: False, adapter=None):
            rows = step(parts, cancelled, adapter)
            calls.append((sum(len(part.keys) for part in parts), model.engine.inbox.empty()))
            time.sleep(0.1)
            return rows

        monkeypatch.setattr(model.engine.decoder, "step", slow)
        model.warm_up()
        while not calls:
            time.sleep(0.005)
        answer = model.chat("Hello", **GREEDY)
        begun = [is_empty for _, is_empty in calls]
        assert begun.count(False) <= 1, "chunks were begun although somebody asked"
        assert answer.cached_tokens < MIN_SHARED
        monkeypatch.undo()
        wait_until_warm(model)  # it goes on when nobody asks
        assert chat(model, "How?", SYSTEM * 6).cached_tokens >= n


def test_what_lies_on_disk_is_brought_in_in_pieces_that_a_request_interrupts(exact_folder, tmp_path, monkeypatch):
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        chat(model, "Why?", SYSTEM * 6)
        wait_until_idle(model)
        n = shared_by(model, SYSTEM * 6)
    with load(exact_folder, tmp_path, n_ctx=4096) as model:
        seen: list[bool] = []
        append_rows = model.engine.decoder.append_rows

        def slow(*args):
            seen.append(model.engine.inbox.empty())
            time.sleep(0.1)
            append_rows(*args)

        monkeypatch.setattr(model.engine.decoder, "append_rows", slow)
        model.warm_up()
        while not seen:
            time.sleep(0.005)
        assert model.chat("Hello", **GREEDY).completion_tokens
        assert len(seen) < n // 128
        wait_until_warm(model)
        assert chat(model, "How?", SYSTEM * 6).cached_tokens >= n // BLOCK * BLOCK


def test_a_warm_up_that_has_no_room_is_not_tried_for_ever(exact_folder, tmp_path):
    with load(exact_folder, tmp_path) as model:
        chat(model, "Why?", SYSTEM * 3)
        n = shared_by(model, SYSTEM * 3)
    with load(exact_folder, tmp_path, n_ctx=n - 2) as model:
        model.warm_up()
        time.sleep(0.5)
        wait_until_idle(model)
        assert str(model.chat("Why?", **GREEDY)) is not None


@pytest.mark.parametrize("thinking", [False, True])
def test_how_long_it_is(exact_model, thinking):
    def length(messages, tools=()):
        def build(conversation):
            return exact_model.build_prompt(messages_of(conversation), thinking=thinking, tools=tools)

        ids = exact_model.build_prompt(messages, thinking=thinking, tools=tools).ids
        return Beginnings().length(ids, parse_messages(messages), tools, build, thinking)

    def messages_of(conversation):
        return [{"role": m.role, "content": "".join(map(str, m.parts))} for m in conversation]

    system = {"role": "system", "content": SYSTEM}
    user, other = {"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is red."}
    n = shared_by(exact_model, thinking=thinking)
    assert length([system, user]) == n
    assert length([system, user, other, user]) == n  # later turns change nothing
    assert length([user]) == length([{"role": "system", "content": "Short."}, user]) == 0
    assert length([user], many_tools()[:3]) > n


def test_a_template_that_cannot_be_asked_shares_nothing():
    def refuse(conversation):
        raise PromptTooLongError("no")

    assert Beginnings().length([1] * 200, parse_messages([{"role": "system", "content": SYSTEM}]), (), refuse) == 0


def test_the_worth_of_what_is_held():
    class Sequences:
        """A decoder's bookkeeping."""

        holding = range(9, 11)

        def __init__(self):
            self.held = {}

        def keys(self, sequence):
            return [*self.held.get(sequence, [])]

        def share(self, source, sequence, n):
            self.held[sequence] = self.held[source][:n]

        def rewind(self, sequence):
            self.held[sequence] = []

    decoder = Sequences()
    held = HeldBeginnings(decoder)  # type: ignore[arg-type]
    for number, n in enumerate((1000, 100, 100, 100)):
        decoder.held[number] = [(number, i) for i in range(n)]

    def names() -> set[int]:
        return {decoder.keys(sequence)[0][0] for sequence in held}

    assert held.hold(0, 1000, None) == 9
    assert held.hold(0, 1000, None) is None  # it is held already
    assert held.hold(0, 1000, "adapter") == 10  # but not what an adapter has computed
    assert held.give_up([]) is True
    assert held.give_up([]) is True
    assert held.give_up([]) is False
    for number in (0, 1, 2, 3):
        held.hold(number, len(decoder.held[number]), None)
    assert names() == {0, 3}
    for _ in range(3):
        for turn in range(7):
            held.hold(1 + turn % 3, 100, None)
        assert 0 in names()
        held.hold(0, 1000, None)
    for turn in range(30):
        held.hold(1 + turn % 3, 100, None)
    assert 0 in names()  # it was used more often
    for turn in range(200):
        held.hold(1 + turn % 3, 100, None)
    assert 0 not in names()
    assert held.hold(1, MIN_SHARED - 1, None) is None
    decoder.held[1] = decoder.held[1][:50]
    assert held.hold(1, 100, None) is None  # it holds less than that


def test_an_adapter_computes_beginnings_of_its_own(exact_folder, tmp_path):
    path = tmp_path / "one.gguf"
    make_adapter(path, find_model(exact_folder).decoder, seed=1)
    options = {"adapters": {"one": path}}
    with load(exact_folder, tmp_path / "cache", **options) as model:
        chat(model, "Why?", adapter="one")
        crowd_out(model)
        assert chat(model, "Why?").cached_tokens < MIN_SHARED
        assert chat(model, "How?", adapter="one").cached_tokens >= shared_by(model)
    with load(exact_folder, tmp_path / "cache", adapters={"uno": path}) as model:  # the file counts, not its name
        model.warm_up()
        wait_until_warm(model, 2)
        wait_until_idle(model)
        assert {name for _, name in model.engine.scheduler.sequences.shared.by_worth()} == {None, "uno"}
    with load(exact_folder, tmp_path / "cache") as model:  # it is not there any more
        model.warm_up()
        wait_until_warm(model)
        wait_until_idle(model)
        assert [name for _, name in model.engine.scheduler.sequences.shared.by_worth()] == [None]
