"""What is around every request: slashes at the end of paths, ids of requests, sentences that keep their routes."""

from __future__ import annotations

import httpx
import pytest

from edge_runtime.server.errors import without_paths

HI = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models//", "/api/tags/", "/v1/models/demo/", "/api/version/"])
def test_slashes_at_the_end_of_a_path(client: httpx.Client, path: str):
    reply = client.get(path, follow_redirects=False)
    assert reply.status_code == 200
    assert reply.json() == client.get(path.rstrip("/")).json()


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/messages/"])
def test_bodies_reach_paths_with_slashes(client: httpx.Client, path: str):
    assert client.post(path, json=HI, follow_redirects=False).status_code == 200


def test_the_list_is_not_a_model(client: httpx.Client):
    assert client.get("/v1/models/").json()["object"] == "list"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/nowhere"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/"),
        ("PUT", "/api/tags"),
    ],
)
def test_every_reply_has_an_id(client: httpx.Client, method: str, path: str):
    ids = {client.request(method, path).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    told = client.request(method, path, headers={"X-Request-Id": "mine-17"}).headers.get_list("x-request-id")
    assert told == ["mine-17"]


@pytest.mark.parametrize("odd", ["", "a b", "é".encode().decode("latin-1"), "x" * 300])
def test_odd_ids_are_not_told_again(client: httpx.Client, odd: str):
    reply = client.get("/v1/models", headers=[("X-Request-Id", odd.encode("latin-1"))])  # type: ignore[list-item]
    assert reply.headers["x-request-id"].startswith("req_")


def test_streams_and_refusals_have_one_too(client: httpx.Client):
    with client.stream("POST", "/v1/chat/completions", json={**HI, "stream": True}) as reply:
        assert reply.headers["x-request-id"]
    assert client.get("/v1/models", headers={"Host": "evil.example"}).headers["x-request-id"]


@pytest.mark.parametrize(
    "sentence",
    [
        "Use POST /api/chat instead.",
        "See POST /tokenize.",
        "It belongs to /v1/chat/completions; expected 'prompt'.",
        "GET /v1/responses/{response_id}/input_items, or /health.",
        "The route /api/blobs/sha256:0123 was asked for.",
        "Send application/json and image/png.",
        "See https://example.org/a/b.html.",
    ],
)
def test_sentences_keep_their_routes(sentence: str):
    assert without_paths(sentence) == sentence


@pytest.mark.parametrize(
    ("sentence", "told"),
    [
        ("/srv/models/a.gguf is damaged.", "a.gguf is damaged."),
        ("Cannot read '/api-models/secret/a.gguf'.", "Cannot read 'a.gguf'."),
        ("/health/records/b.gguf is damaged.", "b.gguf is damaged."),
        ("~/models/a.gguf and C:\\Users\\me\\b.gguf", "a.gguf and b.gguf"),
    ],
)
def test_paths_of_this_machine_are_cut(sentence: str, told: str):
    assert without_paths(sentence) == told
