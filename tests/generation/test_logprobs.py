"""Log probabilities: the model's own, of every token that is shown, in whole answers, pieces and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime import MessageError, Model
from edge_runtime.cli.program import main
from edge_runtime.generation.logprobs import MIN_LOGPROB, TokenScores, log_softmax, score, top_ids
from edge_runtime.generation.text_stream import TextStream
from generation.test_text_stream import THINK_END, Bytes

FLOAT32 = st.floats(-50, 50, width=32)


@pytest.fixture(scope="module")
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True) as loaded:
        yield loaded


def definition(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@given(st.lists(st.sampled_from([-1.5, 0.0, 2.0, 2.5]) | FLOAT32, min_size=1, max_size=2000), st.integers(1, 30))
def test_the_largest_are_found_in_order(values, n):
    array = np.array(values, np.float32)
    assert top_ids(array, n).tolist() == np.argsort(-array, kind="stable")[:n].tolist()


@pytest.mark.parametrize("n", [1, 9, 20])
@pytest.mark.parametrize("n_values", [151_936, 151_748, 5121])
def test_the_largest_of_a_full_vocabulary_are_found_in_order(n_values, n):
    array = np.random.default_rng(n).normal(0, 3, n_values).astype(np.float32).round(1)  # with equal ones
    assert top_ids(array, n).tolist() == np.argsort(-array, kind="stable")[:n].tolist()
    array[:] = -np.inf
    assert top_ids(array, n).tolist() == list(range(n))


@given(st.lists(FLOAT32, min_size=2, max_size=50))
def test_scores_are_the_logarithms_of_the_softmax(values):
    logits = np.array(values, np.float32)
    want = definition(logits)
    assert np.allclose(log_softmax(logits), want, atol=1e-5)
    found = score(logits, 1, 3)
    assert (found.id, found.logprob) == (1, pytest.approx(want[1], abs=1e-5))
    assert [logprob for _, logprob in found.alternatives] == pytest.approx(sorted(want)[::-1][:3], abs=1e-5)


def test_no_probability_at_all_is_a_number_that_json_has():
    assert score(np.array([0.0, -np.inf], np.float32), 1, 0).logprob == MIN_LOGPROB


@pytest.mark.parametrize(
    "options",
    [
        {"greedy": True},
        {"temperature": 1.5, "seed": 3, "top_k": 5, "repetition_penalty": 1.5, "logit_bias": {45: 4.0}},
    ],
    ids=["greedy", "drawn"],
)
def test_they_are_those_of_the_models_own_distribution(model, options):
    question = "Tell me a story."
    answer = model.chat(question, max_tokens=10, logprobs=True, top_logprobs=4, **options)
    plain = model.chat(question, max_tokens=10, **options)
    assert (plain.answer, plain.logprobs) == (answer.answer, None)
    prepared = model.prepare(question)

    def compute() -> list[np.ndarray]:
        model.engine.decoder.prefill(model.embeddings(prepared))
        found = [model.engine.decoder.logits()]
        for token in answer.logprobs:
            model.engine.decoder.decode(token.id)
            found.append(model.engine.decoder.logits())
        return found

    for token, logits in zip(answer.logprobs, model.engine.run(compute), strict=False):
        want = definition(logits)
        assert token.logprob == pytest.approx(want[token.id], abs=1e-4)
        assert [other.id for other in token.top_logprobs] == np.argsort(-want)[:4].tolist()
        assert [other.logprob for other in token.top_logprobs] == pytest.approx(np.sort(want)[::-1][:4], abs=1e-4)
    assert len(answer.logprobs) == answer.completion_tokens - (answer.finish_reason == "stop")


def test_bytes_and_pieces_make_up_the_answer(demo: Model):
    stream = demo.chat("Who are you?", stream=True, greedy=True, logprobs=True, top_logprobs=1)
    pieces = list(stream)
    answer = stream.result()
    assert [token for piece in pieces for token in piece.logprobs] == answer.logprobs
    assert bytes(byte for token in answer.logprobs for byte in token.bytes).decode() == answer.answer
    for piece in pieces:
        assert "".join(token.token for token in piece.logprobs) == piece.text
    assert all(token.logprob == token.top_logprobs[0].logprob for token in answer.logprobs)


def test_forced_tokens_have_theirs_too(model):
    answer = model.chat("Why?", thinking=True, thinking_budget=3, max_tokens=6, seed=1, logprobs=True)
    assert [token.kind for token in answer.logprobs] == ["reasoning"] * 4 + ["answer"] * 2
    assert answer.logprobs[3].token == "</think>"
    assert (answer.reasoning_tokens, answer.completion_tokens) == (4, 6)
    assert math.isfinite(answer.logprobs[3].logprob)


def scored(ids, **options):
    """Pieces of a stream whose tokens carry their place as log probability."""
    stream = TextStream(Bytes(), **({"thinking": False} | options))
    found = [piece for place, token in enumerate(ids) for piece in stream.feed(token, TokenScores(token, place, []))]
    return found + stream.finish()


@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20), st.lists(st.text("ab", min_size=1), max_size=2)
)
def test_tokens_come_in_order_with_the_piece_they_begin_in(text, stop):
    pieces = scored(text.encode(), stop=stop)
    tokens = [token for piece in pieces for token in piece.logprobs]
    assert [token.logprob for token in tokens] == list(range(len(tokens)))
    shown = "".join(piece.text for piece in pieces)
    assert bytes(byte for token in tokens for byte in token.bytes) == shown.encode()


def test_a_token_that_a_stop_string_cuts_is_told_and_what_follows_is_not():
    class Words(Bytes):
        def token_bytes(self, token_id: int) -> bytes:
            return [b"yes", b" no", b"-sto", b"p it"][token_id]

    stream = TextStream(Words(), thinking=False, stop=["o-stop"])
    pieces = [piece for i in range(4) for piece in stream.feed(i, TokenScores(i, -1.0, []))]
    assert "".join(piece.text for piece in pieces) == "yes n"
    assert [token.token for piece in pieces for token in piece.logprobs] == ["yes", " no"]
    assert stream.stopped


def test_tokens_without_text_of_their_own_are_not_lost():
    pieces = scored([*b"\n", THINK_END, *b"\n\nyes", "é".encode()[0]], thinking=True)
    assert [(piece.text, piece.kind, len(piece.logprobs)) for piece in pieces if piece.text or piece.logprobs] == [
        *[("", "reasoning", 2), ("y", "answer", 3), ("e", "answer", 1), ("s", "answer", 1), ("", "answer", 1)]
    ]


def test_json_has_them_in_the_form_of_openai():
    arguments = ["run", "Hello", "--greedy", "--json", "--max-tokens", "3"]
    (first, *_) = json.loads(CliRunner().invoke(main, [*arguments, "--logprobs", "2"]).stdout)["logprobs"]
    assert set(first) == {"id", "token", "bytes", "logprob", "kind", "top_logprobs"}
    assert bytes(first["bytes"]).decode() == first["token"]
    assert len(first["top_logprobs"]) == 2
    assert "logprobs" not in json.loads(CliRunner().invoke(main, arguments).stdout)
    refused = CliRunner().invoke(main, ["run", "Hello", "--logprobs", "2"])
    assert refused.exit_code == 2
    assert "add --json" in refused.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"top_logprobs": 3}, "logprobs is off"),
        ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
        ({"logprobs": True, "top_logprobs": True}, "from 0 to 20"),
    ],
)
def test_wrong_numbers_are_refused(model, options, reason):
    with pytest.raises(MessageError, match=reason):
        model.chat("Hello", **options)


def test_a_bias_reaches_the_answer(model):
    token = model.tokenizer.encode("x")[0]
    assert model.chat("Hello", greedy=True, logit_bias={token: 100.0}, max_tokens=4).answer == "xxxx"
    assert "x" not in model.chat("Hello", temperature=3.0, seed=1, logit_bias={token: -100.0}, max_tokens=50).answer
    with pytest.raises(MessageError, match="logit_bias has the token id 682; expected a number from 0 to 681"):
        model.chat("Hello", logit_bias={682: 1.0})
