"""Answers that are one of several texts, match a pattern, or follow a grammar; and rules about tokens."""

from __future__ import annotations

import re

import pytest

from edge_runtime.errors import MessageError
from edge_runtime.generation.token_rules import TokenRules
from edge_runtime.option_checks import checked_options
from edge_runtime.options import GenerationOptions
from edge_runtime.structured_output.text_form import literal_pattern, without_anchors

WARM = {"temperature": 5.0, "top_p": 1.0, "max_tokens": 60}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "choices", [["a", "ab", "abc"], ["é", "漢字", "😀"], ["a.*b", "^$", "\\d", "[x]"], ["two\nlines", " blank "]]
)
def test_one_of_several_texts(exact_model, choices, seed):
    answer = exact_model.chat("Hi", choices=choices, seed=seed, **WARM)
    assert answer.answer in choices
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", ["[a-c]{2,5}", "(yes|no)!?", r"^\d{4}-\d\d$", "(é|漢)+x", r"a\$"])
def test_patterns(exact_model, pattern, seed):
    answer = exact_model.chat("Hi", regex=pattern, seed=seed, **WARM)
    if answer.finish_reason == "stop":
        assert re.fullmatch(pattern, answer.answer)
    else:
        assert pattern == "(é|漢)+x", "the only one that may get so long"


def test_grammars_in_both_notations(exact_model):
    for grammar in ('root ::= [a-b]+ "!"', 'start: /[a-b]+/ "!"'):
        answer = exact_model.chat("Hi", grammar=grammar, seed=1, **WARM)
        assert re.fullmatch("[ab]+!?", answer.answer)


def test_a_form_after_the_start_of_an_answer(exact_model):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "al"}]
    assert exact_model.chat(messages, choices=["alpha", "beta"], **WARM).answer == "pha"
    messages[1]["content"] = "alpha"
    assert exact_model.chat(messages, choices=["alpha", "beta"], **WARM).answer == ""
    messages[1]["content"] = "gamma"
    with pytest.raises(MessageError, match="starts with 'gamma'"):
        exact_model.chat(messages, choices=["alpha", "beta"], **WARM)


@pytest.mark.parametrize(
    "options",
    [
        {"choices": []},
        {"choices": [""]},
        {"choices": "a"},
        {"choices": ["a", 5]},
        {"regex": ""},
        {"regex": "("},
        {"regex": 5},
        {"regex": r"(?=a)"},
        {"grammar": "root ::= nowhere"},
        {"grammar": "?"},
        {"regex": "a", "choices": ["a"]},
        {"regex": "a", "json": True},
        {"regex": "a", "schema": {"type": "integer"}},
        {"choices": ["a"], "beams": 2},
        {"choices": ["a"], "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"choices": ["a"], "min_tokens": 3},
        {"min_tokens": -1},
        {"min_tokens": True},
        {"ignore_eos": 1},
        {"ignore_eos": True, "beams": 2},
        {"min_tokens": 3, "stop": ["a"]},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [1 << 40]},
        {"allowed_token_ids": "ab"},
        {"stop_token_ids": [1.5]},
        {"stop_token_ids": [5] * 5000},
    ],
)
def test_what_cannot_be_enforced_is_refused(demo, options):
    with pytest.raises(MessageError) as error:
        demo.chat("Hi", max_tokens=2, **options)
    assert any(name in str(error.value) for name in options)


def testliteral_patterns_match_themselves_alone():
    for text in ("a.b", "\\", "(", "é\n", "x" * 3):
        pattern = re.sub(
            r"\\x\{([0-9a-f]+)\}", lambda found: re.escape(chr(int(found[1], 16))), literal_pattern(text)
        )
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("given", "found"), [("^a$", "a"), ("a\\$", "a\\$"), ("a\\\\$", "a\\\\"), ("a", "a"), ("$", ""), ("^a|b$", "a|b")]
)
def test_anchors_are_implied(given, found):
    assert without_anchors(given) == found


def test_candidates():
    ends = frozenset({7, 9})
    assert TokenRules(frozenset({3})).candidates(0, 12, ends) is None
    assert 7 not in TokenRules(ignore_eos=True).candidates(50, 12, ends)
    early = TokenRules(frozenset({3}), min_tokens=2)
    assert sorted({*range(12)} - {*early.candidates(1, 12, ends).tolist()}) == [3, 7, 9]
    assert early.candidates(2, 12, ends) is None
    assert TokenRules(allowed=(1, 7)).candidates(0, 12, ends).tolist() == [1, 7]
    assert TokenRules(allowed=(1, 7), min_tokens=1).candidates(0, 12, ends).tolist() == [1]


def test_the_models_end_tokens_need_no_rules_of_their_own(demo):
    ends = [*demo.tokenizer.stop_ids]
    options = GenerationOptions(stop_token_ids=ends, regex="a+", stop=["."])
    assert checked_options(options, demo.limits).token_rules(demo.tokenizer.stop_ids) is None
