"""Videos in messages: the prompt and the visual tokens of the official recipe, decoded as a stream, once."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.things import DIRECTIONS, Thing, draw_things
from edge_runtime import MessageError, Model, RequestCancelled, VideoError
from edge_runtime.inputs.clips import choose
from edge_runtime.inputs.messages import VideoPart
from edge_runtime.inputs.video.container import FileCursor, VideoFile
from edge_runtime.inputs.video.frame_choice import VideoLimits, VideoOptions, clock
from edge_runtime.inputs.video.picture_frames import PictureFrames
from edge_runtime.inputs.video.reader import MAX_KEPT, _Reading
from support.video_maker import make_animation, make_video, numbered, write_frames
from tolerances import RESAMPLER

HOLES = "<image>" + "<unk>" * 64 + "</image>"


@pytest.fixture
def model(exact_folder: Path):
    with Model.load(exact_folder, exact=True, n_ctx=4096) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def clip() -> bytes:
    """Two seconds, from which the recipe chooses six frames."""
    return make_video(50, 25, options={"preset": "ultrafast", "g": "10"})


def video(source, question="What happens?", **options):
    return [{"role": "user", "content": [{"type": "video", "video": source, **options}, question]}]


def ask(model: Model, messages, **options):
    return model.chat(messages, greedy=True, max_tokens=6, **options)


# --- the prompt ---------------------------------------------------------------------------------------------------


def test_groups_share_a_placeholder_and_follow_each_other_on_lines(exact_model: Model, clip):
    prompt = exact_model.build_prompt(video(clip, packing=3))
    assert f"<|im_start|>user\n{HOLES}\n{HOLES}\nWhat happens?<|im_end|>" in prompt.text
    assert len(prompt.bounds) == 2
    numbered_prompt = exact_model.build_prompt(video(clip, packing=4), use_image_id=True)
    assert f"<image_id>0</image_id>{HOLES}\n<image_id>4</image_id>{HOLES}\nWhat" in numbered_prompt.text


def test_timestamps_come_before_each_group(exact_model: Model, clip):
    text = exact_model.build_prompt(video(clip, packing=3, timestamps=True)).text
    assert f"user\n[0:00.2]\n{HOLES}\n[0:01.2]\n{HOLES}\nWhat" in text
    assert [clock(s) for s in (0, 59.96, 83.25, 3723.04)] == ["0:00.0", "1:00.0", "1:23.2", "1:02:03.0"]


def test_pictures_and_a_video_keep_their_places_and_have_no_numbers(exact_model: Model, clip, images):
    content = ["Before", images["tiny"], {"type": "video", "video": clip, "packing": 6}, "between", images["tiny"]]
    text = exact_model.build_prompt([{"role": "user", "content": content}]).text
    assert f"user\nBefore\n{HOLES}\n{HOLES}\nbetween\n{HOLES}<|im_end|>" in text


def test_every_form_of_a_video_is_the_same_prompt(exact_model: Model, clip, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(clip)
    uri = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    parts = [
        *({"type": "video", "video": source} for source in (clip, path, str(path), io.BytesIO(clip), uri)),
        {"type": "video_url", "video_url": {"url": uri}},
        {"type": "video_url", "video_url": uri},
        {"video": clip},
        path,
    ]
    prompts = [exact_model.build_prompt([{"role": "user", "content": [part, "What?"]}]) for part in parts]
    assert {prompt.text for prompt in prompts} == {prompts[0].text}
    assert len(prompts[0].bounds) == 6


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "video"}, "a video without content"),
        ({"type": "video_url", "video_url": {"url": "http://h/a.mp4"}}, "expected a data: URI .data:video/mp4"),
        ({"type": "video_url", "video_url": "/etc/passwd"}, "expected a data: URI"),
        ({"type": "video", "video": b"x", "speed": 2}, "has the option 'speed'; expected one of fps, max_frames"),
        (
            {"type": "video", "video": b"x", "packing": 7},
            "packing of a video is 7; expected a whole number from 1 to 6",
        ),
        ({"type": "video", "video": b"x", "packing": True}, "packing of a video is True"),
        ({"type": "video", "video": b"x", "fps": 0}, "fps of a video is 0"),
        ({"type": "video", "video": b"x", "fps": float("nan")}, "fps of a video is nan"),
        ({"type": "video", "video": b"x", "max_frames": 0}, "max_frames of a video is 0"),
        ({"type": "video", "video": b"x", "max_slices": None}, "max_slices of a video is None"),
        ({"type": "video", "video": b"x", "start": -1}, "start of a video is -1"),
        ({"type": "video", "video": b"x", "start": 2, "end": 2}, "is empty; expected an end after its start"),
        ({"type": "video", "video": b"x", "timestamps": "yes"}, "timestamps of a video is 'yes'"),
        ({"type": "video", "video": 3}, "of type int; expected a path"),
        ({"type": "movie", "movie": b"x"}, "'video' or 'video_url'"),
    ],
)
def test_a_wrong_part_is_refused(exact_model: Model, part, reason):
    with pytest.raises((MessageError, VideoError), match=reason):
        exact_model.build_prompt([{"role": "user", "content": [part, "What?"]}])


def test_a_video_belongs_to_a_user_and_has_its_own_ids(exact_model: Model, clip):
    with pytest.raises(MessageError, match="pictures belong to user messages"):
        exact_model.build_prompt([{"role": "system", "content": [{"video": clip}]}, {"role": "user", "content": "a"}])
    with pytest.raises(MessageError, match="which has its own"):
        exact_model.build_prompt(video(clip), temporal_ids=[[0] * 6])
    with pytest.raises(VideoError, match=r"at most 0\.5 s are allowed"):
        exact_model.build_prompt(video(clip), video_limits=VideoLimits(most_seconds=0.5))


# --- the visual tokens --------------------------------------------------------------------------------------------


def pictures(count: int, width: int, height: int) -> list[np.ndarray]:
    frames = np.random.default_rng(1).integers(0, 256, (count, 6, 9, 3), np.uint8)
    return [np.asarray(Image.fromarray(frame).resize((width, height))) for frame in frames]


@pytest.mark.parametrize(
    "count, packing, max_slices",
    [(6, 6, 1), (8, 6, 1), (7, 3, 1), (3, 2, 3)],
    ids=["a group of six", "left-over frames", "threes", "sliced frames"],
)
def test_tokens_are_those_of_the_frames_as_pictures(exact_model: Model, tmp_path, count, packing, max_slices):
    """`test_vision` compares `encode_video` with the formula; this goes through a conversation."""
    frames = pictures(count, 320, 160) if max_slices == 1 else pictures(count, 900, 300)
    folder = write_frames(tmp_path / "frames", frames)
    prepared = exact_model.prepare(video(folder, packing=packing, max_slices=max_slices))
    ids = [list(range(0, 10 * count, 10))[i : i + packing] for i in range(0, count, packing)]
    (facts,) = prepared.videos
    ids = facts["temporal_ids"]
    assert [len(group) for group in ids] == [packing] * (count // packing) + [count % packing] * (count % packing > 0)
    wanted = exact_model.encode_video([Image.fromarray(frame) for frame in frames], ids, max_slices)
    got = exact_model.engine.run(lambda: exact_model.encode_groups(prepared.groups))
    assert len(wanted) == len(got) == len(prepared.prompt.bounds) == len(ids) * (1 if max_slices == 1 else 4)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=RESAMPLER)
    assert len(set(prepared.digests)) == len(got)


def test_the_answer_is_that_to_the_frames_as_pictures(model, tmp_path):
    frames = pictures(5, 200, 120)
    answer = ask(model, video(write_frames(tmp_path / "frames", frames), packing=2))
    content = [*(Image.fromarray(frame) for frame in frames), "What happens?"]
    options = {"temporal_ids": answer.videos[0]["temporal_ids"], "max_slices": 1, "use_image_id": False}
    with Model.load(model.paths.decoder.parent, exact=True) as other:
        assert str(ask(other, [{"role": "user", "content": content}], **options)) == str(answer)
    assert answer.pictures == [[200, 120]] * 5
    assert len(answer.slices) == 5
    assert answer.visual_tokens == 3 * 64


# --- as a stream, and once ----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Positions of the frames that cursors decode from now on."""
    found, read = [], FileCursor.read
    monkeypatch.setattr(FileCursor, "read", lambda self, i, watch: found.append(i) or read(self, i, watch))
    return found


def test_a_second_question_decodes_nothing(model, clip, reads):
    first = ask(model, video(clip, packing=2))
    assert reads == [0, 4, 12, 20, 29, 37, 45]  # the first frame gives size and colours
    reads.clear()
    second = ask(model, video(clip, "And why?", packing=2))
    assert reads == [0]
    assert second.cached_tokens > second.visual_tokens == first.visual_tokens
    ask(model, video(clip, packing=2, start=0.5))
    assert len(reads) > 2


def test_other_frames_times_and_cuts_are_distinguished(model, clip):
    variants = [{}, {"packing": 2}, {"fps": 2}, {"start": 1.0}]
    digests = [tuple(model.prepare(video(clip, **options)).digests) for options in variants]
    assert len(set(digests)) == len(variants)
    again, other = clip, make_video(50, 25, options={"preset": "ultrafast", "g": "12"})
    assert tuple(model.prepare(video(again)).digests) == digests[0]
    assert not set(model.prepare(video(other)).digests) & set(digests[0])


def test_few_groups_are_in_memory_at_any_time(model, monkeypatch):
    most, put = [], _Reading.put

    def watched(self, number, found, stop):
        put(self, number, found, stop)
        most.append(len(self.done))

    monkeypatch.setattr(_Reading, "put", watched)
    long = make_video(300, 30, options={"preset": "ultrafast"})
    answer = ask(model, video(long, fps=5, packing=1))
    assert answer.visual_tokens == 50 * 64
    assert len(most) == 50
    assert max(most) < MAX_KEPT


def test_progress_is_reported_while_frames_are_awaited(model, clip, monkeypatch):
    read, seen = FileCursor.read, threading.Semaphore(0)

    def after_it_was_told(self, i, watch):
        assert i == 0 or seen.acquire(timeout=10)
        return read(self, i, watch)

    monkeypatch.setattr(FileCursor, "read", after_it_was_told)
    looked, told = [], []

    def tell(progress):
        told.append(progress)
        if progress.stage == "decode":
            seen.release()

    (stream,) = model.submit(video(clip, packing=2), greedy=True, max_tokens=2, on_look=looked.append)
    stream.on_progress = tell
    stream.result()
    assert looked == sorted(looked)
    assert looked[-1] == 1.0
    decode = [(p.done, p.total) for p in told if p.stage == "decode"]
    assert [done for done, _ in decode] == sorted(done for done, _ in decode)
    assert decode[0][0] == 0
    assert decode[-1][0] >= 3
    assert {total for _, total in decode} == {6}
    assert [p.done for p in told if p.stage == "encode"][-1] == 6
    shares = [p.share for p in told if p.stage == "encode"]
    assert shares == sorted(shares)  # a group of two frames goes through the tower in two runs
    assert len(set(shares)) > 6 * model.engine.encoder.tower.config.layers


def test_answers_flow_while_frames_are_awaited(model, clip, monkeypatch):
    gate, read = threading.Event(), FileCursor.read

    def held(self, i, watch):
        while i and not gate.wait(0.01):
            watch(0.0)
        return read(self, i, watch)

    monkeypatch.setattr(FileCursor, "read", held)
    waiting = model.chat(video(clip), stream=True, greedy=True, max_tokens=4)
    assert ask(model, "Hello").completion_tokens > 0
    assert not model.engine.scheduler.active[0].n_tokens
    gate.set()
    assert waiting.result().completion_tokens > 0


def test_a_cancelled_request_stops_the_decoder(model, clip, monkeypatch):
    left, read = threading.Event(), FileCursor.read

    def endless(self, i, watch):
        if not i:
            return read(self, i, watch)
        try:
            while True:
                watch(0.0)
                time.sleep(0.005)
        finally:
            left.set()

    monkeypatch.setattr(FileCursor, "read", endless)
    running = model.chat(video(clip), stream=True)
    running.on_progress = lambda progress: running.cancel() if progress.stage == "decode" else None
    assert running.result().finish_reason == "cancelled"
    assert left.wait(2)
    monkeypatch.setattr(FileCursor, "read", read)
    assert ask(model, video(clip)).completion_tokens > 0


def test_indexing_ends_when_an_awaited_answer_is_cancelled(model, clip, monkeypatch):
    began, left = threading.Event(), threading.Event()

    def scan(self, content, limits, watch):
        began.set()
        try:
            while True:
                watch(0.5)
                time.sleep(0.005)
        finally:
            left.set()

    monkeypatch.setattr(VideoFile, "__init__", scan)

    async def give_up() -> None:
        answer = model.achat(video(clip))
        waiting = asyncio.create_task(answer._whole())
        await asyncio.to_thread(began.wait)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await asyncio.to_thread(left.wait, 2)
        began.clear()
        other = model.achat(video(clip))
        waiting = asyncio.create_task(other._whole())
        await asyncio.to_thread(began.wait)
        other.cancel()
        with pytest.raises(RequestCancelled):
            await waiting

    asyncio.run(give_up())


def test_a_frame_that_cannot_be_decoded_ends_only_its_own_request(model, clip, images, monkeypatch):
    read = FileCursor.read

    def broken(self, i, watch):
        if i > 20:
            raise VideoError("Frame 21 cannot be decoded.")
        return read(self, i, watch)

    monkeypatch.setattr(FileCursor, "read", broken)
    bad = model.chat(video(clip), stream=True, greedy=True, max_tokens=4)
    good = model.chat(
        [{"role": "user", "content": [images["tiny"], "What?"]}], stream=True, greedy=True, max_tokens=4
    )
    with pytest.raises(VideoError, match="Frame 21"):
        bad.result()
    assert good.result().completion_tokens > 0
    monkeypatch.setattr(FileCursor, "read", read)
    assert ask(model, video(clip)).completion_tokens > 0


def test_nothing_is_left_running_or_open(model, clip):
    ask(model, video(clip))
    end = time.monotonic() + 3
    while any(t.name == "edge-runtime frames" for t in threading.enumerate()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(t.name == "edge-runtime frames" for t in threading.enumerate())


def test_turns_with_a_video_are_dropped_whole(model, clip):
    chat = [
        *video(clip, packing=1),
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Hello " * 900},
    ]
    chat += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "And?"}]
    with Model.load(model.paths.decoder.parent, exact=True, n_ctx=1200) as small:
        answer = ask(small, chat, context_shift=True)
    assert answer.dropped_turns >= 1
    assert (answer.videos, answer.pictures, answer.slices) == ([], [], [])


def test_an_animation_and_frames_of_pictures_need_no_file(model, monkeypatch):
    loads = []
    read = PictureFrames.read
    monkeypatch.setattr(PictureFrames, "read", lambda self, i, watch: loads.append(i) or read(self, i, watch))
    answer = ask(model, video(make_animation(10, "GIF", 100), fps=10))
    assert len(answer.pictures) == 10
    assert len(ask(model, video([Image.fromarray(numbered(i)) for i in range(3)])).pictures) == 3
    assert loads == [0, 1, 2]


# --- what the demo model sees -------------------------------------------------------------------------------------


def moving(direction: str, count: int = 4, side: int = 112) -> list[np.ndarray]:
    dx, dy = DIRECTIONS[direction]
    places = np.linspace(0.2, 0.8, count)[:: 1 if dx + dy > 0 else -1]
    balls = [Thing("circle", "red", float(p) if dx else 0.5, float(p) if dy else 0.5, 14) for p in places]
    rng = np.random.default_rng(0)
    return [np.asarray(draw_things(rng, (side, side), [ball], (235, 235, 225))) for ball in balls]


@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_the_demo_model_names_the_direction_and_reversed_ids_turn_it_round(demo: Model, tmp_path, direction, suffix):
    frames = moving(direction)
    path = tmp_path / f"ball.{suffix}"
    if suffix == "mp4":
        path.write_bytes(make_video(frames, 3, options={"crf": "10"}))
    else:
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, duration=330)
    question = "Which way does the ball move?"
    answer = demo.chat(video(path, question, packing=4), greedy=True, max_tokens=12)
    (ids,) = answer.videos[0]["temporal_ids"]
    assert len(ids) == 4
    assert str(answer) == direction

    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[direction]
    found = choose(VideoPart(path, VideoOptions(packing=4)), VideoLimits())
    cursor = found.source.open()
    content = [*(cursor.read(i, lambda share: None) for i in found.choice.indices), question]
    cursor.close()
    reversed_ids = {"temporal_ids": [ids[::-1]], "max_slices": 1, "use_image_id": False}
    messages = [{"role": "user", "content": content}]
    assert str(demo.chat(messages, greedy=True, max_tokens=12, **reversed_ids)) == opposite
