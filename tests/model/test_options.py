"""Options of a request: one object that names them all, documented once, checked before anything is computed."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, get_type_hints

import pytest

import edge_runtime
from edge_runtime import GenerationOptions, MessageError, Model
from edge_runtime.option_checks import ModelLimits, checked_options, checked_prompt_options
from edge_runtime.options import GenerationKeywords, PreparationHooks, PromptKeywords, PromptOptions

LIMITS = ModelLimits(n_logits=300, n_tokens=290, stop_ids=frozenset({3}), max_beams=8, max_answers=64)
PAIRS = ((GenerationOptions, GenerationKeywords, {"n"}), (PromptOptions, PromptKeywords, set()))
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(("options", "keywords", "unnamed"), PAIRS, ids=["chat", "build_prompt"])
def test_keywords_are_the_fields_and_their_types(options, keywords, unnamed) -> None:
    want = get_type_hints(options) | get_type_hints(PreparationHooks)
    assert get_type_hints(keywords) == {name: kind for name, kind in want.items() if name not in unnamed}
    assert keywords.__required_keys__ == frozenset()


def test_the_help_explains_every_option() -> None:
    told = pydoc.plain(pydoc.render_doc(GenerationOptions))
    explained = {
        name.strip()
        for line in (GenerationOptions.__doc__ or "").split(" :")
        for name in line.rpartition("        ")[2].replace("\n", " ").split(",")
    }
    names = [field.name for kind in (GenerationOptions, PreparationHooks) for field in fields(kind)]
    assert not {*names} - explained
    assert all(name in told for name in names)
    for method in (Model.chat, Model.chat_n, Model.achat, Model.submit, Model.build_prompt):
        seen = pydoc.plain(pydoc.render_doc(method))
        assert "GenerationOptions" in seen or "as of `chat`" in seen, method


@pytest.mark.parametrize("name", ["temprature", "max_slice", "self", "stream_", "room", "refuse"])
def test_an_unknown_keyword_is_refused_as_python_does(demo: Model, name: str) -> None:
    for call in (demo.chat, demo.submit, demo.build_prompt, lambda *a, **k: demo.chat_n(*a, 2, **k)):
        with pytest.raises(TypeError, match=f"got (an unexpected|multiple).* argument '{name}'"):
            call("Hi", **{name: 1})


def test_a_prompt_has_no_options_of_the_answer(demo: Model) -> None:
    """They would change nothing, so they are refused rather than dropped."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        demo.build_prompt("Hi", temperature=1.0)  # type: ignore[call-arg]


MISTAKES: dict[str, dict[str, Any]] = {
    "max_tokens is 0; expected a positive": {"max_tokens": 0},
    "max_tokens is True": {"max_tokens": True},
    "thinking_budget is -1": {"thinking_budget": -1},
    "stop is 5; expected a string or a list": {"stop": 5},
    "n is 65; expected a whole number from 1 to 64": {"n": 65},
    "beams is 9; expected a whole number from 1 to 8": {"beams": 9},
    "top_logprobs is 21": {"top_logprobs": 21, "logprobs": True},
    "top_logprobs is 2, but logprobs is off": {"top_logprobs": 2},
    "n is 2, but a beam search finds one": {"n": 2, "beams": 2},
    "thinking_budget was given, but a beam search": {"thinking_budget": 2, "sampling": False},
    "top_k was given together with a beam search": {"top_k": 2, "sampling": False, "beams": 1},
    "logit_bias has the token id 300": {"logit_bias": {300: 1}},
    "tools are not a list": {"tools": "look"},
    "tool_choice is 'required', but there are no": {"tool_choice": "required"},
    "Both a schema and json=True": {"schema": {}, "json": True},
    "regex was given and grammar was given, too": {"regex": "a", "grammar": 'root ::= "a"'},
    "choices was given and so was a schema": {"choices": ["a"], "tools": [TOOL]},
    "regex was given and so was a schema": {"regex": "a", "json": True},
    "choices is .*; expected a list of 1 to 1000": {"choices": []},
    "regex is .*; expected a text": {"regex": ""},
    "grammar has half of a surrogate pair": {"grammar": "\ud800"},
    "regex has more than 100000 characters": {"regex": "a" * 100_001},
    "cannot be held to a schema or to a tool call": {"regex": "a", "beams": 2},
    "stop_token_ids has the token id 290": {"stop_token_ids": [290]},
    "allowed_token_ids is no list of at most 4096": {"allowed_token_ids": range(5)},
    "allowed_token_ids leaves no token": {"allowed_token_ids": [3, 4], "stop_token_ids": [4]},
    "min_tokens is 1.0": {"min_tokens": 1.0},
    "ignore_eos is 1; expected True or False": {"ignore_eos": 1},
    "ignore_eos was given together with a form": {"ignore_eos": True, "json": True},
    "min_tokens was given together with a form of the answer or a beam": {"min_tokens": 1, "beams": 3},
    "min_tokens was given together with stop strings": {"min_tokens": 1, "stop": "a"},
    "prompt_logprobs is on, but logprobs is off": {"prompt_logprobs": True},
    "prompt_logprobs was given together with a beam": {"prompt_logprobs": True, "logprobs": True, "beams": 2},
    "max_slices is 0": {"max_slices": 0},
    "fit is -1": {"fit": -1},
    "There is no preset": {"preset": "sonnet"},
    "prompt_ids was given without raw=True": {"prompt_ids": [1]},
    "prompt's tokens are no list": {"prompt_ids": [], "raw": True},
    "Token 1 of the prompt is 290": {"prompt_ids": [1, 290], "raw": True},
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_a_mistake_is_named_by_looking_at_the_options_alone(sentence: str) -> None:
    with pytest.raises(MessageError, match=sentence):
        checked_options(GenerationOptions(**MISTAKES[sentence]), LIMITS)


def test_mistakes_are_told_before_pictures_are_opened(demo: Model) -> None:
    """And before a schema is worked on."""
    unreadable = [{"role": "user", "content": [b"no picture", "What is it?"]}]
    for given in ({"preset": "sonnet"}, {"fit": 0}, {"max_slices": -1}, {"min_tokens": -1, "regex": "("}):
        with pytest.raises(MessageError, match=next(iter(given)).partition("_")[0]):
            demo.chat(unreadable, **given)


def test_checked_options_are_those_that_were_given() -> None:
    given = {"stop": "end", "tools": [TOOL], "tool_choice": "none", "seed": 4, "logit_bias": {"7": 1}}
    options = checked_options(GenerationOptions(**given), LIMITS)  # type: ignore[arg-type]
    assert (options.stop, options.tools, options.seed) == (("end",), [], 4)
    assert options.sampling_options().logit_bias == ((7, 1.0),)
    asked = PromptOptions(max_slices=2, tools=[TOOL])
    assert checked_prompt_options(asked, LIMITS) is asked


def test_who_looks_on_is_not_kept_with_the_request() -> None:
    """It may hold the answer, which is cancelled when it is forgotten: the request would keep it for ever."""
    look = [lambda *_: None] * 3
    options, hooks = GenerationOptions.of(dict(zip(("on_image", "on_look", "on_check"), look, strict=True)))
    assert options == GenerationOptions()
    assert [hooks.on_image, hooks.on_look, hooks.on_check] == look


def test_public_names_are_not_hidden_by_modules() -> None:
    """A module is an attribute of its package as soon as it is imported, and stands before what is made lazily."""
    for name in edge_runtime.__all__:
        assert find_spec(f"edge_runtime.{name}") is None, name


def test_the_object_is_public_and_importing_the_package_stays_light() -> None:
    assert edge_runtime.GenerationOptions is GenerationOptions
    code = (
        "import sys, edge_runtime; heavy = {'numba', 'llama_cpp', 'PIL', 'numpy', 'edge_runtime.options'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
