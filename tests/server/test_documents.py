"""Documents in requests of all three APIs, and in the page: every page is a picture, within the server's limits."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from edge_runtime.server.settings import Settings
from server.conftest import Served, running
from server.test_page import answer_of, ask, browser, prose, visit
from support.document_maker import pages_tiff, scanned_pdf, words_pdf

__all__ = ["browser", "visit"]
WORDS = ["CAFE", "STOP", "TAXI"]
ASK = "What does it say?"


def base64_of(document: bytes) -> str:
    return base64.b64encode(document).decode()


def uri(document: bytes) -> str:
    return f"data:application/pdf;base64,{base64_of(document)}"


def by_chat(document: bytes, **options: Any) -> tuple[str, Any]:
    part = {"type": "file", "file": {"file_data": uri(document), "filename": "words.pdf"}, **options}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [part, {"type": "text", "text": ASK}]}]}


def by_picture(document: bytes, **options: Any) -> tuple[str, Any]:
    """Clients that know no documents send them as pictures."""
    part = {"type": "image_url", "image_url": {"url": uri(document)}, **options}
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": [part, {"type": "text", "text": ASK}]}]}


def by_response(document: bytes, **options: Any) -> tuple[str, Any]:
    part = {"type": "input_file", "file_data": uri(document), "filename": "words.pdf", **options}
    return "/v1/responses", {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": ASK}]}]}


def by_message(document: bytes) -> tuple[str, Any]:
    source = {"type": "base64", "media_type": "application/pdf", "data": base64_of(document)}
    content = [{"type": "document", "source": source}, {"type": "text", "text": ASK}]
    return "/v1/messages", {"max_tokens": 20, "messages": [{"role": "user", "content": content}]}


def by_ollama(document: bytes) -> tuple[str, Any]:
    message = {"role": "user", "content": ASK, "images": [base64_of(document)]}
    return "/api/chat", {"messages": [message], "stream": False}


WAYS = [by_chat, by_picture, by_response, by_message, by_ollama]


def send(client: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    greedy = {"options": {"temperature": 0}} if path.startswith("/api") else {"temperature": 0}
    return client.post(path, json={"model": "demo", **body, **greedy})


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    found = reply.json()
    if "choices" in found:
        return found["choices"][0]["message"]["content"]
    if "output" in found:
        return found["output"][0]["content"][0]["text"]
    if "message" in found:
        return found["message"]["content"]
    return found["content"][0]["text"]


def tokens_of(reply: httpx.Response) -> int:
    assert reply.status_code == 200, reply.text
    found = reply.json()
    usage = found.get("usage", {})
    read = usage.get("cache_read_input_tokens", 0)
    return found.get("prompt_eval_count") or usage.get("prompt_tokens") or usage["input_tokens"] + read


@pytest.mark.parametrize("way", WAYS)
def test_a_page_is_read(client: httpx.Client, way: Callable[..., tuple[str, Any]]):
    for word in WORDS[:2]:
        assert text_of(send(client, *way(words_pdf([word])))) == word


@pytest.mark.parametrize("way", WAYS)
def test_every_page_counts(client: httpx.Client, way: Callable[..., tuple[str, Any]]):
    one, two, three = (tokens_of(send(client, *way(words_pdf(WORDS[:n])))) for n in (1, 2, 3))
    assert three - two == two - one > 10


@pytest.mark.parametrize("way", [by_chat, by_response])
def test_pages_are_chosen(client: httpx.Client, way: Callable[..., tuple[str, Any]]):
    document = words_pdf(WORDS)
    assert text_of(send(client, *way(document, pages="2"))) == WORDS[1]
    refused = send(client, *way(document, pages="7"))
    assert refused.status_code == 400
    assert "Page 7" in refused.text


def test_a_tiff_file_of_several_pages(client: httpx.Client):
    pages = [Image.new("RGB", (60, 40), colour) for colour in ("red", "green", "blue")]
    one, three = (tokens_of(send(client, *by_ollama(pages_tiff(pages[:n])))) for n in (1, 3))
    assert three > one


@pytest.fixture(scope="module")
def strict(own_store: object) -> Iterator[Served]:
    """A server that reads two pages, small ones."""
    limits = Settings(port=0, models=("demo",), max_pages=2, max_video_bytes=100_000, max_image_bytes=100_000)
    with running(limits) as served:
        yield served


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("document", "statuses", "told"),
    [
        (words_pdf(WORDS), {400}, "at most 2"),
        (scanned_pdf(2), {413}, "at most 100000"),
        (words_pdf(["CAFE"])[:300], {400}, ""),
        (b"%PDF-1.7\n" + bytes(500), {400}, ""),
        (words_pdf(["CAFE"], encrypt="secret"), {400}, "password"),
    ],
    ids=["pages", "bytes", "cut", "damaged", "encrypted"],
)
def test_limits_and_damage(
    strict: Served, way: Callable[..., tuple[str, Any]], document: bytes, statuses: set[int], told: str
):
    with httpx.Client(base_url=strict.url, timeout=60, trust_env=False) as client:
        refused = send(client, *way(document))
        assert refused.status_code in statuses, refused.text
        assert told in refused.text
        assert text_of(send(client, *way(words_pdf(["CAFE"])))) == "CAFE"


def test_the_page_reads_a_document(visit: Callable[..., Page]):
    page = visit()

    def greedily(route: Route) -> None:  # the page asks to draw
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "temperature": 0}))

    page.route("**/v1/chat/completions", greedily)
    file = {"name": "words.pdf", "mimeType": "application/pdf", "buffer": words_pdf(["STOP"])}
    ask(page, ASK, file)
    answer_of(page)
    assert prose(page) == "STOP"
    expect(page.locator(".question .document").last).to_contain_text("words.pdf")
    page.reload()
    expect(page.locator(".document").last).to_contain_text("words.pdf")
