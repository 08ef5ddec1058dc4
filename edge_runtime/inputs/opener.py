"""Where untrusted files are opened: in this process, or in workers (`workers.pool`); the pipeline does not know.

Enter: parts of messages. Leave: pictures, or pages that become pictures, and opened videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.inputs.documents import DocumentOptions, open_part
from edge_runtime.inputs.image import ImageSource, load_image
from edge_runtime.inputs.messages import ImagePart
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.slicing import Size, cut_whole
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.video.frame_source import FrameSource, Watch
from edge_runtime.inputs.video.open import open_video
from edge_runtime.inputs.video.source import VideoSource
from edge_runtime.weights.config import SlicingConfig


class Opener(Protocol):
    """Opens what messages contain; errors as in the functions that are named."""

    def part(self, part: ImagePart, options: DocumentOptions, pixels: int) -> tuple[bool, Sequence[ImageSource]]:
        """As `documents.open_part`."""

    def video(self, source: VideoSource, limits: VideoLimits, watch: Watch, rate: float | None) -> FrameSource:
        """As `video.open.open_video`."""


class InThisProcess:
    """Decodes in this process."""

    def part(self, part: ImagePart, options: DocumentOptions, pixels: int) -> tuple[bool, Sequence[ImageSource]]:
        """As `documents.open_part`."""
        return open_part(part, options, pixels)

    def video(self, source: VideoSource, limits: VideoLimits, watch: Watch, rate: float | None) -> FrameSource:
        """As `video.open.open_video`."""
        return open_video(source, limits, watch, rate=rate)


def cut_source(
    source: ImageSource, pixel_limit: int, config: SlicingConfig, max_slices: int | None
) -> tuple[Size, list[npt.NDArray[np.uint8]]]:
    """Size of a picture and pixels of its slices; errors as in `image.load_image` and `slicing.check_plan`."""
    if isinstance(source, Page):
        return source.cut(pixel_limit, config, max_slices)
    picture = load_image(source, pixel_limit=pixel_limit)
    return picture.size, cut_whole(picture, config, max_slices)
