"""Sends damaged files of every format to a server while another client asks for text; counts the replies.

    .venv/bin/python tools/mutated_files.py --each 10000 [--format jpeg ...] [--seed 0] [--clients 4]

Files are made here; then bytes are changed, repeated or removed, or numbers in them made large. They go to a separate
server on this machine, to the route that counts tokens, which decodes pictures and renders pages without using the
model. Frames of videos are decoded only for an answer, so every tenth video is asked about.

Expected: no status but 200 and 400, no request beyond the time limit, no worker left running, and every request of
the other client answered. The exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
from PIL import Image, features
from reportlab.pdfgen.canvas import Canvas

LIMIT_S = 10.0
"""Time for one file, the server's --decode-timeout."""
PAUSE_S = 3.0
"""Time between two questions of the other client."""
LARGEST = b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x01\x00\x00", b"\x00\x00\x00\x00"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with some noise, and large areas of one colour."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 2] = 200
    return Image.fromarray(pixels)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """An encoded picture."""
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def animated(kind: str) -> bytes:
    """An animation of eight frames."""
    frames = [noise(64, 48, seed) for seed in range(8)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=150)


def document() -> bytes:
    """A PDF with text, a picture, curves and two pages."""
    out = io.BytesIO()
    canvas = Canvas(out, pagesize=(200, 120), invariant=True, pageCompression=0)
    for page in range(2):
        canvas.setFont("Helvetica-Bold", 30)
        canvas.drawString(20, 60, f"Page {page}")
        canvas.drawInlineImage(noise(30, 20, page), 120, 10, 40, 30)
        canvas.linearGradient(10, 10, 90, 40, ("red", "blue"))
        canvas.bezier(10, 100, 60, 20, 110, 110, 190, 90)
        canvas.showPage()
    canvas.save()
    return out.getvalue()


def recorded(kind: str, codec: str, pixels: str = "yuv420p", **options: str) -> bytes:
    """A video of 20 frames."""
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream: Any = container.add_stream(codec, rate=Fraction(10), options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.asarray(noise(96, 64, i)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


PICTURES: Mapping[str, Callable[[], bytes]] = {
    "jpeg": lambda: saved(noise(96, 64), "JPEG", exif=_exif(), dpi=(72, 144)),
    "progressive jpeg": lambda: saved(noise(96, 64), "JPEG", progressive=True),
    "png": lambda: saved(noise(96, 64), "PNG"),
    "palette png": lambda: saved(noise(96, 64).quantize(16), "PNG", transparency=3),
    "16-bit png": lambda: saved(Image.fromarray(np.arange(6144, dtype=np.uint16).reshape(64, 96)), "PNG"),
    "webp": lambda: saved(noise(96, 64), "WEBP", exif=_exif()),
    "lossless webp": lambda: saved(noise(96, 64).convert("RGBA"), "WEBP", lossless=True),
    "gif": lambda: saved(noise(96, 64).quantize(32), "GIF"),
    "bmp": lambda: saved(noise(96, 64), "BMP"),
    "tiff": lambda: saved(noise(96, 64), "TIFF", compression="tiff_lzw"),
    "jpeg in tiff": lambda: saved(noise(96, 64), "TIFF", compression="jpeg"),
    "fax": lambda: saved(noise(96, 64).convert("1"), "TIFF", compression="group4"),
    "pages tiff": lambda: saved(noise(48, 32), "TIFF", save_all=True, append_images=[noise(32, 48)] * 2),
    "jpeg 2000": lambda: saved(noise(96, 64), "JPEG2000"),
    "avif": lambda: saved(noise(96, 64), "AVIF"),
    "icon": lambda: saved(noise(64, 64), "ICO"),
    "ppm": lambda: saved(noise(48, 32), "PPM"),
    "tga": lambda: saved(noise(48, 32), "TGA", compression="tga_rle"),
    "pcx": lambda: saved(noise(48, 32), "PCX"),
    "pdf": document,
}
VIDEOS: Mapping[str, Callable[[], bytes]] = {
    "mp4": lambda: recorded("mp4", "libx264", g="5"),
    "webm": lambda: recorded("webm", "libvpx-vp9", g="5"),
    "avi": lambda: recorded("avi", "mpeg4"),
    "mjpeg": lambda: recorded("avi", "mjpeg", "yuvj420p"),
    "transport stream": lambda: recorded("mpegts", "libx264", g="5"),
    "animated gif": lambda: animated("GIF"),
    "animated webp": lambda: animated("WEBP"),
    "animated png": lambda: animated("PNG"),
    "animated avif": lambda: animated("AVIF"),
}


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def mutated(whole: bytes, chance: random.Random) -> bytes:
    """The file with one to six changes."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 6)):
        at = min(int(chance.random() ** 2 * len(data)), len(data) - 1)  # more often near the start
        length = chance.choice((1, 2, 4, 16, 200))
        change = chance.randrange(7)
        if change == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            data[at] = chance.randrange(256)
        elif change == 2:
            data[at : at + 4] = chance.choice(LARGEST)
        elif change == 3:
            del data[at : at + length]
        elif change == 4:
            data[at:at] = data[at : at + length] * chance.choice((1, 2, 50))
        elif change == 5:
            data[at : at + length] = chance.randbytes(length)
        else:
            other = chance.randrange(len(data))
            data[at : at + length] = data[other : other + length]
        if not data:
            return whole[: chance.randrange(1, len(whole))]
    return bytes(data[: chance.randrange(1, len(data) + 1)] if chance.random() < 0.1 else data)


def request_for(kind: str, data: bytes, *, answered: bool) -> tuple[str, dict[str, Any]]:
    """Path and body of a request with the file."""
    uri = f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"
    if kind in VIDEOS:
        part: dict[str, Any] = {"type": "video_url", "video_url": {"url": uri}, "max_frames": 6, "packing": 6}
    else:
        part = {"type": "image_url", "image_url": {"url": uri}}
    body = {"model": "demo", "messages": [{"role": "user", "content": [part]}]}
    if answered:
        return "/v1/chat/completions", {**body, "max_tokens": 1}
    return "/v1/chat/completions/input_tokens", body


@contextlib.contextmanager
def served() -> Iterator[tuple[str, int]]:
    """Run a server of our own; yield its address and process id."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "edge_runtime", "serve", "--port", "0", "--grace", "2", "-m", "demo"]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--decode-timeout", f"{LIMIT_S:g}"], stdout=out, stderr=subprocess.STDOUT
            )
        try:
            address = None
            while address is None:
                if process.poll() is not None:
                    sys.exit(log.read_text())
                address = re.search(r"http://[\d.]+:\d+", log.read_text())
                time.sleep(0.2)
            yield address[0], process.pid
        finally:
            process.terminate()
            process.wait(30)


class Neighbour:
    """Another client, which asks for text all the time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 2}
        with httpx.Client(base_url=self.address, timeout=120, trust_env=False) as client:
            while not self._stop.wait(PAUSE_S):
                started = time.perf_counter()
                try:
                    reply = client.post("/v1/chat/completions", json=body)
                    if reply.status_code != 200:
                        self.failures.append(f"{reply.status_code} {reply.text[:200]}")
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.seconds.append(time.perf_counter() - started)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def children(pid: int) -> list[int]:
    """Ids of the processes that a process has started."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def run(kind: str, each: int, seed: int, address: str, n_clients: int, folder: Path) -> dict[str, Any]:
    """Send damaged files of one format."""
    whole = {**PICTURES, **VIDEOS}[kind]()
    counts: collections.Counter[str] = collections.Counter()
    slowest, bad = 0.0, []
    lock = threading.Lock()

    def one(client: httpx.Client, number: int) -> None:
        nonlocal slowest
        data = mutated(whole, random.Random(f"{kind} {seed} {number}"))
        path, body = request_for(kind, data, answered=kind in VIDEOS and number % 10 == 0)
        started = time.perf_counter()
        try:
            reply = client.post(path, json=body)
            said, status = reply.text, str(reply.status_code)
        except httpx.HTTPError as error:
            said, status = repr(error), "none"
        taken = time.perf_counter() - started
        with lock:
            slowest = max(slowest, taken)
            counts[status] += 1
            if "takes longer than" in said:
                counts["too slow"] += 1
            if "ended the process" in said:
                counts["ended its worker"] += 1
            if status not in ("200", "400"):
                bad.append(f"{kind} {number}: {status} {said[:300]}")
                (folder / f"{kind.replace(' ', '_')}-{number}").write_bytes(data)

    def some(first: int) -> None:
        with httpx.Client(base_url=address, timeout=8 * LIMIT_S, trust_env=False) as client:
            for number in range(first, each, n_clients):
                one(client, number)

    with ThreadPoolExecutor(n_clients) as threads:
        for done in [threads.submit(some, first) for first in range(n_clients)]:
            done.result()
    return {"format": kind, "files": each, **counts, "slowest_s": round(slowest, 2), "bad": bad}


def main() -> int:
    """Send the files of all formats; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=10_000)
    parser.add_argument("--format", action="append", choices=[*PICTURES, *VIDEOS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--keep", type=Path, default=Path("build/mutated"), help="where files that did harm are kept")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the server ends with us
    options.keep.mkdir(parents=True, exist_ok=True)
    kinds = options.format or [*PICTURES, *VIDEOS]
    if not features.check("avif"):
        kinds = [kind for kind in kinds if "avif" not in kind]
    is_bad = False
    with served() as (address, pid), Neighbour(address) as neighbour:
        for kind in kinds:
            started = time.perf_counter()
            found = run(kind, options.each, options.seed, address, options.clients, options.keep)
            is_bad = is_bad or bool(found["bad"])
            print(json.dumps({**found, "took_s": round(time.perf_counter() - started)}), flush=True)
        time.sleep(2)
        left = children(pid)
        seconds = sorted(neighbour.seconds)
        summary = {
            "text_asked": len(seconds),
            "text_failed": neighbour.failures[:5],
            "text_median_s": round(seconds[len(seconds) // 2], 3),
            "text_worst_s": round(seconds[-1], 2),
            "processes_left": len(left),
        }
        print(json.dumps(summary))
        return int(is_bad or bool(neighbour.failures) or len(left) > 4)


if __name__ == "__main__":
    sys.exit(main())
