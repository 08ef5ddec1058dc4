"""Long texts: cut where nothing changes, tokenised in pieces that take turns and look whether they are wanted."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime import Model, PromptTooLongError, pipeline
from edge_runtime.prompt import long_text
from edge_runtime.prompt.long_text import PIECE, matches, pieces
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.system.turns import Turns

MARK = "\ue000"
# White space of all kinds, letters that fold or compose, marks that reorder, digits of other scripts, contractions.
ODD = (
    "aAsStTrRlLdDvVmMéſKʼŉ019²٣ \t\r\n\x0b\x0c\x85\u00a0\u2028\u3000\u180e\u200b\ufeff\x1c'’!?.,<|>-_"
    "\u0301\u0327\u0338\u0345\u3099かカ図你，。！\u1100\u1161\u11a8가각😀\u0e01\u0e31\u0e4d\u2126\u1e9e\u2000\u037e\u1fef"
)
WORDS = ("'s", "'LL", " the", "\r\n", " \n", "  ", "\n\n", "don't", "123", "!!", "?\n", "图片里", "，", "e\u0301")
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.sampled_from(WORDS), st.characters(exclude_categories=["Cs"])))


def whole(found: Tokenizer, text: str) -> list[int]:
    """Ids of a text that is not cut."""
    return list(found._bpe.encode(text, add_special_tokens=False).ids)


@given(parts=TEXTS, size=st.integers(1, 12))
@example(parts=["a  b"], size=1)
@example(parts=["!\n\n\nb 5  6\u0301 "], size=1)
@example(parts=["か\u3099。は\u3099、"], size=1)
def test_the_tokens_of_the_pieces_are_those_of_the_text(demo: Model, parts: list[str], size: int):
    text, found = "".join(parts), demo.tokenizer
    cut = [*pieces(text, size=size)]
    assert "".join(cut) == text
    assert [token for piece in cut for token in whole(found, piece)] == whole(found, text)


@pytest.mark.parametrize(
    "sentence",
    [
        "word ",
        "It's 12 o'clock.\n\n",
        "图片里有什么，文字。",
        "カメラは、",
        "x=1;",
        "\tif a:\r\n",
        "éa ",
        "0",
        "QUJD0/+x",
        "Слово и ",
    ],
)
def test_ordinary_text_is_cut_in_time(demo: Model, sentence: str):
    text = sentence * (3 * PIECE // len(sentence))
    cut = [*pieces(text)]
    assert "".join(cut) == text
    assert len(cut) == 3
    assert max(map(len, cut)) < PIECE + 2 * len(sentence)
    assert demo.tokenizer.encode(text) == whole(demo.tokenizer, text)


@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "😀", "\u0301", "가"])
def test_what_cannot_be_cut_is_one_piece(demo: Model, character: str):
    text = "b " * 10 + character * (2 * PIECE + 5)
    assert len([*pieces(text)]) == 1
    assert demo.tokenizer.encode(text) == whole(demo.tokenizer, text)
    looks = []
    assert len([*pieces(text + " b" * PIECE, lambda: looks.append(1))]) > 1
    assert len(looks) > 3  # while it is searched for a place, too


@given(
    text=st.lists(st.sampled_from(["<a>", "<ab>", "<", "a", ">", "x"])).map("".join),
    window=st.integers(1, 7),
)
def test_matches_are_those_of_the_whole_text(text: str, window: int):
    pattern = re.compile("<ab>|<a>|xx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_text, "PIECE", window)
        found = [match.span() for match in matches(pattern, 4, text, lambda: None)]
    assert found == [match.span() for match in pattern.finditer(text)]


class Recorded:
    """The library's tokenizer, and the longest text that it was given."""

    def __init__(self, bpe: Any) -> None:
        self._bpe, self.longest = bpe, 0

    def __getattr__(self, name: str) -> Any:
        def call(texts: Any, **options: Any) -> Any:
            self.longest = max(self.longest, len(texts if isinstance(texts, str) else texts[0]))
            return getattr(self._bpe, name)(texts, **options)

        return call


def test_the_library_never_has_much_of_a_long_text(demo: Model, monkeypatch: pytest.MonkeyPatch):
    """It takes 200 bytes of memory per byte, and cannot be interrupted."""
    found = demo.tokenizer
    text = "<|im_start|>" + "some words, " * 100_000
    expected = [found.special_ids["<|im_start|>"], *whole(found, "some words, " * 100_000)]
    recorded = Recorded(found._bpe)
    monkeypatch.setitem(found.__dict__, "_bpe", recorded)
    assert found.encode_special(text, MARK) == expected
    assert 0 < recorded.longest < 2 * PIECE


class Left(Exception):  # noqa: N818 - says what happened
    """Nobody waits any more."""


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("text", ["word " * 50_000, "\u0301a" * 100_000, "<|im_end|>" * 20_000, "\ue001 " * 90_000])
def test_a_long_text_is_given_up_at_any_look(demo: Model, text: str, raw: bool):
    """Wherever the work is when its client leaves."""
    looks = 0

    def count() -> None:
        nonlocal looks
        looks += 1

    demo.build_prompt(text, raw=raw, on_check=count)
    n_looks, seen = looks, 0
    assert n_looks > 10

    def leave() -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            raise Left

    for last in (1, n_looks // 3, n_looks // 2, n_looks):
        seen = 0
        with pytest.raises(Left):
            demo.build_prompt(text, raw=raw, on_check=leave)
        assert seen == last


def test_the_count_ends_far_beyond_the_context(demo: Model, monkeypatch: pytest.MonkeyPatch):
    """And the sentence says so: not all of it was counted."""
    monkeypatch.setattr("edge_runtime.pipeline.MAX_COUNTED", 1)
    text = "a " * (demo.n_ctx * 5)
    with pytest.raises(PromptTooLongError, match=rf"at least \d+ tokens \(.* holds {demo.n_ctx}, one of them"):
        demo.submit(text)
    assert len(demo.build_prompt(text).ids) > demo.n_ctx


def test_a_question_that_cannot_fit_is_refused_untokenised_though_turns_may_be_dropped(
    demo: Model, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Tokenizer, "encode_special", lambda *arguments: pytest.fail("it was tokenised"))
    longest = demo.tokenizer._longest
    assert longest is not None
    text = "a" * (3 * demo.n_ctx * longest)
    for messages in ([{"role": "user", "content": text}], [{"role": "system", "content": text}, question()]):
        with pytest.raises(PromptTooLongError, match="at least"):
            demo.submit(messages, context_shift=True)


def question() -> dict[str, str]:
    return {"role": "user", "content": "Why?"}


def test_a_long_conversation_is_not_built_once_for_every_turn(demo: Model, monkeypatch: pytest.MonkeyPatch):
    built, build = [], pipeline.build_prompt

    def recorded(messages: Any, *arguments: Any, **options: Any) -> Any:
        built.append(len(messages))
        return build(messages, *arguments, **options)

    monkeypatch.setattr("edge_runtime.pipeline.build_prompt", recorded)
    turns = [{"role": ("user", "assistant")[i % 2], "content": "some words " * 20} for i in range(2001)]
    (stream,) = demo.submit(turns, context_shift=True, max_tokens=1)
    answer = stream.result()
    assert answer.dropped_turns > 900
    assert sum(n > 500 for n in built) <= 3
    assert len(built) < 40


# --- turns ---------------------------------------------------------------------------------------------------------


def test_whoever_has_waited_longest_is_next():
    """Also before one who takes turn after turn."""
    turns, order = Turns(1), []

    def take(name: str) -> None:
        with turns.turn():
            order.append(name)

    with turns.turn():
        waiting = []
        for name in ("first", "second", "third"):
            thread = threading.Thread(target=take, args=(name,))
            thread.start()
            waiting.append(thread)
            while len(turns._waiting) < len(waiting):
                threading.Event().wait(0.001)
    take("again")
    for thread in waiting:
        thread.join(30)
    assert order == ["first", "second", "third", "again"]


def test_no_more_than_so_many_have_a_turn():
    turns, lock = Turns(2), threading.Lock()
    now, most = 0, 0

    def work() -> None:
        nonlocal now, most
        for _ in range(20):
            with turns.turn():
                with lock:
                    now += 1
                    most = max(most, now)
                threading.Event().wait(0.0005)
                with lock:
                    now -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (now, most) == (0, 2)
    assert turns._n_free == 2


def test_an_error_ends_a_turn():
    turns = Turns(1)
    with pytest.raises(Left), turns.turn():
        raise Left
    with turns.turn():
        pass


def test_a_thread_with_a_turn_takes_no_other_and_gives_it_back_while_it_waits():
    turns = Turns(1)
    with turns.turn():
        with turns.turn():
            assert turns._n_free == 0
        assert turns._n_free == 0
        with turns.without():
            assert turns._n_free == 1
        assert turns._n_free == 0
        turns.pass_on()  # nobody waits
        assert turns._n_free == 0
    with turns.without():
        assert turns._n_free == 1
    assert turns._n_free == 1


def test_a_turn_is_passed_on_to_those_who_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("edge_runtime.system.turns.SLICE_S", 0.0)
    turns, order = Turns(1), []

    def work(name: str) -> None:
        with turns.turn():
            for _ in range(3):
                order.append(name)
                threading.Event().wait(0.001)
                turns.pass_on()

    with turns.turn():
        threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) <= number:
                threading.Event().wait(0.001)
    for thread in threads:
        thread.join(30)
    assert "".join(order) == "ababab"


def test_a_fork_of_a_thread_that_had_a_turn_has_all_of_them():
    turns = Turns(2)
    with turns.turn():
        turns._reset()  # as in the child
    assert turns._n_free == 2
