"""Guessed tokens change no answer, whoever guesses them and however well; and the KV cache holds what was said."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime import Model
from edge_runtime.decoder.kernel_products import VARIABLE
from edge_runtime.engine import drafts as drafts_module
from edge_runtime.engine.drafting import Drafting, draft_length
from edge_runtime.engine.step_costs import OLD, StepCosts
from edge_runtime.errors import MessageError
from edge_runtime.generation.drafts import Draft, ExpectedText, OwnText, RecentAnswers

EXAMPLES = Path(__file__).parents[2] / "examples"
SIGN = [{"role": "user", "content": [EXAMPLES / "sign.png", "What does it say?"]}]
SCHEMA = {
    "type": "object",
    "properties": {"invoice_number": {"type": "integer"}, "status": {"enum": ["open", "closed"]}},
    "required": ["invoice_number", "status"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
LONG: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "repetition_check": False}
KINDS: list[tuple[Any, dict[str, Any]]] = [
    ("Say something.", LONG | {"greedy": True}),
    ("Say something.", LONG | {"temperature": 1.5, "repetition_penalty": 1.2}),
    ("Tell me more.", LONG | {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "presence_penalty": 0.5}),
    (SIGN, {"greedy": True, "max_tokens": 8}),
    (SIGN, {"thinking": True, "max_tokens": 40, "thinking_budget": 12}),
    ("An invoice.", {"schema": SCHEMA, "max_tokens": 60}),
    ("An invoice.", {"schema": SCHEMA, "max_tokens": 60, "temperature": 1.2}),
    ("Which?", {"choices": ["apples", "apple pie", "pears"], "temperature": 1.5}),
    ("Weather?", {"tools": [TOOL], "tool_choice": "required", "max_tokens": 60, "temperature": 1.2}),
    ("Say something.", LONG | {"stop": ["e"], "temperature": 1.2}),
    ("Say something.", {"temperature": 1.3, "max_tokens": 60, "logit_bias": {"40": 4.0}}),
    ("Say something.", {"greedy": True, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}),
]


def load(**options: Any) -> Model:
    """The demo model with our kernels, with which a row is the same bits in any company."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "on")
        model = Model.load("demo", **{"n_ctx": 2048} | options)
    assert model.engine.decoder.uses_kernels
    return model


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with load() as loaded:
        yield loaded


@pytest.fixture
def forced(monkeypatch) -> None:
    """Check every guess, whatever it costs."""
    monkeypatch.setattr(drafts_module, "draft_length", lambda draft, *_: len(draft.tokens))


def facts(answer: Any) -> tuple[Any, ...]:
    calls = [call.arguments for call in answer.tool_calls]
    return str(answer), answer.reasoning, answer.finish_reason, answer.completion_tokens, answer.stop_string, calls


def test_answers_are_the_same(model, forced):
    """Mixed requests, eight at a time, each with a seed; what was sampled without guesses comes again."""
    n = 48
    asked = [(question, options | {"seed": i}) for i, (question, options) in zip(range(n), itertools.cycle(KINDS))]
    plain = [facts(model.chat(question, drafts="off", **options)) for question, options in asked]
    found, counts = [], Counter[str]()
    for first in range(0, n, 8):
        streams = [
            model.chat(
                question, stream=True, **options, **({"expected_text": plain[first + i][0] or "x"} if i % 2 else {})
            )
            for i, (question, options) in enumerate(asked[first : first + 8])
        ]
        for stream in streams:
            answer = stream.result()
            found.append(facts(answer))
            counts.update({name: c["accepted"] for name, c in answer.drafts.items()})
    assert found == plain
    assert {name for name, accepted in counts.items() if accepted} == {"grammar", "suffix", "recent", "expected"}
    assert len(model.engine.scheduler.sequences.idle) == model.engine.decoder.n_sequences


def test_log_probabilities_are_the_same(model, forced):
    options = LONG | {"logprobs": True, "top_logprobs": 2, "temperature": 1.0, "seed": 3}
    plain = model.chat("Say something.", drafts="off", **options)
    guessed = model.chat("Say something.", expected_text=str(plain), **options)
    assert guessed.drafts["expected"]["accepted"] > 20
    assert guessed.logprobs == plain.logprobs


class Rubbish:
    """Guesses at random."""

    def __init__(self) -> None:
        self._draw = random.Random(1)

    def propose(self, keys: Any, n: int) -> Draft | None:
        return Draft("rubbish", [self._draw.randrange(300) for _ in range(n)])


def test_rubbish_changes_nothing_and_is_soon_not_checked(model, monkeypatch):
    options = LONG | {"temperature": 1.0, "seed": 5, "max_tokens": 120}
    plain = model.chat("Say something.", drafts="off", **options)
    monkeypatch.setattr(drafts_module, "OwnText", Rubbish)
    monkeypatch.setattr(RecentAnswers, "propose", lambda self, keys, n: None)
    monkeypatch.setattr(StepCosts, "seconds", lambda self, n: 1 + 0.2 * n)
    answer = model.chat("Say something.", **options)
    assert str(answer) == str(plain)
    assert answer.drafts.get("rubbish", {"checked": 0})["checked"] <= 16
    monkeypatch.setattr(drafts_module, "draft_length", lambda draft, *_: len(draft.tokens))
    forced = model.chat("Say something.", **options)
    assert str(forced) == str(plain)
    assert forced.drafts["rubbish"]["checked"] > 1000


def chi_square_fits(counts: Counter[int], alternatives: Any, temperature: float) -> int:
    """Check that counts fit the model's probabilities, among those that are known; returns how many count."""
    logits = np.array([other.logprob for other in alternatives]) / temperature
    found = np.array([counts[other.id] for other in alternatives], float)
    shares = np.exp(logits - logits.max())
    wanted = shares / shares.sum() * found.sum()
    many = wanted >= 5
    found, wanted = np.append(found[many], found[~many].sum()), np.append(wanted[many], wanted[~many].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    k = max(1, len(wanted) - 1)
    # The point beyond which 0.1 % lies, by Wilson and Hilferty's approximation.
    most = k * (1 - 2 / (9 * k) + 3.09 * (2 / (9 * k)) ** 0.5) ** 3
    assert ((found - wanted) ** 2 / wanted).sum() <= most
    return int(found.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_the_distribution_is_the_models(model, forced, temperature):
    """Of tokens after a first and a second one that were expected: from a step's first row, and from a guess's."""
    options: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    options |= {"max_tokens": 4, "ignore_eos": True, "logprobs": True, "top_logprobs": 20}
    answers = [model.chat("Say something.", seed=i, expected_text="4177", **options).logprobs for i in range(500)]
    begun = [scores for scores in answers if scores[0].token == "4"]
    found = Counter(scores[1].id for scores in begun)
    assert chi_square_fits(found, begun[0][1].top_logprobs, temperature) >= 40
    if temperature == 0.5:
        right = [scores for scores in begun if scores[1].token == "1"]
        third = Counter(scores[2].id for scores in right)
        assert chi_square_fits(third, right[0][2].top_logprobs, temperature) >= 40


def test_the_kv_cache_holds_what_was_said(model, forced):
    decoder = model.engine.decoder
    plain = model.chat("Say something.", drafts="off", **LONG | {"greedy": True})
    wrong = str(plain)[:20] + " red " + str(plain)[24:]
    answer = model.chat("Say something.", expected_text=wrong, **LONG | {"greedy": True})
    checked = answer.drafts["expected"]
    assert 0 < checked["accepted"] < checked["checked"]
    held = max((decoder.keys(s) for s in range(decoder.n_sequences)), key=len)
    n_prompt = answer.prompt_tokens
    assert len(held) == n_prompt + answer.completion_tokens - 1
    # What is computed after it equals what a fresh run gives.
    then = [{"role": "user", "content": "Say something."}, answer.message(), {"role": "user", "content": "And then?"}]
    with load() as fresh:
        assert str(fresh.chat(then, greedy=True, max_tokens=12)) == str(model.chat(then, greedy=True, max_tokens=12))


def test_a_full_cache_does_without(forced):
    """Two answers fill the context; guesses that have no cells are dropped before anybody is preempted."""
    with load(n_ctx=160) as model:
        options = {"greedy": True, "ignore_eos": True, "repetition_check": False, "max_tokens": 120}
        alone = str(model.chat("Say something.", drafts="off", **options))
        streams = [model.chat("Say something.", stream=True, expected_text=alone, **options) for _ in range(2)]
        assert [str(stream.result()) for stream in streams] == [alone] * 2


def test_what_is_refused(model):
    for wrong in ("on", "draft", ["grammar", "x"], 5):
        with pytest.raises(MessageError, match="drafts is"):
            model.chat("Hi", drafts=wrong)
    with pytest.raises(MessageError, match="expected_text is 5"):
        model.chat("Hi", expected_text=5)
    with pytest.raises(MessageError, match="beam search, which has none"):
        model.chat("Hi", beams=2, expected_text="x")
    assert model.chat("Hi", drafts="off", greedy=True).drafts == {}
    assert model.chat("Hi", beams=2).drafts == {}


# --- the parts -----------------------------------------------------------------------------------------------------


def test_how_many_tokens_pay():
    costs = StepCosts()
    for n, seconds in ((1, 1.0), (2, 1.5), (4, 1.6), (8, 2.4), (16, 4.0)):
        costs.record(n, seconds)
    draft = Draft("x", [*range(15)])
    assert draft_length(draft, 0.0, 1, 1, costs) == 0
    assert draft_length(draft, 0.2, 1, 1, costs) == 0
    assert draft_length(draft, 0.8, 1, 1, costs) in range(3, 8)
    assert draft_length(draft, 1.0, 1, 1, costs) == 15
    assert draft_length(Draft("x", [1, 2]), 1.0, 1, 1, costs) == 2


def test_costs_between_what_was_measured_and_beyond():
    costs = StepCosts()
    assert costs.seconds(6) / costs.seconds(1) == pytest.approx(2.0)
    costs.record(2, 1.2)
    assert costs.seconds(1) == pytest.approx(1.0)
    assert costs.seconds(6) == pytest.approx(2.0)
    costs.record(6, 3.2)
    assert costs.seconds(4) == pytest.approx(2.2)
    costs.record(12, 2.2)  # another program made those of 6 slow
    assert costs.seconds(6) == costs.seconds(12) == pytest.approx(2.7)
    for _ in range(OLD + 1):
        costs.record(2, 1.2)
    assert costs.seconds(6) == pytest.approx(2.0)  # the others were too long ago


def test_text_that_repeats_itself():
    source = OwnText()
    text = [1, 2, 3, 4, 5, 6, ("a", 0), 2, 3, 4]
    assert source.propose(text, 4) == Draft("suffix/short", [5, 6])  # not beyond a picture
    assert source.propose([*text, 9], 4) is None
    assert source.propose([*text, 9, 7, 7, 7, 7], 3) == Draft("suffix/short", [7])


def test_the_longest_match_is_continued():
    source = OwnText()
    text = [9, 8, 7, 1, 2, 3, 50, 0, 1, 2, 3, 60, 9, 8, 7, 1, 2, 3]
    assert source.propose(text, 1) == Draft("suffix/middle", [50])


def test_earlier_answers_are_bounded():
    recent = RecentAnswers(200)
    for i in range(60):
        recent.add([1000 * i + j for j in range(10)])
    assert recent.propose([0, 1, 2], 4) is None  # forgotten
    assert recent.propose([59_000, 59_001, 59_002], 4) == Draft("recent/short", [59_003, 59_004, 59_005, 59_006])
    assert recent.propose([59_007, 59_008, 59_009], 4) is None  # another answer follows
    recent.add([*range(70_000, 71_000)])  # longer than all that is remembered
    assert len(recent._index) <= 200


def test_an_expected_text_is_found_again():
    text = [*range(100, 160)]
    source = ExpectedText(text, 2)
    keys = [1, 2]
    assert source.propose(keys, 3) == Draft("expected", [100, 101, 102])
    keys += [100, 101, 7]  # another word in place of 102
    found = source.propose(keys, 2)
    assert found is not None
    assert found.tokens == [103, 104]
    keys += [103, 104]
    assert source.propose(keys, 2) == Draft("expected", [105, 106])
    keys += [7, 8, 9, 120, 121]  # some words are left out
    found = source.propose(keys, 2)
    assert found is not None
    assert found.tokens == [122, 123]
    keys += [3] * 20
    assert source.propose(keys, 2) is None  # something else altogether
    assert source.propose([*keys, 140, 141, 142], 2) == Draft("expected", [143, 144])


def test_trust_is_learnt_without_checking():
    usual: dict[str, Any] = {}
    source = OwnText()
    drafting = Drafting([source], None, usual)
    text: list[Any] = [1, 2, 3, 4]
    for token in [1, 2, 3, 4] * 20:
        drafting.best(text, 8)
        drafting.settle([token])
        text.append(token)
    assert drafting.share("suffix/long") > 0.9
    assert drafting.counts == {}
    assert Drafting([], None, usual).share("suffix/long") > 0.9  # the next answer begins with it


def test_tokens_that_a_form_forces(model):
    answer = model.chat("An invoice.", schema=SCHEMA, greedy=True, max_tokens=60)
    assert answer.drafts.get("grammar", {"accepted": 0})["accepted"] > 5
