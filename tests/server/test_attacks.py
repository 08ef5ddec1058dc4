"""Attacks on a running server, at least one for each line of "Limits and safety"; each must fail and leave nothing.

What every attack is held to: the status that says so, no path of this machine in the reply, and afterwards no request
open, no sequence of the engine in use, and the next honest question answered.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime.cli.program import main
from edge_runtime.server.settings import Settings
from server.attacking import (
    QUESTION,
    Serve,
    chat,
    connected,
    head,
    is_idle,
    post,
    rest_of,
    wait_until,
)
from server.conftest import SIGN
from support.gguf_maker import mini_decoder, mini_mmproj

KEY = "a-key-that-nobody-guesses"


# --- loopback by default, a loud warning beyond --------------------------------------------------------------------


def test_the_server_listens_on_this_machine_alone(server):
    assert Settings().host == "127.0.0.1"
    (listener,) = [found for listening in server.server.servers for found in listening.sockets]
    assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ([], False),
        (["--host", "::1"], False),
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", KEY], False),
    ],
)
def test_beyond_this_machine_a_key_is_wanted(own_store, monkeypatch, arguments, warns):
    async def nothing(*arguments: Any) -> None:
        return None

    monkeypatch.setattr("edge_runtime.server.running.serve", nothing)
    found = CliRunner().invoke(main, ["serve", "--port", "0", *arguments])
    assert found.exit_code == 0, found.output
    assert ("WARNING: Anybody who can reach" in found.stderr) is warns


# --- keys ----------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_but_the_page_and_health(serve: Serve):
    served = serve(api_key=KEY)
    paths = {path for path, methods in served.app.openapi()["paths"].items() for _ in methods}
    assert {"/api/chat", "/metrics", "/tokenize"} <= paths
    for path in [*paths, "/openapi.json", "/nothing"]:
        for method in ("GET", "POST", "DELETE"):
            reply = httpx.request(method, served.url + path.replace("{", "").replace("}", ""), trust_env=False)
            is_open = path in ("/health", "/v1/health") and method == "GET"
            assert reply.status_code == (200 if is_open else 401), (method, path)
    assert post(served, "/api/chat", chat(), Authorization=f"Bearer {KEY[:-1]}").status_code == 401
    assert post(served, "/api/chat", chat(), Authorization=f"Bearer {KEY}").status_code == 200


def test_a_large_body_without_a_key_is_not_kept(serve: Serve):
    """And its sender still sees why, though it sends on."""
    served = serve(api_key=KEY)
    with connected(served, head("/api/chat", "Content-Length: 200000000")) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(bytes(100_000))
        assert b"401 Unauthorized" in rest_of(connection)


# --- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False])
def test_bodies_beyond_the_limit(serve: Serve, announced):
    served = serve(max_body_bytes=100_000)
    if announced:
        sent = head("/api/chat", "Content-Length: 1000000000000") + b"{"
    else:
        sent = head("/api/chat", "Transfer-Encoding: chunked") + b"8000\r\n" + bytes(0x8000) + b"\r\n"
    with connected(served, sent) as connection:
        with contextlib.suppress(ConnectionError):
            for _ in range(0 if announced else 100):
                connection.sendall(b"8000\r\n" + bytes(0x8000) + b"\r\n")
        assert b"413 " in rest_of(connection)


def bomb(width: int, height: int) -> str:
    """A PNG of a few kilobytes with this many black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def test_a_decompression_bomb(server, client):
    image = bomb(30_000, 30_000)
    assert len(image) < 200_000
    started = time.monotonic()
    reply = client.post("/api/chat", json=chat(messages=[{"role": "user", "content": "?", "images": [image]}]))
    assert reply.status_code == 400
    assert "900000000 pixels, at most 64000000" in reply.json()["error"]
    assert time.monotonic() - started < 5
    assert is_idle(server)


def test_pixel_and_picture_limits_of_the_owner(serve: Serve):
    sign = SIGN.read_bytes()
    served = serve(max_pixels=10_000, max_images=2, max_image_bytes=len(sign) + 2)
    data = io.BytesIO()
    Image.effect_noise((99, 99), 50).resize((400, 400)).save(data, "PNG")
    small = base64.b64encode(sign).decode()
    for images, word in (
        ([small], "at most 10000"),
        ([small] * 3, "more than 2 pictures"),
        ([base64.b64encode(data.getvalue()).decode()], "bytes, at most"),
    ):
        reply = post(served, "/api/chat", chat(messages=[{"role": "user", "content": "?", "images": images}]))
        assert reply.status_code in (400, 413)
        assert word in reply.json()["error"]


def test_blobs_have_a_limit_of_their_own(serve: Serve):
    served = serve(max_blob_bytes=1000, max_body_bytes=100)
    digest = "sha256:" + "0" * 64
    assert httpx.post(f"{served.url}/api/blobs/{digest}", content=bytes(1001), trust_env=False).status_code == 413
    assert httpx.post(f"{served.url}/api/blobs/{digest}", content=bytes(999), trust_env=False).status_code == 400
    assert httpx.head(f"{served.url}/api/blobs/{digest}", trust_env=False).status_code == 404


# --- queue and time ------------------------------------------------------------------------------------------------


def test_one_too_many(serve: Serve, endless):
    served = serve(max_queue=1)
    with httpx.stream("POST", served.url + "/api/chat", json=chat(stream=True), timeout=60, trust_env=False) as first:
        lines = first.iter_lines()
        next(lines)
        refused = post(served, "/api/chat", chat())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert post(served, "/v1/chat/completions", chat()).status_code == 429
    wait_until(lambda: is_idle(served))
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


def test_answers_that_take_too_long(serve: Serve, endless):
    served = serve(request_timeout_s=0.5)
    forever = {"options": {"num_predict": 100_000}}
    post(served, "/api/chat", chat(options={"num_predict": 1}))  # loads the model
    assert post(served, "/api/chat", chat(**forever)).status_code == 504
    lines = post(served, "/api/chat", chat(**forever, stream=True)).text.splitlines()
    assert len(lines) > 1
    assert "longer than" in json.loads(lines[-1])["error"]
    wait_until(lambda: is_idle(served))


# --- files that clients upload -------------------------------------------------------------------------------------


def spoilt(change: Callable[[Any], None]) -> bytes:
    """A decoder that was sound before this change."""
    file = mini_decoder()
    change(file)
    return file.build()


def beyond_the_end(file: Any) -> None:
    """CVE-2026-7482: a tensor that lies behind the file's end, where other memory is."""
    next(iter(file.tensors.values())).offset = 1 << 40


def wraps_around(file: Any) -> None:
    tensor = next(iter(file.tensors.values()))
    tensor.dims = (1 << 62, 4)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
        b"not a model" * 100,
        spoilt(beyond_the_end),
        spoilt(wraps_around),
        mini_decoder().build()[:-1000],
    ],
    ids=["empty", "magic", "counts", "text", "offset", "overflow", "cut"],
)
def test_uploaded_models_that_lie(server, data):
    """Refused when something is made of them, whatever is wrong; nothing of them is ever loaded."""
    files = {}
    for name, content in (("a.gguf", data), ("mmproj-a.gguf", mini_mmproj().build())):
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        reply = httpx.post(f"{server.url}/api/blobs/{digest}", content=content, trust_env=False)
        assert reply.status_code in (200, 201)
        files[name] = digest
    reply = post(server, "/api/create", {"model": "liar", "files": files, "stream": False})
    assert 400 <= reply.status_code < 600, reply.text
    assert "error" in reply.json()
    assert post(server, "/api/chat", chat(model="liar")).status_code == 404
    assert "liar" not in httpx.get(server.url + "/api/tags", trust_env=False).text


# --- and after all that --------------------------------------------------------------------------------------------


def test_the_server_still_reads_the_sign(server, client):
    assert is_idle(server)
    reply = client.post("/api/chat", json=chat(messages=[QUESTION]))
    assert reply.json()["message"]["content"] == "CAFE"
