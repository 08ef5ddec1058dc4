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
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from PIL import Image

from edge_runtime.cli import main
from edge_runtime.server import fetching
from edge_runtime.server.connections import GuardedConnection
from edge_runtime.server.settings import Settings
from runtime.gguf_maker import mini_decoder, mini_mmproj
from server.conftest import SIGN, Served

KEY = "a-key-that-nobody-guesses"
QUESTION = {"role": "user", "content": "What does it say?", "images": [base64.b64encode(SIGN.read_bytes()).decode()]}
Serve = Callable[..., Served]


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that end only when they are stopped, or at their `num_predict`."""
    monkeypatch.setattr("edge_runtime.sampling.Sampler.sample", lambda self, context, row: 40)
    monkeypatch.setattr("edge_runtime.streaming.RepetitionDetector.feed", lambda self, token_id: False)


def chat(**fields: Any) -> dict[str, Any]:
    """Body of a question to Ollama's API."""
    return {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "stream": False, **fields}


def post(served: Served, path: str, body: Any, **headers: str) -> httpx.Response:
    """One request with a connection of its own."""
    return httpx.post(served.url + path, json=body, headers=headers, timeout=60, trust_env=False)


def wait_until(what: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def is_idle(served: Served) -> bool:
    """Whether nothing of any request is left."""
    loaded = [slot.model.activity for slot in served.state.registry.loaded() if slot.model is not None]
    return served.state.inference.n_open == 0 and not any(found.waiting or found.running for found in loaded)


@contextlib.contextmanager
def connected(served: Served, sent: bytes = b"") -> Iterator[socket.socket]:
    """A bare connection."""
    with socket.create_connection((served.server.settings.host, int(served.url.rpartition(":")[2])), 10) as found:
        found.sendall(sent)
        yield found


def rest_of(connection: socket.socket) -> bytes:
    """Everything until the other side closes, however it does that."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def takes_connections(served: Served) -> bool:
    """Whether new clients are let in."""
    try:
        with connected(served):
            return True
    except ConnectionError:
        return False


def is_open(connection: socket.socket, sent: bytes) -> bool:
    """Whether a connection still takes something; waits a moment for what comes back."""
    connection.settimeout(0.05)
    try:
        connection.sendall(sent)
        return connection.recv(100) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def head(path: str, *lines: str, method: str = "POST", host: str = "127.0.0.1") -> bytes:
    """Beginning of a request."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


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
    assert ("WARNING: Everybody who reaches" in found.stderr) is warns


# --- keys ----------------------------------------------------------------------------------------------------------


def test_without_the_key_nothing_but_the_page_and_health(serve: Serve):
    served = serve(api_key=KEY)
    paths = {path for path, methods in served.app.openapi()["paths"].items() for _ in methods}
    assert {"/api/chat", "/metrics", "/tokenize"} <= paths
    for path in [*paths, "/openapi.json", "/nothing"]:
        for method in ("GET", "POST", "DELETE"):
            reply = httpx.request(method, served.url + path.replace("{", "").replace("}", ""), trust_env=False)
            is_open = path == "/health" and method == "GET"
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


# --- addresses and paths -------------------------------------------------------------------------------------------

ADDRESSES = [
    "http://127.0.0.1:{port}/health",
    "http://localhost:{port}/health",
    "http://2130706433:{port}/health",
    "http://[::ffff:127.0.0.1]:{port}/health",
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/a.png",
    "file:///etc/passwd",
    "ftp://127.0.0.1/a",
]


def asked(served: Served, address: str) -> httpx.Response:
    """A question about a picture at an address, in the runtime's own form: no protocol's parser is in the way."""
    part = {"type": "image_url", "image_url": {"url": address}}
    return post(served, "/api/chat", chat(messages=[{"role": "user", "content": [part]}]))


@pytest.mark.parametrize("allow", [(), ("*",), ("example.org",)])
def test_addresses_in_requests(serve: Serve, monkeypatch, allow):
    """Nothing is reached: neither without permission, nor with it where the address leads inside."""
    served = serve(allow_url=allow)
    connections: list[Any] = []

    async def connect(self: Any, *where: Any, **more: Any) -> Any:
        connections.append(where)
        raise AssertionError("a connection was made")

    monkeypatch.setattr(fetching.httpcore2.AnyIOBackend, "connect_tcp", connect)
    monkeypatch.setattr(
        "asyncio.base_events.BaseEventLoop.getaddrinfo", _only_numbers, raising=True
    )  # no name server is asked by a test
    port = served.url.rpartition(":")[2]
    for address in ADDRESSES:
        reply = asked(served, address.format(port=port))
        assert reply.status_code in (400, 403), (address, reply.text)
    assert connections == []
    assert is_idle(served)


async def _only_numbers(self: Any, host: str, port: int, **more: Any) -> Any:
    if host == "localhost" or not any(c.isalpha() for c in host.replace("f", "")):
        return await self.run_in_executor(None, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return [(0, 0, 0, "", ("10.0.0.1", port))]


def test_a_name_that_rebinds(serve: Serve, monkeypatch):
    """The first look-up is public, the second would be the server itself: only what was checked is connected to."""
    served = serve(allow_url=("rebind.example",))
    answers = iter(["93.184.215.14", "127.0.0.1", "127.0.0.1"])
    connections: list[str] = []

    async def resolve(self: Any, host: str, port: int, **more: Any) -> Any:
        return [(0, 0, 0, "", (next(answers), port))]

    async def connect(self: Any, host: str, port: int, *more: Any, **named: Any) -> Any:
        connections.append(host)
        raise fetching.httpcore2.ConnectError("nobody there")

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", resolve)
    monkeypatch.setattr(fetching.httpcore2.AnyIOBackend, "connect_tcp", connect)
    assert asked(served, "http://rebind.example/a.png").status_code == 400
    assert connections == ["93.184.215.14"]


def test_a_picture_from_an_allowed_host(serve: Serve, monkeypatch):
    """The whole way, with a picture served here under a name that counts as public."""
    server_of_pictures = socket.create_server(("127.0.0.1", 0))
    port = server_of_pictures.getsockname()[1]

    def answer() -> None:
        with server_of_pictures.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + SIGN.read_bytes())

    thread = threading.Thread(target=answer)
    thread.start()
    served = serve(allow_url=(f"pictures.example:{port}",))

    async def resolve(self: Any, host: str, port: int, **more: Any) -> Any:
        return [(0, 0, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", resolve)
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    reply = asked(served, f"http://pictures.example:{port}/sign.png")
    thread.join(10)
    server_of_pictures.close()
    assert reply.status_code == 200, reply.text
    assert reply.json()["message"]["content"]


class Opened:
    """Paths that Python opens while it is asked to watch; an audit hook stays for ever, so there is one."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event in ("open", "os.listdir", "os.scandir", "os.remove", "os.rename"):
            self.paths.append(str(arguments[0]))


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened()


def test_no_path_of_a_client_is_opened(server, opened: Opened, tmp_path):
    """A sound picture, and a sound folder for a model, lie at the end of each path; neither may be touched."""
    secret = tmp_path / "secretfolder" / "secret00"
    secret.parent.mkdir()
    secret.write_bytes(SIGN.read_bytes())
    packed = "/" * (-len(str(secret)) % 4) + str(secret)  # a path that is base64 as well
    ways = [str(secret), f"file://{secret}", packed, os.path.relpath(secret), f"data:{secret}", f"~/../..{secret}"]
    digests = [f"sha256:..{secret}", "sha256:" + "0" * 63 + "/", f"..%2f..{secret}".replace("/", "%2f")]
    opened.paths = []
    try:
        for way in ways:
            for part in (
                {"type": "image", "image": way},
                {"type": "image_url", "image_url": {"url": way}},
                {"type": "video", "video": way},
                {"type": "file", "file": {"file_data": way}},
                {"image": way},
            ):
                reply = post(server, "/api/chat", chat(messages=[{"role": "user", "content": [part]}]))
                assert 400 <= reply.status_code < 500, (part, reply.text)
            images = chat(messages=[{"role": "user", "content": "?", "images": [way]}])
            assert 400 <= post(server, "/api/chat", images).status_code < 500
            for path, body in (
                ("/api/chat", chat(model=way)),
                ("/api/generate", {"model": way, "prompt": "a"}),
                ("/api/show", {"model": way}),
                ("/api/pull", {"model": way, "stream": False}),
                ("/api/copy", {"source": way, "destination": "a"}),
                ("/api/copy", {"source": "demo", "destination": way}),
                ("/api/create", {"model": "made", "from": way, "stream": False}),
                ("/api/create", {"model": "made", "modelfile": f"FROM {way}", "stream": False}),
                ("/api/create", {"model": "made", "files": {way: "sha256:" + "0" * 64}, "stream": False}),
                ("/api/create", {"model": way, "from": "demo", "stream": False}),
                ("/api/tokenize", {"model": way}),
                ("/tokenize", {"model": way, "content": "a"}),
                ("/v1/chat/completions", chat(model=way)),
            ):
                reply = post(server, path, body)
                assert 400 <= reply.status_code < 500, (path, body, reply.text)
            reply = httpx.request("DELETE", server.url + "/api/delete", json={"model": way}, trust_env=False)
            assert 400 <= reply.status_code < 500
        for digest in digests:
            assert 300 <= post(server, f"/api/blobs/{digest}", {}).status_code < 500
            assert 300 <= httpx.head(f"{server.url}/api/blobs/{digest}", trust_env=False).status_code < 500
        for path in ("/static/../../../etc/passwd", "/static/..%2f..%2fetc%2fpasswd", "/static/%2e%2e/cli.py"):
            with connected(server, head(path, "Connection: close", method="GET")) as connection:
                assert rest_of(connection).split(b" ")[1] in (b"400", b"404")
    finally:
        touched, opened.paths = opened.paths, None
    assert secret.exists()
    assert not [path for path in touched if "secretfolder" in path or path.endswith("passwd")]


# --- origins and names ---------------------------------------------------------------------------------------------


def test_dns_rebinding(server):
    """A page of evil.example, whose name server now says 127.0.0.1: its requests carry its name."""
    port = server.url.rpartition(":")[2]
    body = json.dumps(chat())
    for host in (f"evil.example:{port}", "evil.example", "127.0.0.1.evil.example", f"localhost.evil.example:{port}"):
        reply = httpx.post(server.url + "/api/chat", content=body, headers={"Host": host}, trust_env=False)
        assert reply.status_code == 403
        assert httpx.get(server.url + "/api/tags", headers={"Host": host}, trust_env=False).status_code == 403
    with connected(server, b"GET /api/tags HTTP/1.0\r\n\r\n") as connection:
        assert b" 403 " in rest_of(connection).splitlines()[0]
    with connected(server, b"GET /api/tags HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n") as connection:
        assert b" 400 " in rest_of(connection).splitlines()[0]


def test_a_foreign_page_can_neither_read_nor_do_anything(server):
    """A form or a fetch without a preflight reaches any server; what matters is that nothing comes of it."""
    before = server.state.metrics.text()
    for origin in ("http://evil.example", "https://evil.example", "null", "http://127.0.0.1:1"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
            headers = {"Origin": origin, "Content-Type": kind}
            for path in ("/api/chat", "/api/pull", "/api/create", "/v1/chat/completions"):
                reply = httpx.post(
                    server.url + path, content=json.dumps(chat()), headers=headers, timeout=60, trust_env=False
                )
                assert reply.status_code == 403
                assert "access-control-allow-origin" not in reply.headers
        preflight = {"Origin": origin, "Access-Control-Request-Method": "DELETE"}
        reply = httpx.options(server.url + "/api/delete", headers=preflight, trust_env=False)
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
    count = [line for line in server.state.metrics.text().splitlines() if line.startswith(b"edge_runtime_requests_t")]
    assert all(line in before for line in count)


# --- errors --------------------------------------------------------------------------------------------------------


def test_errors_tell_no_paths(server, own_store, monkeypatch):
    tells = [str(own_store), str(Path.home()) + "/", "site-packages", "Traceback", str(Path(__file__).parents[2])]
    bodies: list[str] = []
    for path, content in (
        ("/nothing", b"{}"),
        ("/api/chat", b"{"),
        ("/api/chat", b"[]"),
        ("/api/chat", b"\xff\xfe"),
        ("/api/chat", json.dumps(chat(model="../../a")).encode()),
        ("/api/chat", json.dumps(chat(messages=[{"role": "x"}])).encode()),
        ("/api/chat", json.dumps(chat(messages=[{"role": "user", "images": ["AAAAAAAAAAAAAAAA"]}])).encode()),
        ("/api/show", b'{"model": "nothing"}'),
        ("/tokenize", b'{"content": 5}'),
        ("/detokenize", b'{"tokens": [99999999]}'),
    ):
        reply = httpx.post(server.url + path, content=content, timeout=60, trust_env=False)
        assert 400 <= reply.status_code < 500, (path, content, reply.text)
        bodies.append(reply.text)

    def broken(self: Any, *arguments: Any, **options: Any) -> Any:
        raise OSError(2, "No such file or directory", str(own_store / "models" / "secret.gguf"))

    monkeypatch.setattr("edge_runtime.model.Model.submit", broken)
    reply = post(server, "/api/chat", chat())
    assert reply.status_code == 500
    bodies.append(reply.text)
    for text in bodies:
        assert not [tell for tell in tells if tell in text], text


def test_an_error_inside_a_stream_tells_no_paths(server, own_store, monkeypatch):
    path = str(own_store / "models" / "secret.gguf")

    def broken(self: Any, context: Any, row: int) -> int:
        raise RuntimeError(f"cannot read {path}")

    monkeypatch.setattr("edge_runtime.sampling.Sampler.sample", broken)
    reply = post(server, "/api/chat", chat(stream=True))
    assert "error" in json.loads(reply.text.splitlines()[-1])
    assert path not in reply.text
    assert "secret" not in reply.text
    wait_until(lambda: is_idle(server))


# --- slow and vanishing clients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"POST /api/chat HTTP/1.1\r\nHost: 127.0.0.1\r\nX-a: "])
def test_a_head_that_never_ends(serve: Serve, sent):
    """Silence, and a byte now and then: both are over when the time for a head is."""
    served = serve(header_timeout_s=0.4)
    with connected(served, sent) as connection:
        started = time.monotonic()
        wait_until(lambda: not is_open(connection, b"a" if sent else b""))
        assert 0.3 < time.monotonic() - started < 3


def test_the_second_head_has_to_end_too(serve: Serve):
    served = serve(header_timeout_s=0.4)
    with connected(served, head("/health", method="GET")) as connection:
        assert b"200 OK" in connection.recv(1000)
        connection.sendall(b"GET /health HT")
        started = time.monotonic()
        rest_of(connection)
        assert 0.3 < time.monotonic() - started < 3


def test_a_body_that_never_ends(serve: Serve):
    served = serve(body_timeout_s=0.3)
    with connected(served, head("/api/chat", "Content-Length: 1000") + b"{") as connection:
        started = time.monotonic()
        assert b"408 " in rest_of(connection)
        assert time.monotonic() - started < 5
    wait_until(lambda: is_idle(served))


def test_a_reader_who_does_not_read(serve: Serve, endless, monkeypatch):
    """What is ready for him is bounded, and so is the time it is kept."""
    begin = GuardedConnection.connection_made

    def begin_small(self: GuardedConnection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )  # or it takes megabytes
        begin(self, transport)

    monkeypatch.setattr(GuardedConnection, "connection_made", begin_small)
    served = serve(body_timeout_s=1.0, max_tokens=100_000)
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    body = json.dumps(chat(stream=True, options={"num_predict": 100_000})).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        connection.sendall(head("/api/chat", f"Content-Length: {len(body)}") + body)
        wait_until(lambda: not is_idle(served))
        wait_until(lambda: is_idle(served), 60)
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_vanish(serve: Serve, endless, stream):
    served = serve()
    post(served, "/api/chat", chat(options={"num_predict": 1}))
    body = json.dumps(chat(stream=stream, messages=[QUESTION], options={"num_predict": 100_000})).encode()
    threads = []
    for _ in range(2):
        for _ in range(16):
            with connected(served, head("/api/chat", f"Content-Length: {len(body)}") + body) as connection:
                if stream:
                    connection.recv(100)
                wait_until(lambda: not is_idle(served))
        wait_until(lambda: is_idle(served))
        threads.append(threading.active_count())
    assert threads[1] <= threads[0] + 8  # pools may still grow; one for each request would be 16
    assert post(served, "/api/chat", chat(options={"num_predict": 3})).status_code == 200


def test_connections_are_counted(serve: Serve, monkeypatch):
    monkeypatch.setattr("edge_runtime.server.connections.MOST_CONNECTIONS", 5)
    served = serve()
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(connected(served))
        wait_until(lambda: len(served.server.server_state.connections) == 5)
        with connected(served, head("/health", method="GET")) as connection:
            assert rest_of(connection) == b""
    wait_until(lambda: not served.server.server_state.connections)
    assert httpx.get(served.url + "/health", trust_env=False).status_code == 200


# --- the end -------------------------------------------------------------------------------------------------------


def test_running_answers_finish_and_new_ones_are_refused(serve: Serve, endless):
    served = serve(grace_s=30.0)
    asking = chat(stream=True, options={"num_predict": 300})
    with httpx.stream("POST", served.url + "/api/chat", json=asking, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not takes_connections(served))
        last = json.loads([*lines][-1])
    assert (last["done"], last["done_reason"]) == (True, "length")
    assert last.get("eval_count", 300) == 300


def test_after_the_grace_time_answers_are_ended_with_a_word(serve: Serve, endless):
    served = serve(grace_s=0.3, max_tokens=100_000)
    asking = chat(stream=True, options={"num_predict": 100_000})
    with httpx.stream("POST", served.url + "/api/chat", json=asking, timeout=60, trust_env=False) as reply:
        lines = reply.iter_lines()
        next(lines)
        served.server.handle_exit(signal.SIGTERM, None)
        assert "error" in json.loads([*lines][-1])


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
