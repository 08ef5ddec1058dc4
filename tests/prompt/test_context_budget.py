"""Many pictures: their tokens are known before they are decoded; too many are refused, or fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime import MessageError, Model, PromptTooLongError, pipeline
from edge_runtime.cli.program import main
from edge_runtime.prompt.context_budget import ContextLimits, Measured, TokenBudget
from edge_runtime.weights.config import SlicingConfig

SLICING = SlicingConfig(448, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
SIZES = [(300, 300), (448, 448), (640, 200), (120, 700), (500, 430), (60, 60)]


def picture(size: tuple[int, int] = (300, 300), shade: int = 0) -> Image.Image:
    return Image.new("RGB", size, (shade % 256, 90, 200))


def many(n: int = 6) -> list[Any]:
    return [part for i in range(n) for part in (f"Picture {i}:", picture(SIZES[i % len(SIZES)], 40 * i))]


def asked(content: list[Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, "What differs?"]}]


@pytest.mark.parametrize("most", range(1, 10))
def test_the_budget_equals_the_tokens_of_the_prompt(demo: Model, most: int) -> None:
    messages = asked(many())
    slicing, n_queries = demo.engine.encoder.slicing, demo.engine.encoder.n_queries
    n_text = len(demo.build_prompt(messages, max_slices=1).ids)
    budget = TokenBudget([Measured(size, 9) for size in SIZES], slicing, n_queries, n_text)
    prompt = demo.build_prompt(messages, max_slices=most)
    assert budget.total(most) == len(prompt.ids)
    assert sum(budget.visual(most)) == sum(end - first for first, end in prompt.bounds)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=5))
def test_fewer_cells_never_take_more(sizes: list[tuple[int, int]]) -> None:
    """So the largest number of cells that fits is the best answer, and one is the minimum."""
    budget = TokenBudget([Measured(size, 9) for size in sizes], SLICING, 64, 100)
    totals = [budget.total(most) for most in range(1, 10)]
    assert totals == sorted(totals)


def test_too_many_pictures_are_refused_with_the_size_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load("demo", n_ctx=512) as model:
        n = model.engine.encoder.n_queries
        messages = asked([picture(), picture(), picture((60, 60)), *(picture() for _ in range(30))])
        total = len(model.build_prompt(messages).ids)
        monkeypatch.setattr(pipeline, "cut_source", lambda *_, **__: pytest.fail("a picture was decoded"))
        with pytest.raises(PromptTooLongError) as refusal:
            model.chat(messages)
    text = str(refusal.value)
    assert text.startswith(f"The prompt has {total} tokens, but the context holds 512, one of them for the answer;")
    assert "for 33 pictures (pictures 1 to 2: " in text
    assert f"each, picture 3: {n}, pictures 4 to 33: " in text
    assert "--max-slices" in text or "--each-page" in text


def test_the_advice_works() -> None:
    messages = asked([picture(shade=i) for i in range(5)])
    with Model.load("demo") as large:
        whole, uncut = (len(large.build_prompt(messages, max_slices=n).ids) for n in (9, 1))
    n_ctx = (whole + uncut) // 2
    with Model.load("demo", n_ctx=n_ctx) as model:
        with pytest.raises(
            PromptTooLongError, match=r"They fit with --max-slices (\d) or --fit; .*larger --ctx"
        ) as e:
            model.chat(messages, max_tokens=1)
        most = int(str(e.value).split("--max-slices ")[1][0])
        answer = model.chat(messages, max_tokens=1, max_slices=most)
        assert answer.fitted_slices is None
        fitted = model.chat(messages, max_tokens=1, fit=True)
        assert fitted.fitted_slices == most
        assert (fitted.prompt_tokens, fitted.slices) == (answer.prompt_tokens, answer.slices)
        with pytest.raises(PromptTooLongError):
            model.chat(messages, max_tokens=1, max_slices=most + 1)


def test_pictures_with_limits_of_their_own_get_no_advice_about_a_common_one() -> None:
    messages = asked([{"type": "image", "image": picture(shade=i), "max_slices": 9} for i in range(3)])
    with Model.load("demo", n_ctx=320) as model:
        with pytest.raises(PromptTooLongError, match=r"They fit with --fit; as they are"):
            model.chat(messages, max_tokens=1)
        with pytest.raises(PromptTooLongError):
            model.chat(messages, max_tokens=1, max_slices=1)
        assert model.chat(messages, max_tokens=1, fit=True).fitted_slices is not None


def test_fit_leaves_alone_what_fits(demo: Model) -> None:
    messages = asked([picture()])
    whole, fitted = (demo.chat(messages, max_tokens=1, greedy=True, fit=fit) for fit in (False, True))
    assert fitted.fitted_slices is None
    assert fitted.slices == whole.slices


def test_a_budget_of_tokens_cuts_all_pictures_alike(demo: Model) -> None:
    n = demo.engine.encoder.n_queries
    messages = asked([picture(shade=i) for i in range(3)])
    per_picture = demo.chat(messages, max_tokens=1).visual_tokens // 3
    assert per_picture > 3 * n
    for cells in (2, 4):
        answer = demo.chat(messages, max_tokens=1, fit=3 * (cells + 1) * n)
        assert answer.visual_tokens <= 3 * (cells + 1) * n
        assert answer.fitted_slices is not None
        assert len(set(map(str, answer.slices[:: len(answer.slices) // 3]))) == 1
    least = demo.chat(messages, max_tokens=1, fit=3 * n)
    assert (least.visual_tokens, least.fitted_slices) == (3 * n, 1)
    with pytest.raises(PromptTooLongError, match=rf"may take {3 * n - 1} at most.*Uncut they take {3 * n}"):
        demo.chat(messages, fit=3 * n - 1)
    for wrong in (0, -1, "yes", 1.5):
        with pytest.raises(MessageError, match="fit is"):
            demo.chat(messages, fit=wrong)


def test_a_picture_s_own_limit_stays(demo: Model) -> None:
    n = demo.engine.encoder.n_queries
    content = [{"image": picture(), "max_slices": 1}, "and", {"type": "image", "image": picture(), "max_slices": 4}]
    free = demo.chat(asked(content), max_tokens=1)
    assert len(free.slices) == 1 + 5
    fitted = demo.chat(asked(content), max_tokens=1, fit=4 * n)
    assert len(fitted.slices) == 1 + 3
    assert fitted.fitted_slices == 3  # with which a square is cut into two


def test_where_turns_may_be_dropped_only_the_last_one_is_fitted() -> None:
    turn = [{"role": "user", "content": [picture(), "What?"]}, {"role": "assistant", "content": "That."}]
    with Model.load("demo", n_ctx=320) as model:
        short = model.chat([*turn * 4, *turn[:1]], max_tokens=1, max_slices=2, context_shift=True, fit=True)
        assert short.dropped_turns > 0
        assert short.fitted_slices is None
        with pytest.raises(PromptTooLongError):
            model.chat([*turn * 4, *turn[:1]], max_tokens=1, max_slices=2)
        with pytest.raises(PromptTooLongError, match="pictures"):  # the last turn alone is too much
            model.chat([*turn, *asked([picture()] * 60)], max_tokens=1, context_shift=True)
        alone = model.chat([*turn, *asked([picture()] * 5)], max_tokens=1, context_shift=True, fit=True)
        assert alone.fitted_slices is not None


def test_limits_keep_something_for_the_answer() -> None:
    assert ContextLimits(1000, 2000).prompt == 750
    assert ContextLimits(1000, 100).prompt == 900
    assert ContextLimits(1000, 0).prompt == 999


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture(shade=i).save(path)
    return [str(path) for path in paths]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["run", *arguments, "--max-tokens", "1", "--greedy"])


def test_limits_for_single_files(files: list[str]) -> None:
    whole = json.loads(run(*files, "What?", "--json", "--max-slices", "1").stdout)
    assert len(whole["slices"]) == 3
    each = json.loads(run(files[0], "and", files[1], files[2], "What?", "--json", "--max-slices", "1,2,4").stdout)
    assert [each["slices"].index(size) for size in each["slices"][:1]] == [0]
    assert len(each["slices"]) == 1 + 3 + 5


def test_fitting_is_reported(files: list[str]) -> None:
    result = run(*files, "What?", "--ctx", "320", "--fit")
    assert result.exit_code == 0
    assert "each was cut into at most" in result.stderr
    result = run(*files, "What?", "--json", "--fit-tokens", "48")
    answer = json.loads(result.stdout)
    assert (answer["visual_tokens"], answer["fitted_slices"]) == (48, 1)
    assert "at most 1 cell, so not at all" in result.stderr


@pytest.mark.parametrize("value", ["0", "a", "1,,2", "1,x", "-1", "1.5"])
def test_wrong_limits_are_usage_errors(files: list[str], value: str) -> None:
    assert run(*files, "What?", f"--max-slices={value}").exit_code == 2


def test_as_many_limits_as_files(files: list[str]) -> None:
    result = run(*files, "What?", "--max-slices", "1,2")
    assert result.exit_code == 2
    assert "2 numbers for 3 files" in result.stderr
    assert run(*files, "--max-slices", "1,2,3").exit_code == 2


def tool(number: int) -> dict[str, object]:
    described = {"type": "string", "description": "what is looked for, in the words of the user " * 4}
    parameters = {"type": "object", "properties": {"query": described}, "required": ["query"]}
    return {"type": "function", "function": {"name": f"search_{number}", "parameters": parameters}}


@pytest.mark.parametrize("content", ["Hello", [picture(), "Hello"]])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_prompt_too_long_names_the_share_of_its_tools(demo: Model, content: object, system: list[object]) -> None:
    messages, tools = [*system, {"role": "user", "content": content}], [tool(number) for number in range(36)]
    with pytest.raises(PromptTooLongError) as caught:
        demo.chat(messages, tools=tools)
    whole, without = (len(demo.build_prompt(messages, tools=each).ids) for each in (tools, []))
    share = (
        f"The prompt has {whole} tokens, of which {whole - without} tokens are the 36 tools, but the context holds"
    )
    assert str(caught.value).startswith(f"{share} {demo.n_ctx}")
    assert ("--tools" in str(caught.value)) == (content == "Hello")  # beside pictures, the advice is about those
    with pytest.raises(PromptTooLongError, match=r"tokens, but the context holds"):
        demo.chat([{"role": "user", "content": "x " * 9000}])
    with pytest.raises(PromptTooLongError, match=r", of which \d+ tokens are the tool, but"):
        demo.chat([{"role": "user", "content": "x " * 9000}], tools=tools[:1])
