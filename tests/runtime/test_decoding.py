"""Foreign files in worker processes: the same pixels as in this one, within limits, whatever the files do."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_runtime.clips import expand_videos
from edge_runtime.decoding import InThisProcess, cut_source
from edge_runtime.decoding_opener import WorkerOpener
from edge_runtime.decoding_pool import DecoderPool
from edge_runtime.documents import DocumentOptions, with_pages
from edge_runtime.encoder import LazyGroup
from edge_runtime.errors import EdgeRuntimeError, EngineBusy, ImageError, VideoError
from edge_runtime.messages import parse_messages
from edge_runtime.pipeline import group_digest
from edge_runtime.prompt import iter_images
from edge_runtime.video import VideoLimits
from runtime.document_maker import COLOURS, SLICING, blocks, coloured_pdf, endless_pdf, pages_tiff, words_pdf
from runtime.video_maker import make_video, numbered


class Left(Exception):  # noqa: N818 - says what happened
    """Nobody waits any more."""


LIMITS = VideoLimits(most_pixels=1_000_000)


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(2, 60.0)
    yield pool
    pool.close()


def saved(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(noise(300, 200), "JPEG", exif=exif)


def animation() -> bytes:
    frames = [Image.fromarray(numbered(i)) for i in range(6)]
    return saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=200)


def pictures(opener, content, **options) -> list:
    """Sizes and slices of all pictures of a message; of videos the digests and pixels of their groups."""
    options = {"pages": None, "pixel_limit": 4_000_000, **options}
    limit = options.pop("pixel_limit")
    conversation = with_pages(
        parse_messages([{"role": "user", "content": content}]),
        DocumentOptions(**options),
        SLICING,
        open_part=opener.part,
    )
    found = []
    for part in iter_images(expand_videos(conversation, SLICING, LIMITS, lambda share: None, opener.video)):
        if not hasattr(part, "clip"):
            found.append(cut_source(part.source, limit, SLICING, part.max_slices))
        elif part.ids:
            for group in part.clip.group(part.number):
                assert isinstance(group, LazyGroup)
                found.append((group_digest(group), [item.pixels for item, _ in group.load()]))
                group.release()
    return found


CONTENTS = {
    "a picture": [{"type": "image", "image": saved(noise(700, 500), "PNG")}],
    "turned": [{"type": "image", "image": turned(6)}],
    "16 bits": [{"type": "image", "image": saved(noise(80, 60).convert("I;16"), "PNG")}],
    "transparent": [{"type": "image", "image": saved(noise(80, 60).convert("RGBA"), "WEBP", lossless=True)}],
    "several": [{"type": "image", "image": saved(noise(90 + i, 60), "BMP")} for i in range(3)],
    "a Pillow picture": [{"type": "image", "image": noise(50, 40)}],
    "an open file": [{"type": "image", "image": io.BytesIO(turned(3))}],
    "a PDF": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "2-"}],
    "a locked PDF": [{"type": "pdf", "pdf": words_pdf(["A"], encrypt="open"), "password": "open", "dpi": 50}],
    "a TIFF of pages": [{"type": "image", "image": pages_tiff(blocks([(40, 30), (60, 20), (10, 90)]))}],
    "an animation": [{"type": "video", "video": animation(), "packing": 2}],
    "a video": [{"type": "video", "video": make_video(30), "fps": 10, "packing": 3, "max_slices": 2}],
    "a video without times": [{"type": "video", "video": make_video(12, kind="h264"), "packing": 2}],
    "frames": [
        {"type": "video", "video": [saved(Image.fromarray(numbered(i)), "PNG") for i in range(4)], "packing": 2}
    ],
}


def assert_equal(one, other) -> None:
    assert len(one) == len(other) > 0
    for (key, pixels), (key_there, there) in zip(one, other, strict=True):
        assert key == key_there
        assert len(pixels) == len(there)
        for a, b in zip(pixels, there, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_pixels_and_fingerprints_are_those_of_this_process(pool, content):
    with WorkerOpener(pool, lambda: None) as opener:
        there = pictures(opener, content)
    assert_equal(pictures(InThisProcess(), content), there)


def test_paths_are_read_here_and_named(pool, tmp_path):
    path, text = tmp_path / "a.png", tmp_path / "b.png"
    path.write_bytes(saved(noise(90, 50), "PNG"))
    text.write_text("no picture")
    with WorkerOpener(pool, lambda: None) as opener:
        assert_equal(pictures(InThisProcess(), [path]), pictures(opener, [path]))
        for bad in (text, tmp_path / "none.png", tmp_path):
            with pytest.raises(ImageError) as there:
                pictures(opener, [bad])
            with pytest.raises(ImageError) as here:
                pictures(InThisProcess(), [bad])
            assert str(there.value) == str(here.value)


WRONG = {
    "no picture": [{"type": "image", "image": b"no picture at all"}],
    "cut short": [{"type": "image", "image": saved(noise(300, 300), "PNG")[:-9000]}],
    "too large": [{"type": "image", "image": saved(Image.new("L", (3000, 2000)), "PNG")}],
    "no PDF": [{"type": "pdf", "pdf": b"GIF89a"}],
    "a picture as PDF": [{"type": "pdf", "pdf": saved(noise(3, 3), "PNG")}],
    "no such page": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "2-9"}],
    "wrong pages": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": "a"}],
    "pages of another kind": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "pages": {1: 2}}],
    "wrong dpi": [{"type": "pdf", "pdf": coloured_pdf(COLOURS), "dpi": -1}],
    "wrong password": [{"type": "pdf", "pdf": words_pdf(["A"], encrypt="open"), "password": "shut"}],
    "no video": [{"type": "video", "video": b"no video at all"}],
    "a cut video": [{"type": "video", "video": make_video(50, header_first=True)[:-2000]}],
    "a large video": [{"type": "video", "video": make_video([np.zeros((1080, 1920, 3), np.uint8)])}],
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG)
def test_errors_are_those_of_this_process(pool, content):
    with pytest.raises(EdgeRuntimeError) as here:
        pictures(InThisProcess(), content)
    with WorkerOpener(pool, lambda: None) as opener, pytest.raises(EdgeRuntimeError) as there:
        pictures(opener, content)
    assert type(there.value) is type(here.value)
    assert str(there.value) == str(here.value)
    with WorkerOpener(pool, lambda: None) as opener:  # and the next one is served
        pictures(opener, CONTENTS["turned"])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def state(pid: int) -> str:
    """How Linux calls what a process does: R while it runs, T while it stands still."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def draw(pool, check=lambda: None) -> None:
    with WorkerOpener(pool, check) as opener:
        pictures(opener, [{"type": "pdf", "pdf": endless_pdf()}])


def test_what_takes_too_long_is_ended_and_named():
    pool = DecoderPool(1, 1.5)
    try:
        with pool.lease() as lease:
            pid = lease.worker.pid
        with pytest.raises(ImageError, match=r"^Page 1 of The document takes longer than 1\.5 s .*--decode-timeout"):
            draw(pool)
        assert not is_alive(pid)
        with WorkerOpener(pool, lambda: None) as opener:
            pictures(opener, CONTENTS["turned"])
    finally:
        pool.close()


def test_who_leaves_ends_what_is_decoded():
    pool, began = DecoderPool(1, 600.0), time.monotonic()

    def check() -> None:
        if time.monotonic() > began + 2:
            raise Left

    with pytest.raises(Left):
        draw(pool, check)
    wait_until(lambda: not pool.pids)
    pool.close()


def test_slow_files_delay_each_other_and_no_usual_one():
    """Three of them on one worker: pictures pass by, and the slow ones run one at a time."""
    pool = DecoderPool(1, 600.0)
    failures: list[BaseException] = []

    def slow() -> None:
        try:
            draw(pool)
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    threads = [threading.Thread(target=slow) for _ in range(3)]
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: pool.n_slow == 3)
        if sys.platform == "linux":
            wait_until(lambda: [state(pid) for pid in pool.pids].count("T") == 2)
        assert all(os.getpriority(os.PRIO_PROCESS, pid) > 0 for pid in pool.pids)
        with WorkerOpener(pool, lambda: None) as opener:
            pictures(opener, CONTENTS["several"])
    finally:
        pool.close()
        for thread in threads:
            thread.join(60)
    assert len(failures) == 3
    assert all("shutting down" in str(error) for error in failures)
    wait_until(lambda: not pool.pids)


def test_too_many_slow_files_are_sent_away(monkeypatch):
    monkeypatch.setattr("edge_runtime.decoding_pool.MOST_SLOW", 0)
    pool = DecoderPool(1, 600.0)
    with pytest.raises(EngineBusy, match="Page 1 of The document takes long to decode, and so do 0 other files"):
        draw(pool)
    assert pool.fast.n_free == 1
    pool.close()


def test_whoever_waits_for_a_worker_can_leave():
    def leave() -> None:
        raise Left

    pool = DecoderPool(1)
    with pool.lease(), pytest.raises(Left), pool.lease(leave):
        pass
    assert pool.fast.n_free == 1
    assert not pool.fast.waiting
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_what_needs_too_much_memory_is_refused_alone(monkeypatch):
    monkeypatch.setattr("edge_runtime.decoding_pool.LEAST_BYTES", 400 << 20)
    pool = DecoderPool(1, 60.0, pixel_limit=1)
    large = saved(Image.new("L", (16_000, 16_000)), "PNG")
    with WorkerOpener(pool, lambda: None) as opener, pytest.raises(ImageError, match=r"^The picture .*memory"):
        pictures(opener, [{"type": "image", "image": large}], pixel_limit=1 << 30)
    with WorkerOpener(pool, lambda: None) as opener:
        pictures(opener, CONTENTS["turned"])
    pool.close()


def test_a_worker_that_dies_is_one_refusal(pool):
    with WorkerOpener(pool, lambda: None) as opener:
        worker = opener.lease.worker
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: not worker.is_alive)
        with pytest.raises(ImageError, match=r"The picture ended the process that decodes it, which may take \d+ MB"):
            pictures(opener, CONTENTS["turned"])
    with WorkerOpener(pool, lambda: None) as opener:
        pictures(opener, CONTENTS["turned"])


LIES = {
    "no size": {"size": [0, 5]},
    "a huge size": {"size": [1 << 20, 1 << 20]},
    "a size that is none": {"size": [-4, -4]},
    "a size of another kind": {"size": ["large"]},
    "nothing": {},
    "another error": {"error": "SystemExit", "text": "x"},
    "an error of Python's": {"error": "EdgeRuntimeError.__class__", "text": "x"},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_worker_that_lies_is_not_believed(pool, monkeypatch, lie):
    with WorkerOpener(pool, lambda: None) as opener:
        _, (source,) = opener.part(parse_messages([{"role": "user", "content": CONTENTS["turned"]}])[0].parts[0],
                                   DocumentOptions(), 1)  # fmt: skip
        monkeypatch.setattr(opener.lease.worker, "ask", lambda *args, **more: dict(lie))
        for what in (lambda: source.size(1000), lambda: source.render(1000), lambda: source.cut(1000, SLICING, 9)):
            with pytest.raises(ImageError):
                what()


@pytest.mark.parametrize(
    "lie",
    [
        {"times": ""},
        {"times": "AAAA"},
        {"rate": 0},
        {"rate": float("nan")},
        {"digest": "x"},
        {"facts": None, "rate": []},
    ],
)
def test_an_index_that_lies_is_not_believed(pool, monkeypatch, lie):
    told = {
        "size": [48, 48],
        "rate": 25,
        "missing_s": 0,
        "times": "AAAAAAAAAAA=",
        "facts": {},
        "digest": "00",
        "state": {},
    }
    with WorkerOpener(pool, lambda: None) as opener:
        monkeypatch.setattr(opener.lease.worker, "ask", lambda *args, **more: {**told, **lie})
        with pytest.raises(VideoError, match="an index of no sense"):
            opener.video(b"video", LIMITS, lambda share: None, None)
        monkeypatch.setattr(opener.lease.worker, "ask", lambda *args, **more: dict(told))
        assert opener.video(b"video", LIMITS, lambda share: None, None).times.tolist() == [0.0]


def test_nothing_of_one_request_is_there_for_the_next():
    pool = DecoderPool(1)
    with WorkerOpener(pool, lambda: None) as opener:
        pictures(opener, CONTENTS["several"])
        pid = opener.lease.worker.pid
    with pool.lease() as lease:
        assert lease.worker.pid == pid
        with pytest.raises(ImageError, match="IndexError"):
            lease.ask({"op": "size", "item": 0, "pixel_limit": 100}, "it")
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_see_no_environment_of_ours(monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_API_KEY", "secret")
    pool = DecoderPool(1)
    with pool.lease() as lease:
        assert b"secret" not in Path(f"/proc/{lease.worker.pid}/environ").read_bytes()
        assert os.getsid(lease.worker.pid) == lease.worker.pid  # Ctrl-C does not reach it
    pool.close()


GIVEN_UP = """
import os, socket, subprocess, sys, threading
from edge_runtime import sandbox
held = sandbox.give_up_files(), sandbox.give_up_system_calls()
tried = {
    "files": [lambda: open(sys.argv[1]), lambda: open(sys.argv[1] + ".new", "w"), lambda: os.unlink(sys.argv[1])],
    "calls": [socket.socket, lambda: subprocess.run([sys.executable, "-V"]), os.fork, lambda: os.kill(1, 0),
              lambda: os.ftruncate(0, 0)],
}
for is_held, things in zip(held, tried.values()):
    for thing in things if is_held else ():
        try:
            thing()
        except PermissionError:
            continue
        sys.exit(f"{thing} was possible")
thread = threading.Thread(target=lambda: print(*held), daemon=True)
thread.start()
thread.join()
open(os.__file__).close()
"""


def test_what_is_given_up_is_gone(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    done = subprocess.run([sys.executable, "-c", GIVEN_UP, str(secret)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in ([a, b] for a in ("True", "False") for b in ("True", "False"))


BUSY = """
import sys, threading
from edge_runtime.decoding_pool import DecoderPool
from edge_runtime.decoding_opener import WorkerOpener
from edge_runtime.documents import DocumentOptions
from edge_runtime.messages import ImagePart
pool = DecoderPool(1, 600.0)
with WorkerOpener(pool, lambda: None) as opener:
    print(opener.lease.worker.pid, flush=True)
    _, (page,) = opener.part(ImagePart(open(sys.argv[1], "rb").read()), DocumentOptions(), 1000)
    print("opened", flush=True)
    page.render(10_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells nobody that a pipe is closed")
def test_workers_end_with_the_process_that_they_work_for(tmp_path):
    """Also when that is killed while a page is drawn that never ends."""
    path = tmp_path / "endless.pdf"
    path.write_bytes(endless_pdf())
    command = [sys.executable, "-c", BUSY, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert process.stdout.readline() == "opened\n"
        time.sleep(1)
        assert is_alive(pid)
        process.kill()
    wait_until(lambda: not is_alive(pid), 30)


def test_frames_that_nobody_wants_end_their_worker(pool):
    with WorkerOpener(pool, lambda: None) as opener:
        content = [{"type": "video", "video": make_video(30), "fps": 10}]
        conversation = parse_messages([{"role": "user", "content": content}])
        (message,) = expand_videos(conversation, SLICING, LIMITS, lambda share: None, opener.video)
    part = message.parts[0]
    group = part.clip.group(0)[0]
    group.ask()
    group.wait(60)
    assert pool.videos.n_free == 1
    group.release()
    wait_until(lambda: pool.videos.n_free == 2)


def test_a_damaged_frame_is_told_of(pool):
    data = bytearray(make_video(40, options={"g": "10"}, header_first=True))
    place = data.index(b"mdat")
    for i in range(place + 40, len(data) - 200, 7):
        data[i] ^= 0x55
    content = [{"type": "video", "video": bytes(data), "fps": 25}]
    with pytest.raises(VideoError) as here:
        pictures(InThisProcess(), content)
    with WorkerOpener(pool, lambda: None) as opener, pytest.raises(VideoError) as there:
        pictures(opener, content)
    assert str(there.value) == str(here.value)


def test_an_answer_is_the_same(demo, pool):
    """From messages to the answer, by the option of `Model.chat`."""
    page = Image.open(Path(__file__).parents[2] / "examples" / "sign.png")
    messages = [{"role": "user", "content": [{"type": "image", "image": saved(page, "PNG")}, "What does it say?"]}]
    here = demo.chat(messages, greedy=True, max_tokens=8)
    there = demo.chat(messages, greedy=True, max_tokens=8, decoders=pool)
    assert there.answer == here.answer
