"""What the web page shows of a document or a video before it is asked about: small pages, or the frames to be seen.

Enters: one part of a message, as OpenAI's clients write it. Leaves: JSON with small pictures as `data:` URIs. Foreign
bytes are read by a decoder's process, under the limits that hold for questions; no model is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import BaseModel

from edge_runtime.errors import MessageError
from edge_runtime.inputs.clips import choose
from edge_runtime.inputs.documents import DocumentOptions
from edge_runtime.inputs.image import load_image
from edge_runtime.inputs.messages import DocumentPart, ImagePart, VideoPart, parse_messages
from edge_runtime.inputs.pages import Page
from edge_runtime.inputs.storyboard import draw_storyboard
from edge_runtime.inputs.video.frame_choice import VideoLimits
from edge_runtime.inputs.workers.opener import WorkerOpener
from edge_runtime.inputs.workers.pool import ClientsDecoders
from edge_runtime.server.content_parts import content_parts
from edge_runtime.server.media import checked_messages
from edge_runtime.server.middleware.shares import asking
from edge_runtime.server.routing import JSONRoute
from edge_runtime.server.settings import Settings
from edge_runtime.server.state import State

router = APIRouter(include_in_schema=False, route_class=JSONRoute)

THUMBNAIL = (180, 220)
"""Pixels of a page, at most."""
PIXELS = 4 * THUMBNAIL[0] * THUMBNAIL[1]
"""A PDF page is drawn with as many, and made smaller, which is smoother than drawing it small."""


class PreviewRequest(BaseModel):
    """Body of `POST /page/preview`."""

    part: dict[str, Any]
    """A `file` or a `video_url`."""


@router.post("/page/preview")
async def preview(body: PreviewRequest, state: State) -> dict[str, Any]:
    """Show the pages of a document, or the frames of a video that the model would see."""
    message = {"role": "user", "content": content_parts([body.part], "part")}
    (checked,) = parse_messages(checked_messages([message], state.settings))
    (part,) = checked.parts
    decoders = ClientsDecoders(state.inference.decoders, asking())

    def look(check: Callable[[], None]) -> dict[str, Any]:
        with WorkerOpener(decoders, check) as opener:
            if isinstance(part, VideoPart):
                return _video(part, opener, state.settings, check)
            if isinstance(part, ImagePart):
                return _document(part, opener, state.settings, check)
        raise MessageError("The part is a text; expected a document or a video.")

    return await state.inference.read(look)


def _document(
    part: ImagePart | DocumentPart, opener: WorkerOpener, settings: Settings, check: Callable[[], None]
) -> dict[str, Any]:
    options = DocumentOptions(page_limit=settings.max_pages, file_limit_bytes=settings.max_video_bytes)
    _, sources = opener.part(part, options, PIXELS)
    pages = []
    for number, source in enumerate(sources, 1):
        check()
        limit = settings.max_pixels
        picture = source.render(limit) if isinstance(source, Page) else load_image(source, pixel_limit=limit)
        picture.thumbnail(THUMBNAIL)
        pages.append({"number": number, "picture": _as_uri(picture)})
    return {"kind": "document", "pages": pages}


def _video(part: VideoPart, opener: WorkerOpener, settings: Settings, check: Callable[[], None]) -> dict[str, Any]:
    limits = VideoLimits(most_bytes=settings.max_video_bytes, most_pixels=settings.max_pixels)
    chosen = choose(part, limits, lambda share: check(), opener.video)
    drawing = draw_storyboard(chosen, lambda share: check())
    return {
        "kind": "video",
        "frames": len(chosen.choice.indices),
        "groups": len(chosen.groups),
        "storyboard": _as_uri(drawing),
    }


def _as_uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.convert("RGB").save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
