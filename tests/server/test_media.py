"""What clients put into messages: data alone, of bounded size; addresses only where the owner allows them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import httpx2
import pytest

from edge_runtime import ImageError, MessageError
from edge_runtime.server import fetch as fetching
from edge_runtime.server.errors import NotAllowed, RequestError, TooLarge
from edge_runtime.server.fetch import Allowed, Fetcher, is_public
from edge_runtime.server.media import brought_in, checked_messages
from edge_runtime.server.settings import Settings
from server.test_limits import PIXEL

# --- pictures ------------------------------------------------------------------------------------------------------


def parts(*found: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*found, {"type": "text", "text": "/etc/passwd is text"}]}]


def test_data_stays_and_base64_becomes_data():
    image = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}
    plain = {"type": "image", "image": "iVBORw0KGgoAAAAN"}
    (message,) = checked_messages(parts(image, plain), Settings())
    assert message["content"][0] == image
    assert message["content"][1]["image"] == "data:application/octet-stream;base64,iVBORw0KGgoAAAAN"
    assert message["content"][2]["text"] == "/etc/passwd is text"
    assert checked_messages("a question", Settings()) == "a question"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "/etc/passwd"},
        {"type": "image", "image": "picture.png"},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": "FILE:///etc/passwd"},
        {"type": "video", "video": ["/etc/passwd"]},
        {"type": "pdf", "pdf": "/etc/passwd"},
        {"type": "file", "file": {"file_data": "scan.pdf", "filename": "scan.pdf"}},
        {"type": "something new", "deep": [{"down": "../../etc/passwd"}]},
        {"text": "harmless", "image": "/etc/passwd"},
        {"image": "C:\\Windows\\win.ini"},
        {"type": "image", "image": "\\\\server\\share\\a.png"},
    ],
)
def test_paths_are_refused(part):
    with pytest.raises(RequestError, match="opens no files"):
        checked_messages(parts(part), Settings())
    with pytest.raises(RequestError):
        checked_messages([{"role": "user", "content": part}], Settings())


def test_a_path_that_is_base64_is_not_a_path():
    """The characters of base64 are enough for many a path; what passes for base64 is never opened."""
    (message,) = checked_messages(parts({"type": "image", "image": "////////dev/zero"}), Settings())
    assert message["content"][0]["image"].startswith("data:")


def test_sizes_and_counts_of_pictures():
    image, video = (
        {"type": "image", "image": "data:," + "A" * 4000},
        {"type": "video", "video": "data:," + "A" * 4000},
    )
    settings = Settings(max_image_bytes=2000, max_video_bytes=4000, max_images=3)
    with pytest.raises(TooLarge, match="at most"):
        checked_messages(parts(image), settings)
    checked_messages(parts(video, video, video), settings)
    with pytest.raises(TooLarge, match="more than 3"):
        checked_messages([{"role": "user", "content": "", "images": [PIXEL] * 2}, *parts(video, video)], settings)


@pytest.mark.parametrize(("asked", "given"), [(None, 60), (30, 30), (10**9, 60), (True, True)])
def test_frames_of_a_video(asked, given):
    """What is no number is left for the runtime to refuse."""
    video = {"type": "video", "video": PIXEL, **({} if asked is None else {"max_frames": asked})}
    (message,) = checked_messages(parts(video), Settings(max_video_frames=60))
    assert message["content"][0]["max_frames"] == given


# --- addresses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("127.255.255.254", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),  # metadata of clouds
        ("100.64.0.1", False),  # carrier-grade NAT
        ("100.100.100.200", False),
        ("192.0.2.1", False),
        ("198.18.0.1", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b::5db8:d70e", True),  # how IPv6-only networks reach IPv4
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::1", False),
        ("2001:0:7f00:1::", False),  # Teredo
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("2606:2800:21f::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(ip_address(address)) is public


@pytest.mark.parametrize(
    ("allowed", "url", "covers"),
    [
        ("example.org", "https://example.org/a.png", True),
        ("example.org", "http://EXAMPLE.org./a.png", True),
        ("example.org", "https://example.org:8443/a.png", False),
        ("example.org", "http://example.org:443/a.png", False),
        ("example.org", "https://sub.example.org/", False),
        ("example.org", "https://example.org.evil.example/", False),
        ("example.org", "https://evilexample.org/", False),
        ("*.example.org", "https://sub.example.org/", True),
        ("*.example.org", "https://example.org/", False),
        ("*.example.org", "https://evilexample.org/", False),
        ("example.org:8443", "https://example.org:8443/", True),
        ("example.org:8443", "https://example.org/", False),
        ("*", "https://anything.example/", True),
        ("*", "https://anything.example:22/", False),
        ("[2606:2800::1]:8080", "http://[2606:2800::1]:8080/", True),
        ("bücher.example", "https://xn--bcher-kva.example/", True),
    ],
)
def test_hosts_the_owner_allows(allowed, url, covers):
    assert Allowed.parse(allowed).covers(httpx2.URL(url)) is covers


@pytest.mark.parametrize("wrong", ["", "http://example.org", "example.org/path", "example.org:http", ":80"])
def test_hosts_that_are_none(wrong):
    with pytest.raises(MessageError, match="--allow-url"):
        Allowed.parse(wrong)


class Web:
    """Some hosts and what they answer, all on one port of the loopback."""

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.pauses: dict[str, float] = {}
        self.requests: list[str] = []
        self.port = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split(" ")[1]
            self.requests.append(head)
            for piece in self.pages[path].split(b"|"):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(self.pauses.get(path, 0))


def page(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def fetch(
    monkeypatch: pytest.MonkeyPatch,
    web: Web,
    url: str,
    *,
    names: dict[str, list[str]] | None = None,
    allow: tuple[str, ...] = (),
    public: Callable[[Any], bool] = lambda address: str(address) == "127.0.0.1",
    **settings: Any,
) -> bytes:
    """Fetch from these hosts; loopback counts as public, or nothing could be reached."""
    known = names or {"pictures.example": ["127.0.0.1"]}

    async def go() -> bytes:
        loop = asyncio.get_running_loop()
        server = await asyncio.start_server(web.answer, "127.0.0.1", 0)
        web.port = server.sockets[0].getsockname()[1]

        async def resolve(host: str, port: int, **more: Any) -> list[Any]:
            if host not in known:
                return await type(loop).getaddrinfo(loop, host, port, **more)
            return [(0, 0, 0, "", (address, port)) for address in known[host]]

        monkeypatch.setattr(fetching, "is_public", public)
        monkeypatch.setattr(loop, "getaddrinfo", resolve)
        hosts = allow or (f"pictures.example:{web.port}", f"*.example:{web.port}")
        fetcher = Fetcher(Settings(allow_url=hosts, **{"fetch_timeout_s": 5.0, **settings}))
        try:
            return await fetcher.fetch(url.replace("PORT", str(web.port)), 1000)
        finally:
            server.close()

    return asyncio.run(go())


PLACE = "http://pictures.example:PORT/a"


def test_a_picture_is_fetched(monkeypatch):
    web = Web()
    web.pages["/a"] = page(b"PNG", "200 OK", "Content-Length: 3")
    assert fetch(monkeypatch, web, PLACE) == b"PNG"
    (head,) = web.requests
    assert f"Host: pictures.example:{web.port}" in head
    assert "cookie" not in head.lower()
    web.pages["/b?q=%20"] = page(b"after", "200 OK")
    web.pages["/a"] = page(b"", "302 Found", "Location: /b?q=%20")
    assert fetch(monkeypatch, web, PLACE) == b"after"


@pytest.mark.parametrize(
    ("url", "allow"),
    [
        (PLACE, ("other.example",)),
        ("file:///etc/passwd", ()),
        ("ftp://pictures.example/a", ()),
        ("gopher://pictures.example:PORT/a", ()),
        ("http://user:word@pictures.example:PORT/a", ()),
        ("http:///a", ()),
        ("http://pictures.example:22/a", ()),
        ("http://pictures.example\r\nHost: x/a", ()),
        ("http://pictures.example:99999/a", ()),
        (PLACE, ("*",)),  # any host, but not any port
    ],
)
def test_addresses_that_may_not_be_fetched(monkeypatch, url, allow):
    web = Web()
    with pytest.raises(NotAllowed):
        fetch(monkeypatch, web, url, allow=allow)
    assert web.requests == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "2130706433", "127.1", "0x7f000001", "[::1]", "[::ffff:127.0.0.1]", "localhost", "0"],
)
def test_no_spelling_of_an_inner_address_gets_through(monkeypatch, host):
    """Even where the owner allows the host by name: what counts is where it leads."""
    web = Web()
    with pytest.raises((NotAllowed, ImageError)):
        fetch(monkeypatch, web, f"http://{host}:PORT/a", allow=(f"{host}:1",), public=is_public)
    with pytest.raises((NotAllowed, ImageError)):
        fetch(monkeypatch, web, f"http://{host}/a", allow=("*",), public=is_public)
    assert web.requests == []


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["93.184.215.14", "169.254.169.254"], ["::1"], []])
def test_names_that_lead_inside(monkeypatch, addresses):
    web = Web()
    with pytest.raises(NotAllowed, match="public internet"):
        fetch(monkeypatch, web, PLACE, names={"pictures.example": addresses}, public=is_public)
    assert web.requests == []


def test_a_name_is_resolved_once_and_the_checked_address_used(monkeypatch):
    """DNS rebinding: a second look-up would lead elsewhere; there is none."""
    web = Web()
    web.pages["/a"] = page(b"PNG")
    asked: list[str] = []

    def public(address: Any) -> bool:
        asked.append(str(address))
        return True

    connected: list[str] = []
    before = fetching.httpcore2.AnyIOBackend.connect_tcp

    async def connect(self: Any, host: str, *more: Any, **named: Any) -> Any:
        connected.append(host)
        return await before(self, host, *more, **named)

    monkeypatch.setattr(fetching.httpcore2.AnyIOBackend, "connect_tcp", connect)
    assert fetch(monkeypatch, web, PLACE, public=public) == b"PNG"
    assert asked == connected == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("http://127.0.0.1:PORT/inside", NotAllowed),
        ("http://inside.example:PORT/inside", NotAllowed),  # an allowed name that leads inside
        ("file:///etc/passwd", NotAllowed),
        ("//other.org/inside", NotAllowed),
        ("http://[", NotAllowed),
        ("/a", ImageError),  # for ever
    ],
)
def test_redirects_pass_the_same_checks(monkeypatch, location, error):
    web = Web()
    web.pages["/inside"] = page(b"secret")

    class Late(dict[str, bytes]):
        def __getitem__(self, path: str) -> bytes:
            if path == "/a":
                return page(b"", "302 Found", f"Location: {location}".replace("PORT", str(web.port)))
            return super().__getitem__(path)

    web.pages = Late(web.pages)
    with pytest.raises(error):
        fetch(
            monkeypatch,
            web,
            PLACE,
            names={"pictures.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]},
        )
    assert not any("/inside" in head.splitlines()[0] for head in web.requests)


@pytest.mark.parametrize(
    "answer",
    [
        page(b"", "200 OK", "Content-Length: 1000000000000"),
        page(b"x" * 1001, "200 OK"),
        page(
            b"3e8\r\n" + b"x" * 1000 + b"\r\n3e8\r\n" + b"x" * 1000 + b"\r\n0\r\n\r\n",
            "200 OK",
            "Transfer-Encoding: chunked",
        ),
    ],
    ids=["announced", "endless", "chunked"],
)
def test_too_many_bytes(monkeypatch, answer):
    web = Web()
    web.pages["/a"] = answer
    with pytest.raises(ImageError, match="more than 1000 bytes"):
        fetch(monkeypatch, web, PLACE)


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 2|0|0| |O|K|\r|\n|", page(b"|".join([b"x"] * 30))], ids=["head", "body"]
)
def test_servers_that_drip(monkeypatch, answer):
    web = Web()
    web.pages["/a"], web.pauses["/a"] = answer, 0.1
    with pytest.raises(ImageError, match=r"within 0\.4 s"):
        fetch(monkeypatch, web, PLACE, fetch_timeout_s=0.4)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [(page(b"", "404 Not Found"), "status 404"), (b"no HTTP at all\r\n\r\n", "cannot be fetched"), (b"", "cannot")],
)
def test_servers_that_do_not_deliver(monkeypatch, answer, complaint):
    web = Web()
    web.pages["/a"] = answer
    with pytest.raises(ImageError, match=complaint):
        fetch(monkeypatch, web, PLACE)


# --- several addresses of one request ------------------------------------------------------------------------------


class Shelf:
    """Stands for a `Fetcher`: sizes by address, and how much each might have had."""

    def __init__(self, **sizes: int) -> None:
        self.sizes, self.most = sizes, []

    async def fetch(self, address: str, most: int) -> bytes:
        """The bytes; refused as a `Fetcher` refuses them."""
        self.most.append(most)
        n_bytes = self.sizes[address.removeprefix("http://h/")]
        if n_bytes > most:
            raise ImageError(f"{address} has more than {most} bytes, which is the limit.")
        return bytes(n_bytes)


def bring(shelf: Shelf, *names: str, **limits: int) -> Any:
    asked = parts(*({"type": "image_url", "image_url": {"url": f"http://h/{name}"}} for name in names))
    return asyncio.run(brought_in(asked, Settings(**limits), shelf))


def test_pictures_to_be_fetched_share_one_limit():
    """Each is small enough, and together they must be, too."""
    limits = {"max_body_bytes": 1000, "max_image_bytes": 600}
    shelf = Shelf(a=400, b=300, c=300, d=1)
    (message,) = bring(shelf, "a", "b", "c", **limits)
    assert shelf.most == [600, 600, 300], "what others have taken is left out of what one may have"
    got = [part["image_url"]["url"] for part in message["content"][:3]]
    assert [len(base64.b64decode(url.partition(",")[2])) for url in got] == [400, 300, 300]
    with pytest.raises(TooLarge, match="more than 1000 bytes together"):
        bring(shelf, "a", "b", "c", "d", **limits)
    with pytest.raises(TooLarge, match="more than 1000 bytes together"):
        bring(Shelf(a=600, b=600), "a", "b", **limits)


def test_one_picture_that_is_too_large_is_no_matter_of_the_others():
    with pytest.raises(ImageError, match="h/b has more than 600 bytes"):
        bring(Shelf(a=100, b=601), "a", "b", max_body_bytes=5000, max_image_bytes=600)


def test_a_picture_that_stands_twice_is_fetched_once():
    shelf = Shelf(a=600)
    bring(shelf, "a", "a", max_body_bytes=1000, max_image_bytes=600)
    assert shelf.most == [600]
