"""What a request must not reach (other machines, files, pages of other origins), and what errors must not tell."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.server import fetch as fetching
from server.attacking import Serve, chat, connected, head, is_idle, post, rest_of, wait_until
from server.conftest import SIGN, Served

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
    for host in (b"[127.0.0.1].evil.example", b"127.0.0.1%evil.example", b"", b"127.0.0.1:80.evil.example"):
        with connected(
            server, b"GET /api/tags HTTP/1.1\r\nConnection: close\r\nHost: " + host + b"\r\n\r\n"
        ) as connection:
            assert b" 403 " in rest_of(connection).splitlines()[0]
    with connected(server, b"GET /api/tags HTTP/1.0\r\n\r\n") as connection:  # no browser sends that
        assert b" 200 " in rest_of(connection).splitlines()[0]
    foreign = b"GET /api/tags HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n"
    for request in (foreign, b"GET /api/tags HTTP/1.0\r\nHost: evil.example\r\n\r\n"):
        with connected(server, request) as connection:
            assert b" 403 " in rest_of(connection).splitlines()[0]
    with connected(server, b"GET /api/tags HTTP/1.1\r\n\r\n") as connection:
        assert b" 400 " in rest_of(connection).splitlines()[0]
    with connected(server, b"GET /api/tags HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n") as connection:
        assert b" 400 " in rest_of(connection).splitlines()[0]


def test_a_foreign_page_can_neither_read_nor_do_anything(server):
    """A form or a fetch without a preflight reaches any server; what matters is that nothing comes of it."""
    before = server.state.metrics.text()
    for origin in ("http://evil.example", "https://evil.example", "null", "http://127.0.0.1:1.evil.example"):
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

    monkeypatch.setattr("edge_runtime.generation.sampling.Sampler.sample", broken)
    reply = post(server, "/api/chat", chat(stream=True))
    assert "error" in json.loads(reply.text.splitlines()[-1])
    assert path not in reply.text
    assert "secret" not in reply.text
    wait_until(lambda: is_idle(server))
