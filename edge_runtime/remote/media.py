"""Pictures, documents and videos of messages → parts of a request, as a server can read them.

A server of ours gets files as they are: it reads all that this process reads, by the same rules. Others get JPEG and
PNG files as they are if every decoder makes the same of them (no orientation, transparency, CMYK or 16 bits, which
decoders treat differently); everything else is decoded here and sent as PNG, without a loss. Pages of documents and
frames of videos are pictures then. llama-server decodes with stb_image, which knows neither WebP nor orientations.

`max_slices`: other servers have no such field, so a picture is made so small that the official rules cut it into no
more cells.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from edge_runtime.errors import MessageError
from edge_runtime.inputs.clips import Chosen, Clip, choose
from edge_runtime.inputs.documents import check_file_bytes, read, with_pages
from edge_runtime.inputs.image import (
    EXIF_ORIENTATION,
    HEAD_BYTES,
    ImageSource,
    encoded,
    load_image,
    opened_picture,
    picture_size,
    read_head,
    to_rgb,
)
from edge_runtime.inputs.messages import DocumentPart, ImagePart, Message, VideoPart
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.picture_formats import is_pdf
from edge_runtime.inputs.tiff_directories import HEADS as TIFF_HEADS
from edge_runtime.inputs.video.frame_choice import VideoOptions, clock
from edge_runtime.inputs.video.source import Content
from edge_runtime.options import GenerationOptions, PreparationHooks
from edge_runtime.remote.dialects import Dialect
from edge_runtime.weights.config import SlicingConfig

OFFICIAL = SlicingConfig(448, 14, 9, use_image_id=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""How the official model cuts pictures; decides how large pages are drawn and frames are sent."""
_PLAIN = {"JPEG": "image/jpeg", "PNG": "image/png"}
Parts = list[dict[str, Any]]


@dataclass
class Seen:
    """What an answer reports about the pictures and videos of its conversation."""

    pictures: list[list[int]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    is_known: bool = True
    """Whether the sizes of all pictures are known; not those of files that only the server opens."""


class Media:
    """Translates the parts of one conversation.

    Parameters
    ----------
    options, hooks : of the request.
    """

    def __init__(self, dialect: Dialect, options: GenerationOptions, hooks: PreparationHooks) -> None:
        self._dialect, self._options, self._hooks = dialect, options, hooks
        self.seen = Seen()
        self._n_pictures = 0

    def expanded(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation with pages in place of documents, unless the server opens them itself.

        Raises
        ------
        ImageError, MessageError, BackendUnavailable
            As `documents.with_pages`.
        """
        if self._dialect.is_ours:
            return [*conversation]
        if self._hooks.decoders is not None:
            raise MessageError(
                f"decoders were given, but pictures for {self._dialect.title} are decoded in this process; "
                f"leave them "
                "out, or ask an edge-runtime server, which gets files as they are."
            )
        return with_pages(conversation, self._options, OFFICIAL, self._options.max_slices)

    def parts(self, part: str | ImagePart | VideoPart) -> Parts:
        """A part of a message as parts of a request.

        Raises
        ------
        ImageError, VideoError, MessageError, BackendUnavailable
            When it cannot be read.
        """
        self._hooks.on_check()
        if isinstance(part, str):
            return [text_part(part)]
        if isinstance(part, VideoPart):
            return self._video(part)
        if self._dialect.is_ours:
            return [self._file(part)]
        limit = part.max_slices if part.max_slices is not None else self._options.max_slices
        return [self._picture(part.source, limit)]

    def _picture(self, source: ImageSource, limit: int | None) -> dict[str, Any]:
        """A picture that every server decodes alike."""
        kind, data, size = plain_picture(source, self._options.pixel_limit, limit)
        self.seen.pictures.append([*size])
        self._n_pictures += 1
        self._hooks.on_image(self._n_pictures, self._n_pictures)
        return image_part(data_uri(kind, data))

    def _file(self, part: ImagePart) -> dict[str, Any]:
        """A picture or a document as it is, for a server of ours."""
        part, options = read(part, self._options), self._options
        source = part.source
        if isinstance(source, Image.Image | Page):
            return self._with_cells(self._picture(source, None), part)
        file = encoded(source)
        data = file if isinstance(file, bytes) else file.read_bytes()
        check_file_bytes(getattr(data, "name", None) or "The file", len(data), options.file_limit_bytes)
        head = data[:HEAD_BYTES] if isinstance(file, bytes) else read_head(file)
        pages = part.pages if isinstance(part, DocumentPart) and part.pages is not None else options.pages
        if is_pdf(head) or (isinstance(part, DocumentPart) and part.must_be_pdf):
            return self._document(part, data, pages)
        if head.startswith(TIFF_HEADS):
            if pages is not None:
                return self._document(part, data, pages)
            self.seen.is_known = False  # it may have several pages
        elif pages is not None and options.pages is not None:
            raise MessageError(
                "Pages were chosen, but there is a picture, which has none; --pages is for PDF and for TIFF files of "
                "several pages."
            )
        else:
            self.seen.pictures.append([*picture_size(source, pixel_limit=options.pixel_limit)])
        return self._with_cells(image_part(data_uri("application/octet-stream", data)), part)

    def _document(self, part: ImagePart, data: bytes, pages: Any) -> dict[str, Any]:
        self.seen.is_known = False
        options, own = self._options, part if isinstance(part, DocumentPart) else None
        found: dict[str, Any] = {
            "type": "file",
            "file": {"filename": "document", "file_data": data_uri("application/pdf", data)},
            "pages": pages,
            "dpi": own.dpi if own is not None and own.dpi is not None else options.dpi,
            "password": own.password if own is not None and own.password is not None else options.password,
        }
        return self._with_cells({name: value for name, value in found.items() if value is not None}, part)

    def _with_cells(self, found: dict[str, Any], part: ImagePart) -> dict[str, Any]:
        return found if part.max_slices is None else found | {"max_slices": part.max_slices}

    def _video(self, part: VideoPart) -> Parts:
        """A video: the file for a server of ours, otherwise the frames that the official code would choose."""
        source = part.source
        if self._dialect.is_ours and not isinstance(source, list | tuple) and not _is_folder(source):
            content = Content(source, self._options.video_limits)
            with content.open() as file:
                uri = data_uri("video/mp4", file.read())
            self.seen.is_known = False
            return [{"type": "video_url", "video_url": {"url": uri}, **_given(part.options)}]
        if part.options.packing is not None:
            raise MessageError(
                f"packing of a video is {part.options.packing}, but {self._dialect.title} is sent single "
                f"frames; leave "
                "it out, or ask an edge-runtime server with the video's file."
            )
        return self._frames(replace(part, options=replace(part.options, packing=1)))

    def _frames(self, part: VideoPart) -> Parts:
        chosen = choose(part, self._options.video_limits, self._hooks.on_look)
        self.seen.videos.append(Clip(chosen, part.options, OFFICIAL).facts())
        frames = [self._frame(frame, part.options) for frame in _decoded(chosen, self._hooks.on_check)]
        if self._dialect.name == "vllm" and not part.options.timestamps:
            # vLLM's form of a video whose frames were chosen: base64 of each, with commas between (its
            # multimodal/media/video.py); its decoder knows PNG from JPEG by the first bytes.
            joined = ",".join(base64.b64encode(frame).decode("ascii") for frame in frames)
            return [{"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{joined}"}}]
        found: Parts = []
        for frame, (time_s,) in zip(frames, chosen.times_s, strict=True):
            found += [text_part(f"[{clock(time_s)}]")] if part.options.timestamps else []
            found.append(image_part(data_uri("image/png", frame)))
        return found

    def _frame(self, picture: Image.Image, options: VideoOptions) -> bytes:
        self.seen.pictures.append([*picture.size])
        return as_png(within_cells(picture, options.max_slices))


def _is_folder(source: Any) -> bool:
    try:
        return isinstance(source, str | Path) and Path(source).is_dir()
    except (OSError, ValueError):  # a data: URI, or a name too long
        return False


def _given(options: VideoOptions) -> Mapping[str, Any]:
    """Options of a video that differ from the usual ones, which the server has, too."""
    usual = VideoOptions()
    return {name: value for name, value in vars(options).items() if value != getattr(usual, name)}


def _decoded(chosen: Chosen, check: Callable[[], None]) -> list[Image.Image]:
    cursor = chosen.source.open()

    def watch(share: float) -> None:
        check()

    try:
        return [cursor.read(index, watch) for index in chosen.choice.indices]
    finally:
        cursor.close()


def plain_picture(
    source: ImageSource, pixel_limit: int, max_slices: int | None
) -> tuple[str, bytes, tuple[int, int]]:
    """A picture as every server decodes it alike.

    Returns
    -------
    kind, data, size : media type, encoded bytes, and (width, height) of the upright picture.

    Raises
    ------
    ImageError, BackendUnavailable
        As `image.load_image`.
    """
    if isinstance(source, Image.Image | Page):
        picture = load_image(source, pixel_limit=pixel_limit)
        return "image/png", as_png(within_cells(picture, max_slices)), picture.size
    file = encoded(source)
    with opened_picture(file, pixel_limit) as (opened, name):
        kind = _PLAIN.get(opened.format or "")
        is_plain = (
            kind is not None
            and opened.mode in ("L", "RGB")
            and "transparency" not in opened.info
            and getattr(opened, "n_frames", 1) == 1
        )
        size = opened.size
        picture = to_rgb(opened, name, pixel_limit)
        is_plain = is_plain and opened.getexif().get(EXIF_ORIENTATION, 1) == 1 and size == picture.size
    small = within_cells(picture, max_slices)
    if kind is not None and is_plain and small is picture:
        return kind, file if isinstance(file, bytes) else file.read_bytes(), picture.size
    return "image/png", as_png(small), picture.size


def within_cells(picture: Image.Image, max_slices: int | None) -> Image.Image:
    """The picture, made so small that the official rules cut it into at most so many cells; itself if it is.

    They divide the number of pixels by a slice's, round up to N, and choose among grids of N - 1 to N + 1 cells; with
    one, they do not cut.
    """
    if max_slices is None:
        return picture
    most = max(1, max_slices - 1) * OFFICIAL.scale_resolution**2
    width, height = picture.size
    if width * height <= most:
        return picture
    scale = math.sqrt(most / (width * height))
    size = max(1, int(width * scale)), max(1, int(height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


def as_png(picture: Image.Image) -> bytes:
    """PNG, with little time spent on its size."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_uri(kind: str, data: bytes) -> str:
    """Bytes as a `data:` URI of a media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def image_part(url: str) -> dict[str, Any]:
    """A picture, as all servers take it."""
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """A text among pictures."""
    return {"type": "text", "text": text}
