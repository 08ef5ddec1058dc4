"""Each limit by itself, in front of small applications: what it counts, what it lets through, what it says."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from edge_runtime.server.middleware import bodies as limits
from edge_runtime.server.middleware import gate, stack, time_limit
from edge_runtime.server.middleware.gate import host_name, is_own_name
from edge_runtime.server.middleware.stack import warnings_for
from edge_runtime.server.settings import Settings
from server.attacking import connected, head, rest_of
from server.conftest import Served

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def app_with(settings: Settings, **more: Any) -> Starlette:
    """An application that says how much it got, behind all limits."""

    async def size(request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    async def careless(request: Request) -> Response:
        try:
            return PlainTextResponse(str(len(await request.body())))
        except Exception:  # noqa: BLE001 - as frameworks do
            return JSONResponse({"detail": "There was an error parsing the body"}, 400)

    routes = [Route("/api/size", size, methods=["GET", "POST"]), Route("/api/careless", careless, methods=["POST"])]
    routes += [Route(path, call, methods=["GET", "POST"]) for path, call in more.items()]
    return Starlette(routes=routes, middleware=stack.middleware(settings))


def ask(
    settings: Settings, method: str, path: str, *, app: Starlette | None = None, **request: Any
) -> httpx.Response:
    """One request to such an application."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app or app_with(settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:11434") as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


# --- bodies --------------------------------------------------------------------------------------------------------


async def chunks(n: int, size: int = 1000) -> AsyncIterator[bytes]:
    for _ in range(n):
        yield bytes(size)


@pytest.mark.parametrize("path", ["/api/size", "/api/careless"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("n", "status"), [(1, 200), (10, 200), (11, 413)])
def test_bodies_up_to_the_limit(path, chunked, n, status):
    reply = ask(Settings(max_body_bytes=10_000), "POST", path, content=chunks(n) if chunked else bytes(1000 * n))
    assert reply.status_code == status
    if status == 200:
        assert reply.text == str(1000 * n)
    else:
        assert "more than 10000 bytes" in reply.json()["error"]
        assert reply.headers["connection"] == "close"


def test_bodies_of_all_requests_together(monkeypatch):
    monkeypatch.setattr(limits, "BODIES_TOGETHER", 2)
    held, left = asyncio.Event(), []

    async def hold(request: Request) -> Response:
        await request.body()
        left.append(request)
        await held.wait()
        return PlainTextResponse("held")

    app = app_with(Settings(max_body_bytes=1000), **{"/api/hold": hold})

    async def go() -> tuple[list[int], httpx.Response, int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            waiting = [asyncio.create_task(client.post("/api/hold", content=bytes(900))) for _ in range(2)]
            while len(left) < 2:
                await asyncio.sleep(0)
            refused = await client.post("/api/size", content=bytes(900))
            held.set()
            found = [(await task).status_code for task in waiting]
            return found, refused, (await client.post("/api/size", content=bytes(900))).status_code

    found, refused, after = asyncio.run(go())
    assert (found, refused.status_code, after) == ([200, 200], 429, 200)
    assert int(refused.headers["retry-after"]) > 0


def test_a_body_that_stops_and_one_that_drips():
    """Against silence, and against a byte now and then."""

    async def drip(pause_s: float, n: int) -> AsyncIterator[bytes]:
        for _ in range(n):
            await asyncio.sleep(pause_s)
            yield b"x"

    settings = Settings(body_timeout_s=0.2)
    assert ask(settings, "POST", "/api/size", content=drip(0.02, 5)).status_code == 200
    for pause_s, n in ((0.5, 1), (0.05, 10)):
        reply = ask(settings, "POST", "/api/size", content=drip(pause_s, n))
        assert reply.status_code == 408
        assert "did not arrive in time" in reply.json()["error"]


def test_work_that_takes_too_long(monkeypatch):
    monkeypatch.setattr(time_limit, "SPARE_S", 0.0)
    ended = []

    async def slow(request: Request) -> Response:
        await request.body()
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(request.url.path)
        return PlainTextResponse("never")

    settings = Settings(request_timeout_s=0.1)
    app = app_with(settings, **{"/v1/slow": slow, "/api/pull": slow})
    reply = ask(settings, "POST", "/v1/slow", app=app, content=b"{}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    assert ended == ["/v1/slow"]

    async def go() -> None:
        async with asyncio.timeout(0.3):
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                await client.post("/api/pull", content=b"{}")

    with pytest.raises(TimeoutError):  # ours: a download may take hours
        asyncio.run(go())


class Jumping(selectors.DefaultSelector):
    """Waits for nothing: its clock jumps to the next thing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(timeout if timeout is None else 0)


@pytest.mark.parametrize(("work_s", "status"), [(104.0, 200), (106.0, 504)])
@pytest.mark.parametrize("n_pieces", [1, 10])
def test_the_time_of_work_counts_from_the_end_of_the_body(work_s, status, n_pieces):
    """A body that takes longer than the whole limit takes nothing from it, and adds nothing to it."""
    selector = Jumping()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now

    async def slow_body() -> AsyncIterator[bytes]:
        for _ in range(n_pieces):
            await asyncio.sleep(50)
            yield bytes(1000)

    async def work(request: Request) -> Response:
        got = len(await request.body())
        await asyncio.sleep(work_s)
        return PlainTextResponse(str(got))

    app = app_with(Settings(request_timeout_s=100.0, body_timeout_s=60.0), **{"/v1/work": work})
    assert time_limit.SPARE_S == 5.0

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            return await client.post("/v1/work", content=slow_body())

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        reply = runner.run(go())
    assert reply.status_code == status
    assert status != 200 or reply.text == str(1000 * n_pieces)


# --- who may ask ---------------------------------------------------------------------------------------------------

KEY = "a-key-of-some-length"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer  {KEY} "}, 200),
        ({"x-api-key": KEY}, 200),
        ({"x-api-key": KEY, "Authorization": "Basic YTpi"}, 200),
        ({}, 401),
        ({"Authorization": KEY}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": f"Bearer {KEY[:-1]}"}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": b"Bearer \xff\xfe"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_keys(headers, status):
    reply = ask(Settings(api_key=KEY), "POST", "/api/size", headers=headers)
    assert reply.status_code == status
    if status == 401:
        assert reply.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer" in reply.json()["error"]


def test_keys_are_compared_in_one_time(monkeypatch):
    """Both sides are digests, whose length tells nothing, compared by what was made for it."""
    seen = []

    def compare(a: bytes, b: bytes) -> bool:
        seen.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    for guess in ("a", "a" * 1000, KEY):
        ask(Settings(api_key=KEY), "GET", "/api/size", headers={"x-api-key": guess})
    assert seen == [(32, 32)] * 3


def test_the_page_and_health_need_no_key_and_nothing_else_does():
    async def open_to_all(request: Request) -> Response:
        return PlainTextResponse("open")

    settings = Settings(api_key=KEY)
    paths = ("/", "/health", "/sw.js", "/static/app.js")
    app = app_with(settings, **dict.fromkeys(paths, open_to_all))
    for path in paths:
        assert ask(settings, "GET", path, app=app).status_code == 200
        assert ask(settings, "POST", path, app=app).status_code == 401
    for path in ("/api/size", "/static", "/health/", "//api/size", "/metrics", "/openapi.json", "/nothing"):
        assert ask(settings, "GET", path, app=app).status_code == 401


@pytest.mark.parametrize(
    ("host", "beyond", "own"),
    [
        ("127.0.0.1:11434", True, True),
        ("[::1]:11434", True, True),
        ("192.168.1.7", True, True),  # an address cannot be rebound
        ("LOCALHOST:11434", True, True),
        ("app.localhost", True, True),
        ("host.docker.internal:11434", True, True),
        ("127.0.0.1.", True, True),
        ("evil.example", False, False),
        ("evil.example:11434", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("127.0.0.1@evil.example", False, False),
        ("[evil.example]", False, False),
        ("[localhost]", False, False),
        ("[127.0.0.1].evil.example", False, False),
        ("[::1].evil.example:80", False, False),
        ("[::1]evil.example", False, False),
        ("[::1", False, False),
        ("[fe80::1%eth0]:11434", True, True),
        ("127.0.0.1%evil.example", False, False),
        ("127.0.0.1%25.evil.example:80", False, False),
        ("localhost%evil.example", False, False),
        ("127.0.0.1:80:evil.example", False, False),
        ("127.0.0.1:evil.example", False, False),
        ("127.0.0.1:80@evil.example", False, False),
        ("127.0.0.1,evil.example", False, False),
        ("127.0.0.1 evil.example", False, False),
        ("", False, False),
        (":11434", False, False),
        ("ollama:11434", True, False),  # a container's name, where others can reach this one
        ("desk.local", True, False),
        ("2130706433.evil.example", False, False),
    ],
)
def test_names_of_the_server(host, beyond, own):
    assert is_own_name(host_name(host), Settings()) is own
    assert is_own_name(host_name(host), Settings(host="0.0.0.0")) is beyond


def test_further_names_of_the_server():
    settings = Settings(allowed_hosts=("AI.example.org", "*.lan.example"))
    for name, own in (("ai.example.org", True), ("a.lan.example", True), ("lan.example", False), ("x.org", False)):
        assert is_own_name(name, settings) is own
    assert is_own_name("anything.example", Settings(allowed_hosts=("*",)))
    assert is_own_name("desk.example", Settings(host="desk.example"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://127.0.0.1:11434"}, 200),  # the page itself
        ({"Origin": "https://127.0.0.1:11434"}, 200),  # the same behind a proxy that speaks TLS
        ({"Origin": "http://127.0.0.1:3000"}, 200),  # a page of this machine, as Ollama allows it; see test_origins
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:11434.evil.example"}, 403),
        ({"Origin": "file://127.0.0.1:11434"}, 200),
        ({"Origin": "ftp://127.0.0.1:11434"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # somebody follows a link to the page
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
def test_origins(headers, status):
    assert ask(Settings(), "GET", "/api/size", headers=headers).status_code == status


@pytest.mark.parametrize("mode", ["navigate", "no-cors", "cors"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_foreign_page_changes_nothing_here(method, mode):
    """A form of another site is a navigation, too; some senders leave `Origin` out."""
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode}
    assert ask(Settings(), method, "/api/size", headers=headers).status_code == 403
    assert ask(Settings(cors_origins=("*",)), method, "/api/size", headers=headers).status_code != 403


def test_origins_that_the_owner_allows():
    settings = Settings(cors_origins=("http://app.example",), api_key=KEY)
    preflight = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    preflight |= {"Access-Control-Request-Headers": "authorization, content-type"}
    reply = ask(settings, "OPTIONS", "/api/size", headers=preflight)
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "http://app.example")
    reply = ask(settings, "GET", "/api/size", headers={"Origin": "http://app.example", "x-api-key": KEY})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, "http://app.example")
    for foreign in ("http://evil.example", "http://app.example.evil.example", "null"):
        reply = ask(settings, "GET", "/api/size", headers={"Origin": foreign, "x-api-key": KEY})
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers
    assert ask(Settings(cors_origins=("*",)), "GET", "/api/size", headers={"Origin": "null"}).status_code == 200


def test_browsers_are_told_to_be_careful():
    async def own(request: Request) -> Response:
        return PlainTextResponse("page", headers={"Content-Security-Policy": "default-src 'self'"})

    headers = ask(Settings(), "GET", "/api/size").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    app = app_with(Settings(), **{"/own": own})
    assert ask(Settings(), "GET", "/own", app=app).headers["content-security-policy"] == "default-src 'self'"
    assert ask(Settings(api_key=KEY), "GET", "/api/size").headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({}, None),
        ({"host": "::1"}, None),
        ({"host": "0.0.0.0"}, "--api-key"),
        ({"host": "192.168.1.7"}, "--api-key"),
        ({"host": "example.org"}, "--api-key"),
        ({"host": "0.0.0.0", "api_key": KEY}, None),
        ({"host": "0.0.0.0", "api_key": "short"}, "guessed"),
        ({"cors_origins": ("*",)}, "Every web page"),
        ({"allow_url": ("*",)}, "any public address"),
    ],
)
def test_what_owners_are_warned_of(settings, word):
    found = warnings_for(Settings(**settings))
    assert len(found) == (word is not None)
    assert word is None or word in found[0]


def test_a_body_of_two_lengths_is_the_last_one_of_its_connection(server: Served):
    """Content-Length and Transfer-Encoding: a proxy before us may have seen another end, and a request behind it."""
    chunked = b"2\r\n{}\r\n0\r\n\r\n"
    second = head("/health", method="GET")
    both = head("/api/show", "Content-Length: 12", "Transfer-Encoding: chunked", "Content-Type: application/json")
    with connected(server, both + chunked + second) as connection:
        connection.settimeout(10)
        reply = rest_of(connection)  # ends: the connection is closed
    assert reply.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in reply.lower()
    one = head("/api/show", "Transfer-Encoding: chunked", "Content-Type: application/json")
    last = head("/health", "Connection: close", method="GET")
    with connected(server, one + chunked + last) as connection:
        connection.settimeout(10)
        assert rest_of(connection).count(b"HTTP/1.1 ") == 2


def test_bodies_together_stay_within_a_part_of_the_free_memory(monkeypatch):
    free = 800 << 20
    monkeypatch.setattr(limits, "available_bytes", lambda: free)
    held = limits.Held(1 << 40, counts_memory=True)
    assert held.max_bytes == 1 << 40  # nothing is held that would matter
    held.n_bytes = 50 << 20
    assert held.max_bytes == (free + (50 << 20)) // limits.MEMORY_SHARE
    free = 1 << 20  # looked at again only after a while
    assert held.max_bytes > 100 << 20
    held = limits.Held(1 << 40, n_bytes=6 << 20, counts_memory=True)
    assert held.max_bytes == limits.FEW_BYTES
    assert limits.Held(1000, n_bytes=6 << 20).max_bytes == 1000
    reply = ask(Settings(), "POST", "/api/size", content=chunks(70, 100_000))
    assert (reply.status_code, "together hold more than 4 MB" in reply.json()["error"]) == (429, True)
    assert ask(Settings(max_bodies_bytes=10**7), "POST", "/api/size", content=chunks(70, 100_000)).text == "7000000"
