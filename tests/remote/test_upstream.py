"""`serve --upstream`: what exceeds the queue is answered by another server."""

from __future__ import annotations

import httpx

from server.conftest import own_store, serve, server  # noqa: F401 - fixtures

ASK = {"model": "demo", "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0, "max_tokens": 8}


def full(served):
    """Take all places of a server."""
    places = served.state.inference._places
    for _ in range(places.max_total):
        places.take(f"somebody {places.n}")
    return served


def post(served, path="/v1/chat/completions", **more):
    return httpx.post(f"{served.url}{path}", json=ASK | more, timeout=60, trust_env=False)


def test_what_exceeds_the_queue_is_handed_over(server, serve):  # noqa: F811
    front = serve(max_queue=1, upstream=server.url)
    assert "x-answered-by" not in post(front).headers
    full(front)
    reply = post(front)
    assert (reply.status_code, reply.headers["x-answered-by"]) == (200, "upstream")
    assert reply.json()["choices"][0]["message"]["content"] == "I am a tiny demo model."
    streamed = post(front, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.rstrip().endswith("[DONE]")
    body = {"model": "demo", "messages": ASK["messages"], "stream": False}
    ollama = httpx.post(f"{front.url}/api/chat", json=body, timeout=60, trust_env=False)
    assert (ollama.status_code, ollama.headers.get("x-answered-by")) == (200, "upstream"), ollama.text


def test_without_another_place_the_usual_sentence_stays(server, serve):  # noqa: F811
    nowhere = full(serve(max_queue=1, upstream="http://127.0.0.1:9"))
    reply = post(nowhere)
    assert (reply.status_code, "x-answered-by" in reply.headers) == (429, False)
    assert "which is the limit" in reply.json()["error"]["message"]
    other = full(serve(max_queue=1, upstream=server.url))
    assert post(other, model="no such model").status_code in (404, 429)


def test_two_servers_that_name_each_other_do_not_loop(serve):  # noqa: F811
    second = full(serve(max_queue=1, upstream="http://127.0.0.1:9"))
    first = full(serve(max_queue=1, upstream=second.url))
    assert post(first).status_code == 429
