"""Videos on the command line: options, JSON, storyboards, chat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime import Model
from edge_runtime.answers import TOY_NOTICE
from edge_runtime.cli import terminal as console
from edge_runtime.cli.chat import Chat
from edge_runtime.cli.program import main
from edge_runtime.inputs.clips import choose
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.storyboard import draw_storyboard
from edge_runtime.inputs.video.frame_choice import VideoLimits, VideoOptions
from support.command import refused
from support.video_maker import make_animation, make_sound, make_video, number_of, numbered, write_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A file, an animation, a picture, sound, and a folder of frames."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "clip.mp4").write_bytes(make_video(75, 25, options={"preset": "ultrafast"}))
    (folder / "moves.gif").write_bytes(make_animation(10, "GIF", 100))
    (folder / "still.png").write_bytes(make_animation(1, "PNG", 100))
    (folder / "sound.mp4").write_bytes(make_sound())
    (folder / "empty.mp4").write_bytes(b"")
    write_frames(folder / "frames", [numbered(i) for i in range(5)])
    return folder


def run(*arguments: object):
    return CliRunner().invoke(main, ["run", *map(str, arguments), "--greedy", "--max-tokens", "4"])


def test_json_tells_which_frames_were_seen_and_when(folder):
    result = run(
        folder / "clip.mp4", "What?", "--json", "--packing", 4, "--fps", 5, "--start", "0:01", "--timestamps"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == f"{TOY_NOTICE}\n" or "compiling" in result.stderr
    (video,) = json.loads(result.stdout)["videos"]
    assert video["frames_in_video"] == 75
    assert video["seconds"] == pytest.approx(3.0)
    assert (video["fps"], video["packing"], video["size"]) == (25.0, 4, [64, 48])
    assert [len(group) for group in video["times_s"]] == [4, 4, 2]
    assert video["times_s"][0][:2] == pytest.approx([1.08, 1.28])
    assert video["temporal_ids"][0] == [1, 3, 5, 7]


@pytest.mark.parametrize("name, frames", [("moves.gif", 3), ("frames/", 5), ("clip.mp4", 9)])
def test_animations_folders_and_files_are_videos(folder, name, frames):
    result = run(f"{folder}/{name}", "What?", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["pictures"]) == frames


def test_a_still_picture_stays_one(folder):
    found = json.loads(run(folder / "still.png", "What?", "--json").stdout)
    assert (len(found["pictures"]), found["videos"]) == (1, [])


def test_a_storyboard_shows_every_frame_in_its_group(folder, tmp_path):
    target = tmp_path / "seen.png"
    result = run(folder / "clip.mp4", "What?", "--packing", 2, "--storyboard", target)
    assert result.exit_code == 0, result.stderr
    assert f"{target}: the frames that the model sees." in result.stderr
    assert target.stat().st_size
    chosen = choose(VideoPart(folder / "clip.mp4", VideoOptions(packing=2)), VideoLimits())
    shares: list[float] = []
    sheet = draw_storyboard(chosen, shares.append)
    with Image.open(target) as written:
        assert np.array_equal(np.asarray(written.convert("RGB")), np.asarray(sheet))
    assert shares[-1] == 1.0
    width, height, most = 160, 120, 2
    seen = []
    for number, group in enumerate(chosen.groups):
        x, y = 10 + number % 4 * (most * width + 10), 10 + number // 4 * (height + 26)
        seen += [
            number_of(sheet.crop((x + i * width, y, x + (i + 1) * width, y + height))) for i in range(len(group))
        ]
    assert seen == chosen.choice.indices
    assert sheet.size == (10 + 4 * (most * width + 10), 10 + 2 * (height + 26))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["Hi", "--packing", "3"], "--packing needs a video"),
        (["Hi", "--max-frames", "3"], "--max-frames needs a video"),
        (["Hi", "--storyboard", "a.png"], "--storyboard needs one video; 0 are named"),
        (["clip.mp4", "Hi", "--packing", "7"], "7 is not in the range 1<=x<=6"),
        (["clip.mp4", "Hi", "--start", "1:2:3:4"], "'1:2:3:4' is not a time; expected seconds, or 1:30"),
        (["clip.mp4", "Where?", "--draw", "a.png"], "--draw needs a picture and a question"),
        (["clip.mp4", "clip.mp4", "Hi", "--storyboard", "a.png"], "needs one video; 2 are named"),
    ],
)
def test_wrong_usage_is_told(folder, monkeypatch, arguments, reason):
    monkeypatch.chdir(folder)
    result = run(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["empty.mp4", "Hi"], "is empty"),
        (["sound.mp4", "Hi"], "has no pictures"),
        (["no.mkv", "Hi"], "does not exist"),
        (["clip.mp4", "Hi", "--start", "1:00"], "has no frame from 60 s to"),
        (["clip.mp4", "Hi", "--start", "2", "--end", "1"], "an end after its start"),
        (["clip.mp4", "Hi", "--storyboard", "a.doc"], "suffix"),
    ],
)
def test_bad_videos_are_refused_with_one_sentence(folder, monkeypatch, arguments, reason):
    monkeypatch.chdir(folder)
    refused(["run", *arguments], reason)


def test_a_video_goes_into_a_chat(demo: Model, folder, monkeypatch, capsys):
    asked = []

    def answer(model, messages, options, quiet=False):
        asked.append(messages[-1]["content"])
        return demo.chat("Hello", greedy=True)

    monkeypatch.setattr("edge_runtime.cli.terminal.answer", answer)
    lines = iter(
        [f"/image {folder / 'clip.mp4'}", "What?", f"/image {folder / 'sound.mp4'}", f"/image {folder}/no.mp4"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    options = VideoOptions(packing=3)
    chat = Chat(demo, [], {"thinking": False, "pixel_limit": 10_000}, options)
    chat.loop([VideoPart(folder / "moves.gif", options), folder / "still.png"])
    seen = capsys.readouterr().err
    assert "moves.gif (0:01.0, 3 frames in 1 groups) goes with the next question" in seen
    assert "clip.mp4 (0:03.0, 9 frames in 3 groups)" in seen
    assert "has no pictures" in seen
    assert "does not exist" in seen
    assert asked == [
        [
            VideoPart(folder / "moves.gif", options),
            folder / "still.png",
            VideoPart(folder / "clip.mp4", options),
            "What?",
        ]
    ]


def test_ctrl_c_while_a_video_is_read_leaves_the_chat_open(demo: Model, folder, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("edge_runtime.cli.terminal.answer", interrupted)
    lines = iter(["What?", "And?"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    Chat(demo, [], {"thinking": False, "pixel_limit": 10_000}).loop([])
    assert capsys.readouterr().err.count("Stopped.") == 2


def test_progress_tells_what_is_read(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = console.AnswerProgress()
    for share in (0.101, 0.102, 0.5):
        progress.on_look(share)
    progress.on_drawing(0.5)
    progress.clear()  # or it is drawn every second until the end of all tests
    seen = capsys.readouterr().err
    assert seen.count("looking through the video, 10%") == 1
    assert seen.count("looking through the video, 50%") == 1
    assert "drawing the storyboard, 50%" in seen
