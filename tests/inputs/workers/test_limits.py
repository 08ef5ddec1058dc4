"""Workers that decode untrusted files have limits, end when they must, and see nothing that they do not need."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from edge_runtime.errors import EngineBusy, ImageError, VideoError
from edge_runtime.inputs.clips import expand_videos
from edge_runtime.inputs.documents import DocumentOptions
from edge_runtime.inputs.messages import parse_messages
from edge_runtime.inputs.workers.lanes import Lane
from edge_runtime.inputs.workers.opener import WorkerOpener
from edge_runtime.inputs.workers.pool import DecoderPool
from inputs.workers.test_workers import CONTENTS, LIMITS, pictures, saved
from support.document_maker import SLICING, endless_pdf
from support.slow_files import PICTURES, VIDEOS
from support.video_maker import make_video

SLOW_OR_LARGE = (
    r"takes longer than 0\.7 s to decode|needs more memory|ended the process that decodes it|cannot be read"
)


class Left(Exception):  # noqa: N818 - says what happened
    """Nobody waits any more."""


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(2, 60.0)
    yield pool
    pool.close()


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
    """State of a process in Linux: R while it runs, T while it is stopped."""
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


@pytest.mark.parametrize("kind", [*PICTURES, *VIDEOS])
def test_every_kind_of_slow_file_is_ended(kind):
    """In time, with one sentence; the next file is decoded as if nothing had happened."""
    pool = DecoderPool(1, 0.7)
    content = [{"type": "image", "image": PICTURES[kind]()}] if kind in PICTURES else []
    content += [{"type": "video", "video": VIDEOS[kind]()}] if kind in VIDEOS else []
    try:
        with WorkerOpener(pool, lambda: None) as opener, pytest.raises(ImageError, match=SLOW_OR_LARGE):
            pictures(opener, content, pixel_limit=64_000_000, video_pixels=64_000_000)
        with WorkerOpener(pool, lambda: None) as opener:
            pictures(opener, CONTENTS["turned"])
    finally:
        pool.close()


def test_a_client_that_leaves_ends_its_decoding():
    pool, began = DecoderPool(1, 600.0), time.monotonic()

    def check() -> None:
        if time.monotonic() > began + 2:
            raise Left

    with pytest.raises(Left):
        draw(pool, check)
    wait_until(lambda: not pool.pids)
    pool.close()


def test_slow_files_delay_each_other_but_no_usual_one():
    """Three of them on one worker: pictures overtake them, and the slow ones run one at a time."""
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


def test_too_many_slow_files_are_refused(monkeypatch):
    monkeypatch.setattr("edge_runtime.inputs.workers.pool.MAX_SLOW", 0)
    pool = DecoderPool(1, 600.0)
    with pytest.raises(EngineBusy, match="Page 1 of The document takes long to decode, and so do 0 other files"):
        draw(pool)
    assert pool.fast.n_free == 1
    pool.close()


def test_clients_who_have_used_less_come_first():
    """One asks for nine, then another for one: it waits for one of the nine to end, not for all."""
    lane, order, lock = Lane(1, threading.Condition()), [], threading.Lock()

    def use(owner: str) -> None:
        since = lane.take(owner, lambda: None)
        with lock:
            order.append(owner)
        time.sleep(0.05)
        lane.give_back(owner, since)

    first = lane.take("many", lambda: None)  # held until all of them wait
    threads = [threading.Thread(target=use, args=(owner,)) for owner in ["many"] * 9 + ["one"]]
    for n, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda n=n: len(lane.waiting) == n)
    lane.give_back("many", first)
    for thread in threads:
        thread.join(60)
    assert order == ["one"] + ["many"] * 9
    assert lane.n_free == 1


def test_a_client_that_waits_for_a_worker_can_leave():
    def leave() -> None:
        raise Left

    pool = DecoderPool(1)
    with pool.lease(), pytest.raises(Left), pool.lease(leave):
        pass
    assert pool.fast.n_free == 1
    assert not pool.fast.waiting
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit the address space")
def test_only_a_file_that_needs_too_much_memory_is_refused(monkeypatch):
    monkeypatch.setattr("edge_runtime.inputs.workers.pool.MIN_BYTES", 400 << 20)
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
        with pytest.raises(VideoError, match="a nonsensical index"):
            opener.video(b"video", LIMITS, lambda share: None, None)
        monkeypatch.setattr(opener.lease.worker, "ask", lambda *args, **more: dict(told))
        assert opener.video(b"video", LIMITS, lambda share: None, None).times.tolist() == [0.0]


def test_one_request_leaves_nothing_for_the_next():
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
        assert os.getpgid(lease.worker.pid) == lease.worker.pid  # Ctrl-C does not reach it
        assert os.getsid(lease.worker.pid) == os.getsid(0)
    pool.close()


GIVEN_UP = """
import os, socket, subprocess, sys, threading
from edge_runtime.system import sandbox
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


def test_given_up_rights_are_gone(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    done = subprocess.run([sys.executable, "-c", GIVEN_UP, str(secret)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in ([a, b] for a in ("True", "False") for b in ("True", "False"))


BUSY = """
import sys, threading
from edge_runtime.inputs.workers.lanes import Lane
from edge_runtime.inputs.workers.pool import DecoderPool
from edge_runtime.inputs.workers.opener import WorkerOpener
from edge_runtime.inputs.documents import DocumentOptions
from edge_runtime.inputs.messages import ImagePart
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
