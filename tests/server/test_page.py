"""The web page in headless Chromium, against the running server with the demo model.

Every test fails when the browser logged an error, or asked anybody but the server for anything.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright

from edge_runtime.generation.text_stream import TextStream
from server.conftest import SIGN, Served

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
CHAT = "**/v1/chat/completions"
ARGUMENTS = [
    "--no-sandbox",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # what leaves the machine fails, and is seen
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
WAIT_MS = 90_000  # the first picture on a machine compiles the kernels
expect.set_options(timeout=20_000)  # for the machine may be busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, server: Served) -> Iterator[Callable[..., Page]]:
    """Open the page in a fresh browser profile; options are those of Playwright's contexts."""
    contexts: list[BrowserContext] = []
    troubles: list[str] = []
    expected: list[str] = []

    def note_request(request: Request) -> None:
        if not request.url.startswith((server.url, "data:", "blob:")):
            troubles.append(f"asked {request.url}")

    def note_message(kind: str, text: str) -> None:
        if kind in ("error", "warning") and not any(part in text for part in expected):
            troubles.append(f"{kind}: {text}")

    def open_page(*, tolerate: tuple[str, ...] = (), **options: Any) -> Page:
        expected.extend(tolerate)
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write", "camera"], **options)
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        context.on("request", note_request)
        page = context.new_page()
        page.on("console", lambda message: note_message(message.type, message.text))
        page.on("pageerror", lambda error: troubles.append(f"uncaught: {error}"))
        page.goto(server.url)
        expect(page.locator("#model option").first).to_be_attached()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token takes its time, so that there is something to be seen between two of them."""
    feed = TextStream.feed

    def late(*args: Any) -> Any:
        time.sleep(0.2)
        return feed(*args)

    monkeypatch.setattr(TextStream, "feed", late)


def size_of_sign() -> list[int]:
    with Image.open(SIGN) as picture:
        return [*picture.size]


def ask(page: Page, question: str, *files: Any) -> None:
    if files:
        page.set_input_files("#files", [*files])
    field = page.get_by_label("Question", exact=True)
    field.fill(question)
    page.evaluate("for (const node of document.querySelectorAll('.answer')) node.dataset.before = ''")
    page.keyboard.press("Enter")
    if not field.input_value():  # it was taken; its answer appears when the question is stored
        expect(page.locator(".answer:not([data-before])").first).to_be_attached(timeout=WAIT_MS)


def answer_of(page: Page) -> Any:
    """The last answer, once it has ended."""
    last = page.locator(".answer").last
    expect(last).to_have_attribute("aria-busy", "false", timeout=WAIT_MS)
    return last


def prose(page: Page) -> str:
    return answer_of(page).locator("> .prose").inner_text()


def say(page: Page, text: str, *, thinking: str = "", seen: list[dict[str, Any]] | None = None) -> None:
    """Let the next answers be this text, in the form of the real stream."""

    def chunk(**delta: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}

    chunks = [chunk(role="assistant", content="")]
    chunks += [chunk(reasoning=thinking, reasoning_content=thinking)] if thinking else []
    chunks += [chunk(content=text[i : i + 40]) for i in range(0, len(text), 40)]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": None})
    chunks.append(
        {"choices": [], "usage": {"completion_tokens": 9}, "timings": {"predicted_ms": 450, "image_ms": 310}}
    )
    body = ": working\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"

    def fulfil(route: Route) -> None:
        if seen is not None:
            seen.append(route.request.post_data_json)
        route.fulfill(content_type="text/event-stream", body=body)

    page.route(CHAT, fulfil)


# --- Asking ---


def test_a_picture_is_asked_about_and_kept(visit: Callable[..., Page], slowly: None):
    page = visit()
    page.evaluate(
        """() => {
            window.lengths = [];
            new MutationObserver(() => {
                const prose = document.querySelector(".answer > .prose");
                if (prose) window.lengths.push(prose.textContent.length);
            }).observe(document.getElementById("turns"), { subtree: true, childList: true, characterData: true });
        }"""
    )
    ask(page, "What does it say?", SIGN)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    assert prose(page) == "CAFE"
    lengths = page.evaluate("[...new Set(window.lengths)].filter((length) => length > 0)")
    assert len(lengths) >= 2, "the answer came in one piece"
    assert re.search(r"First word [\d.]+ m?s · .*tokens/s · \d+ tokens", page.locator(".timings").inner_text())
    expect(page.locator("#said")).to_contain_text("CAFE")  # what a screen reader is told

    page.reload()
    assert prose(page) == "CAFE"
    assert page.locator(".question .bubble").inner_text() == "What does it say?"
    sizes = page.locator(".question img").evaluate(
        "async (image) => (await image.decode(), [image.naturalWidth, image.naturalHeight])"
    )
    assert sizes == size_of_sign(), "the picture did not come back from the store"

    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What does it say?")
    assert prose(page)
    first, *_ = asked.value.post_data_json["messages"]
    assert any(part["type"] == "image_url" for part in first["content"]), "the picture goes along with every question"
    assert page.locator(".trouble:visible").count() == 0


def test_stop_ends_an_answer(visit: Callable[..., Page], server: Served, slowly: None):
    page = visit()
    for stop in (
        lambda: page.get_by_role("button", name="Stop the answer").click(),
        lambda: page.keyboard.press("Escape"),
    ):
        page.get_by_role("button", name="New chat").first.click()
        ask(page, "Who are you?")
        expect(page.locator(".answer > .prose")).not_to_be_empty()
        stop()
        assert prose(page) != "I am a tiny demo model."
        expect(page.locator(".timings")).to_contain_text("Stopped")
        deadline = time.monotonic() + 10
        while server.state.inference.n_open and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.state.inference.n_open == 0, "the server works on, though nobody listens"
    page.reload()
    expect(page.locator(".timings")).to_contain_text("Stopped")


def test_chats_are_listed_opened_and_deleted(visit: Callable[..., Page]):
    page = visit()
    say(page, "First answer")
    ask(page, "First question", SIGN)
    assert prose(page) == "First answer"
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "Second question")
    answer_of(page)
    titles = page.locator(".chat .open")
    assert titles.all_inner_texts() == ["Second question", "First question"]
    titles.nth(1).click()
    expect(page.locator(".question .bubble")).to_have_text("First question")
    expect(page.locator(".question img")).to_be_visible()

    page.get_by_role("button", name="Delete the chat “First question”").click()
    page.get_by_role("button", name="Keep").click()
    assert titles.count() == 2
    page.get_by_role("button", name="Delete the chat “First question”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(titles).to_have_count(1)
    page.reload()
    expect(titles).to_have_text(["Second question"])
    left = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("edge-runtime").onsuccess = ({ target }) => {
                const files = target.result.transaction("files").objectStore("files").count();
                files.onsuccess = () => resolve(files.result);
            };
        })"""
    )
    assert left == 0, "a deleted chat left its picture behind"


def test_questions_are_edited_and_asked_again(visit: Callable[..., Page]):
    page = visit()
    seen: list[dict[str, Any]] = []
    say(page, "An answer", seen=seen)
    ask(page, "Frist question", SIGN)
    answer_of(page)
    page.locator(".question").hover()
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Question", exact=True)).to_have_value("Frist question")
    expect(page.locator("#attached img")).to_be_visible()
    ask(page, "First question")
    answer_of(page)
    page.get_by_role("button", name="Ask again").click()
    answer_of(page)
    assert page.locator(".turn").count() == 2
    contents = [[message["content"] for message in body["messages"]] for body in seen]
    assert [len(content) for content in contents] == [1, 1, 1]
    assert [content[0][1]["text"] for content in contents] == ["Frist question", "First question", "First question"]
    assert all(content[0][0]["image_url"]["url"].startswith("data:image/png") for content in contents)


# --- What goes in ---


def test_files_come_by_paste_drop_and_camera(visit: Callable[..., Page]):
    page = visit(tolerate=("GPU stall", "GL Driver"))  # headless drawing of the fake camera's picture
    seen: list[dict[str, Any]] = []
    say(page, "Seen", seen=seen)
    give = """(kind) => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array([1, 2, 3])], "scan.pdf", { type: "application/pdf" }));
        transfer.items.add(new File([new Uint8Array([1, 2, 3])], "notes.zip", { type: "application/zip" }));
        const options = { clipboardData: transfer, dataTransfer: transfer, bubbles: true, cancelable: true };
        const Kind = kind === "paste" ? ClipboardEvent : DragEvent;
        document.body.dispatchEvent(new Kind(kind, options));
    }"""
    page.evaluate(give, "dragenter")
    expect(page.locator("body")).to_have_class("dropping")
    page.evaluate(give, "drop")
    page.evaluate(give, "paste")
    expect(page.locator("#attached .tile")).to_have_count(2)
    expect(page.locator("#notice")).to_contain_text("notes.zip is neither a picture, a video nor a PDF")
    page.get_by_role("button", name="Remove scan.pdf").last.click()

    page.get_by_role("button", name="Take a picture").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.locator("#attached img")).to_be_visible()
    page.set_input_files("#files", {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": b"no real film"})
    expect(page.locator("#attached .tile")).to_have_count(3)
    ask(page, "What is this?")
    answer_of(page)
    (message,) = seen[0]["messages"]
    assert [part["type"] for part in message["content"]] == ["file", "image_url", "video_url", "text"]
    types = re.findall(r"data:([\w/]+);base64,", json.dumps(message))
    assert types == ["application/pdf", "image/jpeg", "video/mp4"]


def test_enter_sends_and_shift_enter_does_not(visit: Callable[..., Page]):
    page = visit()
    seen: list[dict[str, Any]] = []
    say(page, "Yes", seen=seen)
    page.keyboard.type("one")  # the field has the focus from the beginning
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert not seen
    page.keyboard.press("Enter")
    answer_of(page)
    assert seen[0]["messages"][0]["content"] == "one\ntwo"
    expect(page.get_by_label("Question", exact=True)).to_be_focused()


# --- What goes wrong ---


def test_errors_are_told_and_can_be_tried_again(visit: Callable[..., Page]):
    page = visit()
    error = {"message": "The prompt has 9120 tokens, but the context holds 8192; ask for less."}
    line = f"data: {json.dumps({'error': error})}\n\n"
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=line))
    ask(page, "Too long")
    expect(answer_of(page).get_by_role("alert")).to_contain_text("the context holds 8192")
    page.unroute(CHAT)
    page.get_by_role("button", name="Ask again").click()
    assert prose(page)
    assert page.locator(".trouble:visible").count() == 0


def test_a_key_is_asked_for_and_sent(visit: Callable[..., Page], browser: Browser):
    page = visit(tolerate=("401",))

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right-key":
            route.fallback()
        else:
            route.fulfill(status=401, json={"error": "This server wants a key."})

    page.route(re.compile("/(api|v1)/"), guard)
    page.reload()
    expect(page.get_by_role("dialog")).to_contain_text("This server wants a key.")
    page.get_by_role("textbox", name="API key").fill("wrong-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("textbox", name="API key").fill("right-key")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    ask(page, "Who are you?")
    assert prose(page) == "I am a tiny demo model."
    stored = page.evaluate("JSON.stringify([{ ...localStorage }, { ...sessionStorage }])")
    local, session = json.loads(stored)
    assert "right-key" not in local.values(), "the key was kept without being asked to"
    assert session["api-key"] == "right-key"


def test_the_page_opens_without_a_server(visit: Callable[..., Page]):
    page = visit(tolerate=("ERR_INTERNET_DISCONNECTED", "net::ERR_FAILED"))
    say(page, "Kept")
    ask(page, "Keep this")
    answer_of(page)
    page.evaluate("navigator.serviceWorker.ready")
    page.wait_for_function("navigator.serviceWorker.controller !== null")
    cached = page.evaluate(
        """async () => {
            const kept = (await caches.keys()).map(async (name) => (await caches.open(name)).keys());
            return (await Promise.all(kept)).flat().map((request) => new URL(request.url).pathname);
        }"""
    )
    assert "/" in cached
    assert not [path for path in cached if path.startswith(("/api", "/v1"))], "the worker keeps answers"
    page.context.set_offline(True)
    page.reload()
    assert prose(page) == "Kept"
    expect(page.locator("#away")).to_contain_text("The server does not answer")
