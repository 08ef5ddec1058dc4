"""Videos that Pillow reads: pictures in order (a folder, or a list) and animations (GIF, WebP, APNG, AVIF).

`container` reads files that need PyAV. A source is indexed once, when it is made; cursors then decode frames, one
after the other, in any thread, and hold only the current frame.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, ImageSequence

from edge_runtime.errors import VideoError
from edge_runtime.inputs.image import PIXEL_LIMIT, ImageSource, encoded, explained, load_image, to_rgb
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_source import Watch, file_identity
from edge_runtime.inputs.video.source import Content, check_pixels, check_seconds

FOLDER_RATE = 1.0  # pictures per second, unless given
UNTIMED_FRAME_S = 0.1  # of animations whose frames have no duration, as browsers show them
AS_STORED: Mapping[str, Any] = {"tone_mapped": None, "pixel_aspect": None}
MAX_ANIMATION_FRAMES = 20_000  # skipping one means composing it, however small the file


def pictures_in(folder: Path) -> list[Path]:
    """Pictures of a folder, sorted by name with numbers compared as numbers: 2 before 10.

    Raises
    ------
    VideoError
        When there is none.
    """
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if not found:
        raise VideoError(f"The folder {folder} holds no pictures; expected frames of a video in it.")
    return sorted(found, key=lambda path: [(len(d), d) if d.isdigit() else (0, d) for d in _parts(path.name)])


def _parts(name: str) -> list[str]:
    """Text and numbers alternately, so that like is compared with like."""
    return [part.lstrip("0") if part.isdigit() else part for part in re.split(r"(\d+)", name)]


Load = Callable[[ImageSource, int, Callable[[], None]], Image.Image]


def _load_here(picture: ImageSource, pixel_limit: int, check: Callable[[], None]) -> Image.Image:
    return load_image(picture, pixel_limit=pixel_limit)


class PictureFrames:
    """Pictures in order, at a rate.

    Parameters
    ----------
    load : decodes one, called with (picture, pixel limit, function to call while it waits).

    Raises
    ------
    VideoError
        When there are no pictures.
    """

    sampled, missing_s, facts = True, 0.0, AS_STORED

    def __init__(
        self, name: str, pictures: Sequence[ImageSource], rate: float, limits: VideoLimits, load: Load = _load_here
    ) -> None:
        if not pictures:
            raise VideoError(f"{name} has no frames; expected a list of at least one picture.")
        self.name, self.rate, self._limits, self._load_picture = name, rate, limits, load
        self._pictures = [_held(picture) for picture in pictures]
        self.times: Sequence[float] = [i / rate for i in range(len(pictures))]
        check_seconds(name, len(pictures) / rate, limits)
        self._digests: dict[int, bytes] = {}
        self.size = self._read(0)[0].size

    def identity(self, index: int) -> bytes:
        """Fingerprint of the picture: of its file, if it is one."""
        if index not in self._digests:
            data = self._data(index)
            self._digests[index] = _pixel_digest(self._load(index)) if data is None else _file_digest(data)
        return self._digests[index]

    def open(self) -> PictureFrames:
        """Start decoding; nothing is held open."""
        return self

    def read(self, index: int, watch: Watch) -> Image.Image:
        """Load one picture."""
        watch(0.0)
        picture, digest = self._read(index, lambda: watch(0.0))
        if digest != self._digests.setdefault(index, digest):
            raise VideoError(f"Frame {index} of {self.name} changed while it was read; ask again.")
        if picture.size != self.size:
            raise VideoError(
                f"Frame {index} of {self.name} has {picture.width} x {picture.height} pixels and the first one has "
                f"{self.size[0]} x {self.size[1]}; scale all frames to one size, or send them as pictures."
            )
        return picture

    def _data(self, index: int) -> bytes | None:
        """Bytes of a picture's file; None for pictures that are already decoded, or drawn."""
        picture = self._pictures[index]
        return picture.read_bytes() if isinstance(picture, Path) else picture if isinstance(picture, bytes) else None

    def _load(self, index: int, data: bytes | None = None, check: Callable[[], None] = lambda: None) -> Image.Image:
        picture = self._pictures[index] if data is None else data
        return self._load_picture(picture, self._limits.most_pixels, check)

    def _read(self, index: int, check: Callable[[], None] = lambda: None) -> tuple[Image.Image, bytes]:
        """A picture and its fingerprint.

        A file's fingerprint is that of its bytes. A Pillow picture has more than its samples (a palette, an
        orientation, a profile), and only the resulting pixels show whether two look the same.
        """
        data = self._data(index)
        picture = self._load(index, data, check)  # from the same bytes that are fingerprinted
        return picture, _pixel_digest(picture) if data is None else _file_digest(data)

    def close(self) -> None:
        """Nothing is open."""


def _held(source: ImageSource) -> Image.Image | Page | bytes | Path:
    """A picture, or its file; what can be read only once (an open file) is read now."""
    return source if isinstance(source, Image.Image | Page) else encoded(source)


def _file_digest(data: bytes) -> bytes:
    return hashlib.blake2b(b"file" + data, digest_size=16).digest()


def _pixel_digest(picture: Image.Image) -> bytes:
    return hashlib.blake2b(repr(picture.size).encode() + picture.tobytes(), digest_size=16).digest()


def _guard(limits: VideoLimits) -> int:
    """Limit for Pillow, high enough that our own checks refuse a file first, with a better message."""
    return max(PIXEL_LIMIT, limits.most_pixels)


class AnimationFrames:
    """An animation that Pillow reads.

    Raises
    ------
    VideoError
        When it is damaged or larger than allowed.
    """

    sampled, missing_s, facts = False, 0.0, AS_STORED

    def __init__(self, content: Content, limits: VideoLimits, watch: Watch) -> None:
        self.name, self._content, self._limits = content.name, content, limits
        durations: list[float] = []
        digest = hashlib.blake2b(f"pillow {PIL.__version__} ".encode(), digest_size=16)
        with content.open() as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        self.digest = digest.digest()
        with content.open() as file, explained(self.name, _guard(limits)), Image.open(file) as picture:
            check_pixels(self.name, *picture.size, limits)
            total = getattr(picture, "n_frames", 1)
            if total > MAX_ANIMATION_FRAMES:
                raise VideoError(
                    f"{self.name} has {total} frames, at most {MAX_ANIMATION_FRAMES} are read from an animation; "
                    "save it as a video (MP4, WebM)."
                )
            for frame in ImageSequence.Iterator(picture):
                frame.load()  # WebP gives durations only then
                durations.append(frame.info.get("duration", 0) / 1000 or UNTIMED_FRAME_S)
                watch(len(durations) / total)
            self.size = to_rgb(picture, self.name, _guard(limits)).size
        self.times: Sequence[float] = list(accumulate(durations[:-1], initial=0.0))
        check_seconds(self.name, sum(durations), limits)
        self.rate = len(durations) / sum(durations)

    def identity(self, index: int) -> bytes:
        """Fingerprint of the file, with the position in it."""
        return file_identity(self.digest, index)

    def open(self) -> AnimationCursor:
        """Start decoding."""
        return AnimationCursor(self._content, self._limits)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class AnimationCursor:
    """Steps through an animation; Pillow composes each frame from the one before it."""

    def __init__(self, content: Content, limits: VideoLimits) -> None:
        self._name, self._limits = content.name, limits
        self._file = content.open()
        self._picture: Image.Image | None = None

    def read(self, index: int, watch: Watch) -> Image.Image:
        """Go to a frame; earlier ones are reached from the start."""
        with explained(self._name, _guard(self._limits)):
            if self._picture is None:
                self._picture = Image.open(self._file)
            here = self._picture.tell()
            for i in range(here if index >= here else 0, index + 1):
                watch(0.0)
                self._picture.seek(i)
            return to_rgb(self._picture, self._name, _guard(self._limits))

    def close(self) -> None:
        """Close the file."""
        if self._picture is not None:
            self._picture.close()
        self._file.close()
