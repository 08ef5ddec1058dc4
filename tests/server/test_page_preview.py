"""What the page asks of the server besides the APIs: memory of models, and previews of documents and videos."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from edge_runtime.server.settings import Settings
from server.conftest import Served, running
from support.document_maker import COLOURS, coloured_pdf, pages_tiff, words_pdf
from support.video_maker import make_video


def uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def document(data: bytes, **options: Any) -> dict[str, Any]:
    return {
        "part": {"type": "file", "file": {"file_data": uri(data, "application/pdf"), "filename": "x.pdf"}, **options}
    }


def video(data: bytes) -> dict[str, Any]:
    return {"part": {"type": "video_url", "video_url": {"url": uri(data, "video/mp4")}}}


def picture_in(text: str) -> Image.Image:
    assert text.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(text.split(",")[1])))


def test_pages_are_small_pictures_in_order(client: httpx.Client):
    found = client.post("/page/preview", json=document(coloured_pdf(COLOURS))).json()
    assert found["kind"] == "document"
    assert [page["number"] for page in found["pages"]] == [1, 2, 3]
    for page, colour in zip(found["pages"], COLOURS, strict=True):
        picture = picture_in(page["picture"])
        assert max(picture.size) <= 220
        seen = picture.getpixel((picture.width // 2, picture.height // 2))
        assert all(abs(a - b) < 20 for a, b in zip(seen, colour, strict=True))


def test_a_tiff_file_and_a_picture(client: httpx.Client):
    tiff = pages_tiff([Image.new("RGB", (400, 300), colour) for colour in COLOURS])
    assert len(client.post("/page/preview", json=document(tiff)).json()["pages"]) == 3


def test_frames_of_a_video(client: httpx.Client):
    found = client.post("/page/preview", json=video(make_video(50, 25))).json()
    assert (found["kind"], found["frames"] > 0, found["groups"] > 0) == ("video", True, True)
    assert picture_in(found["storyboard"]).width > 100


@pytest.fixture(scope="module")
def strict(own_store: object) -> Iterator[Served]:
    """A server that reads two pages, small ones, and wants a key."""
    limits = Settings(
        port=0, models=("demo",), max_pages=2, max_video_bytes=100_000, max_image_bytes=100_000, api_key="k" * 20
    )
    with running(limits) as served:
        yield served


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (document(words_pdf(["A", "B", "C"])), 400, "at most 2"),
        (document(words_pdf(["A"])[:300]), 400, ""),
        (document(words_pdf(["A"], encrypt="secret")), 400, "password"),
        (document(b"%PDF-1.7\n" + bytes(200_000)), 413, "100000"),
        (video(b"no film"), 400, ""),
        ({"part": {"type": "text", "text": "x"}}, 400, "expected a document or a video"),
        ({"part": {"type": "file", "file": {"file_data": "/etc/passwd"}}}, 400, "expected a data: URI"),
        ({"part": {"type": "video_url", "video_url": {"url": "http://127.0.0.1/x.mp4"}}}, 403, "not fetched"),
        ({"part": "x"}, 400, ""),
        ({}, 400, ""),
    ],
    ids=["pages", "cut", "password", "bytes", "no video", "text", "path", "address", "no part", "nothing"],
)
def test_what_cannot_be_shown_is_told(strict: Served, body: dict[str, Any], status: int, told: str):
    key = {"Authorization": "Bearer " + "k" * 20}
    with httpx.Client(base_url=strict.url, timeout=60, trust_env=False, headers=key) as client:
        reply = client.post("/page/preview", json=body)
        assert reply.status_code == status, reply.text
        assert told in reply.text
        assert len(client.post("/page/preview", json=document(words_pdf(["A"]))).json()["pages"]) == 1


def test_the_page_s_routes_need_the_key(strict: Served):
    with httpx.Client(base_url=strict.url, timeout=60, trust_env=False) as client:
        assert client.post("/page/preview", json=document(words_pdf(["A"]))).status_code == 401
        assert client.get("/page/models").status_code == 401


def test_memory_of_models(client: httpx.Client):
    found = client.get("/page/models").json()
    assert found["memory"]["free"] > 0
    assert found["memory"]["total"] > 1e8
    (demo,) = [model for model in found["models"] if model["name"] == "demo:latest"]
    assert demo["kept"] is True
    assert 1e7 < demo["needs"] < 1e9
    assert found["offered"][0]["name"] == "minicpm-v-4.5"
