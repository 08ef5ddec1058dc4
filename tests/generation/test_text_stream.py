"""Pieces of text: whole characters, reasoning told by ids, stop strings across tokens."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.generation.text_stream import RepetitionDetector, TextStream

THINK, THINK_END, SPECIAL = 1000, 1001, 1002


class Bytes:
    """A tokenizer whose ids below 256 are bytes."""

    special_ids = {"<think>": THINK, "</think>": THINK_END, "<box>": SPECIAL}  # noqa: RUF012 - as the real one has it

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<box>"


def pieces(ids, **options):
    stream = TextStream(Bytes(), **({"thinking": False} | options))
    return [piece for token in ids for piece in stream.feed(token)] + stream.finish(), stream


def text_of(found, kind="answer"):
    return "".join(piece.text for piece in found if piece.kind == kind)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_every_piece_is_whole_characters(text):
    found, _ = pieces(text.encode())
    assert text_of(found) == text
    assert all(piece.text for piece in found)


def test_an_unfinished_character_waits_and_is_dropped_at_the_end():
    found, _ = pieces("né".encode()[:-1])
    assert text_of(found) == "n"


def test_bytes_that_are_no_text_are_shown_as_such():
    found, _ = pieces(b"a\xffb")
    assert text_of(found) == "a\ufffdb"


def test_reasoning_and_answer_are_told_by_ids():
    found, _ = pieces([*b"\nhmm\n", THINK_END, *b"\n\nyes\n"], thinking=True)
    assert text_of(found, "reasoning") == "hmm"
    assert text_of(found) == "yes\n"


def test_printed_think_tags_are_text():
    found, _ = pieces(b"say </think> and <think> aloud")
    assert text_of(found) == "say </think> and <think> aloud"
    assert text_of(found, "reasoning") == ""


def test_a_model_may_begin_to_think_unasked():
    found, _ = pieces([THINK, *b"\nso\n", THINK_END, *b"\n\nyes"])
    assert (text_of(found, "reasoning"), text_of(found)) == ("so", "yes")


def test_other_special_tokens_are_printed():
    assert text_of(pieces([*b"a", SPECIAL])[0]) == "a<box>"


@pytest.mark.parametrize(
    ("stop", "want", "met"),
    [
        (["END"], "ab", "END"),
        (["END", "bE"], "a", "bE"),
        (["cd", "ND", "END"], "ab", "END"),
        (["xyz"], "abEND cd", None),
        ([""], "abEND cd", None),
        (["d", " "], "abEND", " "),
    ],
)
def test_stop_strings(stop, want, met):
    found, stream = pieces(b"abEND cd", stop=stop)
    assert text_of(found) == want
    assert stream.stopped == (want != "abEND cd")
    assert stream.stop_string == met


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_the_first_begins(text, stops):
    """All that precedes the first stop to be complete is shown, and nothing of it or after it."""
    found, _ = pieces(text.encode(), stop=stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    first_complete = min(ends)[0] if ends else len(text)
    begins = [
        text.find(stop) for stop in stops if text.find(stop) >= 0 and text.find(stop) + len(stop) <= first_complete
    ]
    assert text_of(found) == text[: min(begins, default=len(text))]


def test_stop_strings_do_not_end_reasoning():
    found, stream = pieces([*b"stop", THINK_END, *b"go stop on"], thinking=True, stop=["stop"])
    assert text_of(found, "reasoning") == "stop"
    assert text_of(found) == "go "
    assert stream.stopped


@pytest.mark.parametrize(
    ("ids", "reasoning", "answer"),
    [
        ([*b"go\n", *b"stop on", THINK_END, *b"yes"], "go", ""),
        ([*b"a st\n", *b"op\n", THINK_END, *b"go stop"], "a st\nop", "go "),
        ([*b"st\n\n", THINK_END, *b"op"], "st", "op"),
    ],
)
def test_stop_strings_end_reasoning_when_asked(ids, reasoning, answer):
    found, stream = pieces(ids, thinking=True, stop=["stop"], stop_in_reasoning=True)
    assert (text_of(found, "reasoning"), text_of(found)) == (reasoning, answer)
    assert stream.stopped == (answer != "op")


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_in_reasoning_cut_where_the_first_begins(text, stops):
    found, stream = pieces(text.encode(), thinking=True, stop=stops, stop_in_reasoning=True)
    plain, same = pieces(text.lstrip("\n").encode(), stop=stops)
    assert text_of(found, "reasoning").rstrip("\n") == text_of(plain).rstrip("\n")
    assert stream.stopped == same.stopped


def test_nothing_is_held_back_longer_than_needed():
    stream = TextStream(Bytes(), thinking=False, stop=["abc"])
    shown = list(itertools.accumulate(("".join(p.text for p in stream.feed(b)) for b in b"xababd"), str.__add__))
    assert shown == ["x", "x", "x", "xab", "xab", "xababd"]


@pytest.mark.parametrize("period", [1, 2, 7, 64])
def test_circles_are_noticed(period):
    detector, turn = RepetitionDetector(), list(range(100, 100 + period))
    needed = max(RepetitionDetector.MIN_SPAN, RepetitionDetector.MIN_TURNS * period)
    found = [detector.feed(token) for token in [*range(50), *turn * (needed // period + 2)]]
    assert found.index(True) == 50 + period + needed - 1


def test_tables_lists_and_long_texts_are_no_circles():
    rng = random.Random(1)
    row = [7, 8, 9] * 12
    table = [token for number in range(40) for token in (*row, 1000 + number)]
    for ids in (table, [5] * 200, [rng.randrange(50) for _ in range(3000)]):
        detector = RepetitionDetector()
        assert not any(map(detector.feed, ids))
