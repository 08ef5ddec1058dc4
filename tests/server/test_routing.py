"""HEAD wherever GET is answered, for health checks that ask so."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

import pytest

from server.attacking import connected, rest_of

GETS = [
    *("/", "/api/tags", "/api/version", "/api/ps", "/health", "/v1/models", "/v1/models/demo", "/metrics", "/props"),
    *("/openapi.json", "/sw.js", "/static/app.js", "/v1/health", "/lora-adapters"),
    *("/v1/files", "/v1/batches", "/v1/messages/batches"),
]


def ask(server, method: str, path: str) -> tuple[http.client.HTTPResponse, bytes]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    connection.request(method, path)
    reply = connection.getresponse()
    body = reply.read()
    connection.close()
    return reply, body


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(server, path):
    got, body = ask(server, "GET", path)
    head, nothing = ask(server, "HEAD", path)
    assert (
        (head.status, head.headers["content-type"])
        == (got.status, got.headers["content-type"])
        == (200, head.headers["content-type"])
    )
    assert body
    assert not nothing
    # Raw, for http.client does not look at what follows: nothing does.
    request = f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode()
    with connected(server, request) as connection:
        assert rest_of(connection).endswith(b"\r\n\r\n")


def test_every_get_of_the_api_is_among_them(server):
    described = server.app.openapi()["paths"]
    gets = {path for path, methods in described.items() if "get" in methods and "{" not in path}
    assert gets <= set(GETS)
    assert not any("head" in methods for path, methods in described.items() if "get" in methods)


def test_what_get_does_not_answer_head_does_not_either(server):
    for path, status in (
        ("/nothing", 404),
        ("/api/chat", 405),
        ("/static/nothing.js", 404),
        ("/v1/models/nothing", 404),
    ):
        head, body = ask(server, "HEAD", path)
        assert (head.status, body) == (status, b""), path
        assert ask(server, "GET", path)[0].status == status


def test_heads_that_are_more_than_a_get_stay_so(server):
    """Uploads are asked after by HEAD alone."""
    assert ask(server, "HEAD", "/api/blobs/sha256:" + "0" * 64)[0].status == 404
    assert ask(server, "GET", "/api/blobs/sha256:" + "0" * 64)[0].status == 405
