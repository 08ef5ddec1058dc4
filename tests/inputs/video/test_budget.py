"""Videos with many pictures: frames are counted in groups, cut less together, and refused with what would help."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime import MessageError, Model, PromptTooLongError, each_page
from edge_runtime.cli.program import main
from edge_runtime.inputs.video.reader import FrameReader
from edge_runtime.options import GenerationOptions
from edge_runtime.prompt.context_budget import ContextLimits, Measured, TokenBudget
from edge_runtime.weights.config import SlicingConfig
from support.document_maker import words_pdf
from support.video_maker import make_animation, numbered, write_frames

SLICING = SlicingConfig(448, 14, 9, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
WIDE, SQUARE = (640, 200), (300, 300)


def picture(size: tuple[int, int] = SQUARE, shade: int = 0) -> Image.Image:
    return Image.new("RGB", size, (shade % 256, 90, 200))


def video(n: int = 5, size: tuple[int, int] = SQUARE, **options: Any) -> dict[str, Any]:
    return {"type": "video", "video": [picture(size, 20 * i) for i in range(n)], **options}


def asked(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, "What happens?"]}]


def mixed(most: int) -> list[dict[str, Any]]:
    """A picture, five frames in three groups, a picture, and three frames, one in a group."""
    first = video(5, WIDE, packing=2, max_slices=min(6, most))
    return asked("Look:", picture(WIDE), first, "and", picture(), video(3, packing=1, max_slices=1, timestamps=True))


MIXED = [
    Measured(WIDE, 9),
    *(Measured(WIDE, 6, n, of_video=True) for n in (2, 2, 1)),
    Measured(SQUARE, 9),
    *[Measured(SQUARE, 1, 1, of_video=True)] * 3,
]


def budget_of(demo: Model) -> TokenBudget:
    n_text = len(demo.build_prompt(mixed(1), max_slices=1).ids)
    return TokenBudget(MIXED, demo.engine.encoder.slicing, demo.engine.encoder.n_queries, n_text)


@pytest.mark.parametrize("most", range(1, 10))
def test_the_budget_equals_the_tokens_of_the_prompt(demo: Model, most: int) -> None:
    prompt = demo.build_prompt(mixed(most), max_slices=most)
    budget = budget_of(demo)
    assert budget.total(most) == len(prompt.ids)
    assert sum(budget.visual(most)) == sum(end - first for first, end in prompt.bounds)


@pytest.mark.parametrize("most", range(1, 10))
def test_frames_are_cut_less_together_with_the_pictures(demo: Model, most: int) -> None:
    """What `fit` leaves is what the same limit for all leaves, to the token."""
    expected = demo.build_prompt(mixed(most), max_slices=most)
    fitted = demo.build_prompt(mixed(9), fit=sum(budget_of(demo).visual(most)))
    assert fitted.text == expected.text
    assert fitted.bounds == expected.bounds


def test_frames_of_a_group_stay_together_and_nothing_is_decoded_twice(
    demo: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: set[FrameReader] = set()
    take = FrameReader.take
    monkeypatch.setattr(
        FrameReader, "take", lambda self, *given, **how: readers.add(self) or take(self, *given, **how)
    )
    n = demo.engine.encoder.n_queries
    messages = asked(video(5, packing=2, max_slices=4, timestamps=True))
    whole = demo.chat(messages, max_tokens=1)
    assert len(whole.slices) == 5 * 5
    fitted = demo.chat(messages, max_tokens=1, fit=3 * 3 * n)
    assert fitted.fitted_slices == 3  # with which a square is cut into two
    assert fitted.visual_tokens == 3 * 3 * n
    assert len(fitted.slices) == 5 * 3
    assert fitted.pictures == [list(SQUARE)] * 5
    for answer in (whole, fitted):
        assert [len(group) for group in answer.videos[0]["times_s"]] == [2, 2, 1]
        assert len(answer.videos) == 1
    assert len(readers) == 2  # one for each question, however the frames are cut


def test_two_videos_keep_their_own_limits(demo: Model) -> None:
    n = demo.engine.encoder.n_queries
    messages = asked(video(2, packing=1, max_slices=1), video(2, packing=1, max_slices=4))
    assert demo.chat(messages, max_tokens=1).visual_tokens == (2 * 1 + 2 * 5) * n
    fitted = demo.chat(messages, max_tokens=1, fit=8 * n)
    assert (fitted.visual_tokens, len(fitted.videos)) == ((2 * 1 + 2 * 3) * n, 2)


def test_the_refusal_names_groups_and_its_advice_works() -> None:
    with Model.load("demo", n_ctx=512) as model:
        n = model.engine.encoder.n_queries
        messages = asked(video(40, packing=1))
        total = len(model.build_prompt(messages).ids)
        with pytest.raises(PromptTooLongError) as refusal:
            model.chat(messages, max_tokens=1)
        text = str(refusal.value)
        assert text.startswith(f"The prompt has {total} tokens, but the context holds 512,")
        assert f"{40 * n} are for videos (40 groups of frames: {n} each)." in text
        assert f"Uncut they take {40 * n}: use fewer frames (--max-frames) or more in a group (--packing)" in text
        assert "--max-slices" not in text
        assert "--pages" not in text
        for better in ({"max_frames": 10, "packing": 1}, {"packing": 6}):
            answer = model.chat(asked(video(40, **better)), max_tokens=1)
            assert answer.visual_tokens <= 10 * n


def test_where_frames_are_cut_the_advice_is_to_cut_them_less() -> None:
    messages = asked(picture(), video(4, packing=1, max_slices=4))
    with Model.load("demo", n_ctx=320) as model:
        with pytest.raises(PromptTooLongError, match=r"They fit with --fit; .*larger --ctx"):
            model.chat(messages, max_tokens=1)
        with pytest.raises(PromptTooLongError):  # a limit for all pictures is none for a video's frames
            model.chat(messages, max_tokens=1, max_slices=1)
        fitted = model.chat(messages, max_tokens=1, fit=True)
        assert fitted.fitted_slices in (1, 2, 3)
        uncut = asked(picture(), *[picture()] * 2, video(4, packing=1))
        with pytest.raises(PromptTooLongError, match=r"They fit with --max-slices (\d) or --fit") as refusal:
            model.chat(uncut, max_tokens=1)
        most = int(str(refusal.value).split("--max-slices ")[1][0])
        assert model.chat(uncut, max_tokens=1, max_slices=most).fitted_slices is None


def told(pictures: list[Measured]) -> str:
    text = str(TokenBudget(pictures, SLICING, 64, 100).refusal(ContextLimits(64, 1)))
    found = re.search(r"are for (.*?\))\.", text)
    assert found is not None
    return found[1]


def test_the_size_of_each_is_listed_in_order() -> None:
    small, large = Measured((300, 300), 9), Measured((1344, 1344), 9)
    frame = Measured((300, 300), 1, 3, of_video=True)
    assert told([small]) == "one picture (picture 1: 64)"
    assert told([frame]) == "videos (one group of frames: 64)"
    assert told([small, small, frame, frame, large]) == (
        "3 pictures and videos (pictures 1 to 2: 64 each, 2 groups of frames: 64 each, picture 3: 640)"
    )
    assert told([small, frame] * 4).endswith("one group of frames: 64, and so on to picture 4)")
    cut = Measured((1344, 1344), 9, of_video=True)
    assert told([frame, cut] * 4).endswith("one group of frames: 640, and so on)")


def test_only_the_last_turn_s_video_counts_where_turns_may_be_dropped() -> None:
    turn = [*asked(video(8, packing=1)), {"role": "assistant", "content": "That."}]
    with Model.load("demo", n_ctx=320) as model:
        with pytest.raises(PromptTooLongError, match="24 groups of frames"):
            model.chat([*turn * 2, *turn[:1]], max_tokens=1)
        answer = model.chat([*turn * 2, *turn[:1]], max_tokens=1, context_shift=True, fit=True)
        assert answer.dropped_turns > 0
        assert (len(answer.videos), answer.fitted_slices) == (1, None)


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_frames", "packing", "fits", "each_page", "max_page"])
def test_unknown_options_are_refused(demo: Model, name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        GenerationOptions.of({"fit": True, name: 3})
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        demo.chat("Hello", **{name: 3})


def test_a_video_has_no_pages(demo: Model) -> None:
    for content in ([video(), "What?"], [words_pdf(["CAFE"]), video(), "What?"]):
        with pytest.raises(MessageError, match=r"a video, which has no pages; ask about it by itself"):
            list(each_page(demo, content))


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, large frames in a folder, an animation, and a document."""
    folder = tmp_path_factory.mktemp("mixed")
    picture().save(folder / "photo.png")
    write_frames(folder / "frames", [numbered(i).repeat(5, axis=0).repeat(5, axis=1) for i in range(3)])
    (folder / "moves.gif").write_bytes(make_animation(10, "GIF", 100))
    (folder / "words.pdf").write_bytes(words_pdf(["CAFE", "TAXI"]))
    return folder


def run(*arguments: object, lines: str | None = None) -> Any:
    return CliRunner().invoke(main, ["run", *map(str, arguments), "--greedy", "--max-tokens", "4"], input=lines)


def test_limits_for_single_files_count_videos(folder: Path) -> None:
    def slices(*limits: str) -> int:
        result = run(f"{folder}/frames/", folder / "photo.png", "What?", "--packing", 1, "--json", *limits)
        assert result.exit_code == 0, result.stderr
        return len(json.loads(result.stdout)["slices"])

    assert slices("--max-slices", "4,1") == 3 * 5 + 1
    assert slices("--max-slices", "1,4") == 3 + 5
    assert slices("--max-slices", "4") == 3 + 5  # one number is for pictures; frames are not cut, as officially
    result = run(f"{folder}/frames/", folder / "photo.png", "What?", "--max-slices", "4,1,1")
    assert result.exit_code == 2
    assert "3 numbers for 2 files" in result.stderr


def test_fitting_a_video_is_reported(folder: Path) -> None:
    result = run(
        *(f"{folder}/frames/", folder / "photo.png", "What?", "--packing", 1, "--json"),
        *("--max-slices", "4,4", "--fit-tokens", 4 * 16),
    )
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["visual_tokens"], answer["fitted_slices"], len(answer["slices"])) == (4 * 16, 1, 4)
    assert "at most 1 cell, so not at all" in result.stderr


@pytest.mark.parametrize("name", ["moves.gif", "frames/"])
def test_each_page_is_not_for_videos(folder: Path, name: str) -> None:
    result = run(folder / "words.pdf", f"{folder}/{name}", "What?", "--each-page")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--each-page asks about pages and pictures; ask about a video separately" in result.stderr


def test_a_chat_takes_a_document_and_a_video(folder: Path) -> None:
    lines = f"/image {folder / 'words.pdf'}\n/image {folder / 'moves.gif'}\nWhat does it say?\n"
    result = run("--pages", "2", lines=lines)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "words.pdf (1 page) goes with the next question" in result.stderr
    assert "moves.gif (0:01.0, 3 frames in " in result.stderr
