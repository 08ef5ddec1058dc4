"""Video files, read by PyAV (the extra `[video]`): first an index of all frames, then single frames.

The index is made from packets, without decoding: the number of frames, the time of each, and which are keyframes. So
the i-th frame is found by seeking to the last keyframe before it, and frames between two wanted ones are decoded only
if no keyframe lies between them. Packets are fingerprinted in the same pass, so that the file is read once.

Frames are counted like decord counts them in the official recipe: all of the stream, in display order.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from edge_runtime.errors import BackendUnavailable, VideoError
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_pictures import Look, look_of, picture_of, shown_size
from edge_runtime.inputs.video.frame_source import Watch, file_identity
from edge_runtime.inputs.video.source import Content, check_pixels, check_seconds

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

logger = logging.getLogger("edge_runtime")

# Formats that are a single file: a playlist would make libav open whatever it names.
FORMATS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "flv", "asf", "ogg"),
    *("h264", "hevc", "av1", "obu", "ivf", "mjpeg", "nut", "mxf", "gif", "yuv4mpegpipe", "rm", "dv", "vc1"),
    *("jpeg_pipe", "mpjpeg", "smjpeg"),  # pictures as cameras send them over HTTP, saved to a file
)
MAX_THREADS = 4  # each holds one more frame
LATE = 2  # frames that a file without times may lack at its end
LACKING = 0.01  # share of the length in its header that a file may lack
RATE_TOLERANCE = 0.01  # between the rate in the header and that of the frames' times

# Decoders that read the alpha channel of WebM, which libav's own decoders ignore.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


def _library(name: str) -> Any:
    try:
        import av
    except ImportError:
        raise BackendUnavailable(
            f"Reading {name} needs PyAV: pip install 'edge-runtime[video]'. Folders of frames, animated GIF and WebP "
            "are read without it."
        ) from None
    return av


def _refuse_nested(url: str, flags: int, options: dict[str, str]) -> None:
    raise OSError(f"{url[:80]!r} is named inside the video; nothing but the video itself is opened")


@contextmanager
def _opened(content: Content, limits: VideoLimits) -> Iterator[tuple[InputContainer, VideoStream, BinaryIO]]:
    """Open a file and find its video stream.

    Raises
    ------
    VideoError
        When it is not a video, or has only sound.
    """
    av, name = _library(content.name), content.name
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with content.open() as file:
        try:
            container = av.open(file, options=options, io_open=_refuse_nested, metadata_errors="replace")
        except (av.error.FFmpegError, ValueError) as error:
            raise VideoError(
                f"{name} cannot be opened as a video ({_reason(error)}): it is damaged, cut short or in an unknown "
                "format; get it again, or convert it to MP4."
            ) from None
        with container:
            cover = av.stream.Disposition.attached_pic
            streams = [stream for stream in container.streams.video if not stream.disposition & cover]
            if not streams:
                raise VideoError(f"{name} has no pictures (only sound?); expected a video.")
            stream = max(streams, key=lambda s: (s.codec_context.width if s.codec_context else 0, -s.index))
            if stream.codec_context is None:
                raise VideoError(f"{name} uses an unknown codec; convert it to H.264.")
            # Sizes may grow after the header; decoded sizes are rounded up, hence twice the limit.
            stream.codec_context.options = {"max_pixels": str(2 * limits.most_pixels)}
            stream.thread_type = "AUTO"
            stream.codec_context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)
            yield container, stream, file


def _alpha_decoder(stream: VideoStream) -> VideoCodecContext | None:
    """A decoder for the alpha channel of WebM, if a stream has one and PyAV has that decoder."""
    if stream.metadata.get("alpha_mode") != "1" or stream.codec_context.name not in ALPHA_DECODERS:
        return None
    av = _library("the video")
    try:
        decoder = av.CodecContext.create(ALPHA_DECODERS[stream.codec_context.name], "r")
    except (av.error.FFmpegError, ValueError):  # another build of libav: its own decoder shows it without alpha
        return None
    decoder.extradata = stream.codec_context.extradata
    decoder.options = stream.codec_context.options
    found: VideoCodecContext = decoder
    return found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class VideoFile:
    """An indexed video file.

    Parameters
    ----------
    watch : called with the share of the file that was read.

    Raises
    ------
    VideoError
        When it cannot be decoded, or is larger than allowed.
    """

    sampled = False

    def __init__(self, content: Content, limits: VideoLimits, watch: Watch) -> None:
        self.name, self._content, self._limits = content.name, content, limits
        self._pts: array[int] | None = None
        """Times of all frames in the stream's time base, ascending; None if the file has none."""
        self._keyframes: list[tuple[int, int]] = []
        """(presentation time, decoding time) of the keyframes, ascending."""
        self._frame_size: tuple[int, int] | None = None
        with _opened(content, limits) as (container, stream, file):
            check_pixels(self.name, stream.codec_context.width, stream.codec_context.height, limits)
            digest = self._scan(container, stream, file, watch)
        cursor = self.open()
        try:
            first = cursor.read(0, lambda share: watch(1.0))
            digest.update(repr(cursor.look).encode())
            assert cursor.look is not None
            self.facts: Mapping[str, Any] = {
                "tone_mapped": cursor.look.tone_mapped,
                "pixel_aspect": cursor.look.pixel_aspect,
            }
            self._frame_size = cursor.frame_size
        finally:
            cursor.close()
        self.size = first.size
        self.digest: bytes = digest.digest()

    def _scan(self, container: InputContainer, stream: VideoStream, file: BinaryIO, watch: Watch) -> Any:
        """Read all packets; returns the fingerprint so far."""
        av, context = _library(self.name), stream.codec_context
        digest = hashlib.blake2b(f"av {av.__version__} {context.name} ".encode(), digest_size=16)
        digest.update(context.extradata or b"")
        shown, n_packets, n_frames, is_timed = array("q"), 0, 0, True
        try:
            for packet in container.demux(stream):
                watch(min(1.0, file.tell() / self._content.n_bytes))
                if packet.size == 0:
                    continue
                n_packets += 1
                if packet.is_discard or packet.is_corrupt:
                    continue
                digest.update(packet)
                time = packet.pts
                is_timed = is_timed and time is not None
                if time is not None and packet.is_keyframe:
                    self._keyframes.append((time, time if packet.dts is None else packet.dts))
                if is_timed and not self._keyframes:
                    continue  # recorded from the middle: nothing before the first keyframe can be decoded
                n_frames += 1
                if time is not None:
                    shown.append(time)
        except av.error.FFmpegError as error:
            logger.debug("%s: reading packets ended with %s", self.name, error)
        if not n_frames:
            raise VideoError(f"{self.name} has no frames; it is damaged or has no length: get it again.")
        ordered = array("q", sorted(shown))
        if is_timed and all(a < b for a, b in pairwise(ordered)):
            self._pts = ordered
            self._keyframes.sort()
            digest.update(ordered.tobytes())
        self._set_times(stream, n_frames)
        self.missing_s = self._missing(container, stream, n_packets)
        check_seconds(self.name, max(n_frames / self.rate, self.times[-1]), self._limits)
        return digest

    def _missing(self, container: InputContainer, stream: VideoStream, n_packets: int) -> float:
        """Seconds that the header promises and the file lacks.

        The length of the whole file counts only if there are no other streams, which may be longer.
        """
        if stream.frames:
            lacking = (stream.frames - n_packets) / self.rate
        else:
            stated = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))  # Matroska's
            if stated is not None:
                promised = 3600 * int(stated[1]) + 60 * int(stated[2]) + float(stated[3])
            else:
                promised = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
            lacking = promised - self.times[-1] - 1 / self.rate
        longest = max((b - a for a, b in pairwise(self.times)), default=0.0)  # how long the last frame may be shown
        return lacking if lacking > max(LATE / self.rate, LACKING * n_packets / self.rate, longest) else 0.0

    def _set_times(self, stream: VideoStream, n_frames: int) -> None:
        """Times of the frames and their rate: the one in the header, unless the times say otherwise.

        A file with a variable rate may state that of its start.
        """
        stated = stream.average_rate or stream.guessed_rate
        self.rate = float(stated) if stated else 0.0
        self.times: Sequence[float]
        if self._pts is not None:
            base, first = float(stream.time_base or 1), self._pts[0]
            self.times = array("d", ((pts - first) * base for pts in self._pts))
            if n_frames > 1:
                measured = (n_frames - 1) / self.times[-1]
                seen = (
                    abs(measured - self.rate) * self.times[-1]
                )  # in frames: rounded times change it by less than one
                if not self.rate or seen > max(1.0, RATE_TOLERANCE * n_frames):
                    self.rate = measured
        if not self.rate:
            if n_frames > 1:
                raise VideoError(f"{self.name} has neither a frame rate nor times; convert it to MP4.")
            self.rate = 1.0
        if self._pts is None:
            self.times = array("d", (i / self.rate for i in range(n_frames)))

    def identity(self, index: int) -> bytes:
        """Fingerprint of the stream and of how it is shown, with the position in it."""
        return file_identity(self.digest, index)

    def open(self) -> FileCursor:
        """Start decoding."""
        return FileCursor(self._content, self._pts, self._keyframes, len(self.times), self._limits, self._frame_size)

    def state(self) -> dict[str, Any]:
        """What `cursor_from` takes."""
        begins = array("q", (time for begin in self._keyframes for time in begin))
        return {
            "pts": None if self._pts is None else _packed(self._pts),
            "begins": _packed(begins),
            "n_frames": len(self.times),
            "frame_size": self._frame_size,
        }


def cursor_from(content: Content, limits: VideoLimits, state: Mapping[str, Any]) -> FileCursor:
    """The cursor of a `VideoFile` that returned this state in another process."""
    begins = _unpacked(state["begins"])
    return FileCursor(
        content,
        None if state["pts"] is None else _unpacked(state["pts"]),
        [*zip(begins[::2], begins[1::2], strict=True)],
        state["n_frames"],
        limits,
        (*state["frame_size"],) if state["frame_size"] is not None else None,
    )


def _packed(numbers: array[int]) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


def _unpacked(text: str) -> array[int]:
    numbers = array("q")
    numbers.frombytes(base64.b64decode(text))
    return numbers


class FileCursor:
    """Decodes frames of a file."""

    def __init__(
        self,
        content: Content,
        pts: array[int] | None,
        begins: list[tuple[int, int]],
        n_frames: int,
        limits: VideoLimits,
        frame_size: tuple[int, int] | None,
    ) -> None:
        self.frame_size = frame_size
        """(width, height) that all frames are scaled to, before they are turned: that of the first one."""
        self._name, self._pts, self._keyframes, self._n, self._limits = content.name, pts, begins, n_frames, limits
        self._content, self._opening = content, _opened(content, limits)
        self._container, self._stream, _ = self._opening.__enter__()
        self._can_jump = True
        self._landed: int | None = None
        """Time of the first packet after the last seek."""
        self._at = -1
        """Position, or if frames have times the time, of the frame that was decoded last."""
        self._frames: Iterator[av.VideoFrame] | None = None
        self._last: tuple[int, Image.Image] | None = None
        self._watch: Watch = lambda share: None
        self.look: Look | None = None
        """How the last read frame is shown."""

    def read(self, index: int, watch: Watch) -> Image.Image:
        """Decode one frame, from the nearest keyframe before it."""
        if self._last is None or self._last[0] != index:
            self._watch = watch
            frame = self._by_count(index) if self._pts is None else self._by_time(self._pts[index])
            if frame is None:
                raise VideoError(
                    f"Frame {index} of {self._n} of {self._name} cannot be decoded; the file is damaged there: get "
                    "it again, or leave that part out (start, end)."
                )
            try:
                self._last = index, self._picture(frame)
            except (_library(self._name).error.FFmpegError, ValueError) as error:
                raise VideoError(
                    f"{self._name} has frames in the format {frame.format.name}, which cannot be converted to RGB "
                    f"({_reason(error)}); convert it to H.264."
                ) from None
        return self._last[1]

    def _by_count(self, index: int) -> av.VideoFrame | None:
        if self._frames is None or index < self._at:
            self._seek(None)
        frame = None
        assert self._frames is not None
        for frame in self._frames:
            self._at += 1
            if self._at >= index:
                return frame if self._at == index else None
        # Packed B-frames leave a file with more packets than frames: the last frame stands in for those.
        return frame if index - self._at <= LATE else None

    def _by_time(self, wanted: int) -> av.VideoFrame | None:
        place = bisect_right(self._keyframes, wanted, key=lambda begin: begin[0]) - 1
        begin = self._keyframes[max(place, 0)]
        if self._frames is None or wanted <= self._at or (self._can_jump and begin[0] > self._at):
            # If a seek lands too late (the file's index is wrong), the next one goes further back. If it lands right
            # and the frame does not come, the frame is damaged, and going further back does not help.
            for earlier in (begin, self._keyframes[max(place - 1, 0)], None):
                self._seek(earlier)
                frame = self._next_from(wanted)
                if frame is not None or (self._landed is not None and self._landed <= begin[0]):
                    return frame
            return None
        return self._next_from(wanted)

    def _next_from(self, wanted: int) -> av.VideoFrame | None:
        assert self._frames is not None
        for frame in self._frames:
            if frame.pts is None:
                continue
            self._at = frame.pts
            if frame.pts >= wanted:
                return frame if frame.pts == wanted else None
        return None

    def _seek(self, place: tuple[int, int] | None) -> None:
        """Seek to a keyframe; or to the start, by opening the file again: some files cannot seek at all."""
        if place is not None and self._can_jump:
            try:
                self._container.seek(place[1], stream=self._stream, backward=True)
            except _library(self._name).error.FFmpegError:
                self._can_jump = False
        if self._frames is not None and (place is None or not self._can_jump):
            self._opening.__exit__(None, None, None)
            self._opening = _opened(self._content, self._limits)
            self._container, self._stream, _ = self._opening.__enter__()
        self._at, self._frames = -1 if self._pts is None else -(1 << 62), self._decode()

    def _decode(self) -> Iterator[av.VideoFrame]:
        """Frames from here on, except damaged ones and those that depend on them, up to the next keyframe."""
        av = _library(self._name)
        packets = self._container.demux(self._stream)
        decoder = _alpha_decoder(self._stream)
        is_sound, self._landed = True, None
        while True:
            self._watch(0.0)
            try:
                packet = next(packets)
                self._landed = packet.pts if self._landed is None else self._landed
                for frame in packet.decode() if decoder is None else decoder.decode(packet):
                    is_sound = not frame.is_corrupt and (is_sound or bool(frame.key_frame))
                    if is_sound:
                        yield frame
                    elif self._pts is None:
                        self._at += 1  # frames found by counting include it
            except (StopIteration, av.error.EOFError):
                return
            except av.error.FFmpegError as error:
                logger.debug("%s: a packet was left out: %s", self._name, error)
                is_sound = False

    def _picture(self, frame: av.VideoFrame) -> Image.Image:
        """A frame in RGB, at the size of the first one, shown as the file says."""
        check_pixels(self._name, frame.width, frame.height, self._limits)
        self.look = look_of(frame, self._stream.sample_aspect_ratio)
        self.frame_size = self.frame_size or shown_size(
            self._name, frame.width, frame.height, self.look, self._limits
        )
        return picture_of(frame, self.look, self.frame_size, self._name)

    def close(self) -> None:
        """Close the file."""
        self._frames = self._last = None
        self._opening.__exit__(None, None, None)
