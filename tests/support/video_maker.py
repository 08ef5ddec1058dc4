"""Videos for tests: every frame shows its number in black and white squares, which survive any codec."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

SQUARES, SIDE = (4, 3), 16  # twelve bits, in pixels each
SIZE = SQUARES[0] * SIDE, SQUARES[1] * SIDE


def numbered(number: int) -> np.ndarray:
    """A frame that shows a number: ndarray [shape=(height, width, 3), uint8]."""
    bits = [(number >> i & 1) * 255 for i in range(SQUARES[0] * SQUARES[1])]
    squares = np.array(bits, np.uint8).reshape(SQUARES[1], SQUARES[0])
    return np.repeat(np.kron(squares, np.ones((SIDE, SIDE), np.uint8))[..., None], 3, axis=2)


def number_of(picture: Image.Image) -> int:
    """The number that a frame shows, at any size."""
    grey = np.asarray(picture.convert("L").resize(SIZE))
    centres = grey[SIDE // 2 :: SIDE, SIDE // 2 :: SIDE].ravel() > 127
    return int(sum(1 << i for i, bit in enumerate(centres) if bit))


def make_video(
    frames: int | Sequence[np.ndarray],
    rate: Fraction | int = 25,
    *,
    kind: str = "mp4",
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Callable[[int], int] | None = None,
    options: dict[str, str] | None = None,
    prepare: Callable[[Any], None] = lambda stream: None,
    header_first: bool = False,
    sound: bool = False,
) -> bytes:
    """Encode numbered frames, or those that are given.

    Parameters
    ----------
    times : frame number → time in units of 1 / rate; None takes the number.
    prepare : called with the stream before anything is written.
    header_first : of an MP4, so that what is cut from its end is frames.
    """
    if header_first:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.mp4"
            with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
                _write(container, frames, rate, codec, pixels, times, options, prepare, sound)
            return path.read_bytes()
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        _write(container, frames, rate, codec, pixels, times, options, prepare, sound)
    return out.getvalue()


def _write(container, frames, rate, codec, pixels, times, options, prepare, sound) -> None:
    pictures = [numbered(i) for i in range(frames)] if isinstance(frames, int) else frames
    stream = container.add_stream(codec, rate=rate, options=options or {})
    height, width, _ = pictures[0].shape if len(pictures) else (*SIZE[::-1], 3)
    stream.width, stream.height, stream.pix_fmt = width, height, pixels
    stream.codec_context.time_base = Fraction(1, 1) / rate
    stream.codec_context.thread_count = 1
    prepare(stream)
    voice = container.add_stream("aac", rate=8000) if sound else None
    container.start_encoding()
    for i, pixels_of in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels_of), format="rgb24")
        frame.pts, frame.time_base = (times or (lambda n: n))(i), Fraction(1, 1) / rate
        container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if voice is not None:
        container.mux(voice.encode(silence()))
        container.mux(voice.encode())


def silence() -> av.AudioFrame:
    """A tenth of a second of nothing."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 8000
    return frame


def make_sound() -> bytes:
    """A file with only sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        voice = container.add_stream("aac", rate=8000)
        container.mux(voice.encode(silence()))
        container.mux(voice.encode())
    return out.getvalue()


def make_animation(count: int, kind: str, durations_ms: int | list[int]) -> bytes:
    """Numbered frames as GIF, WebP or APNG."""
    out = io.BytesIO()
    first, *rest = (Image.fromarray(numbered(i)) for i in range(count))
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(out, kind, save_all=True, append_images=rest, duration=durations_ms, **lossless)
    return out.getvalue()


def write_frames(folder: Path, pictures: Sequence[np.ndarray], name: str = "frame{}.png") -> Path:
    """Pictures as files of a folder."""
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / name.format(i))
    return folder
