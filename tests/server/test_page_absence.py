"""The page when the server goes away and comes back; small things that must be where they are expected."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from edge_runtime.generation.text_stream import TextStream
from edge_runtime.server.settings import Settings
from server.conftest import SIGN, running
from server.test_page import answer_of, ask, browser, visit
from server.test_page_looks import PHONE

__all__ = ["browser", "visit"]

pytestmark = pytest.mark.slow


def test_a_server_that_ends_and_begins_again(browser: Browser, own_store: Any, slow_words: threading.Event):
    """The real one: ended in the middle of an answer, and started again at the same address."""
    context = browser.new_context()
    page = context.new_page()
    with running(Settings(port=0, models=("demo",), heartbeat_s=0.05, grace_s=0.1)) as first:
        port = int(first.url.rsplit(":", 1)[1])
        page.goto(first.url)
        expect(page.locator("#model option").first).to_be_attached()
        ask(page, "Who are you?")
        expect(page.locator(".answer > .prose")).not_to_be_empty(timeout=60_000)
        half = page.locator(".answer > .prose").inner_text()
        first.server.should_exit = True
        first.server.force_exit = True
        slow_words.set()
    expect(page.locator("#away")).to_contain_text("Start “edge-runtime serve” again")
    answer = page.locator(".answer").last
    expect(answer).to_have_attribute("aria-busy", "false")
    assert answer.locator("> .prose").inner_text().startswith(half), "the half answer is lost"
    with running(Settings(port=port, models=("demo",), heartbeat_s=0.05)):
        expect(page.locator("#away")).to_be_hidden(timeout=60_000)
        ask(page, "Who are you?")
        expect(page.locator(".answer").last.locator("> .prose")).to_have_text(
            "I am a tiny demo model.", timeout=60_000
        )
    context.close()


@pytest.fixture
def slow_words(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The third word of an answer comes only when the event is set."""
    feed, fed, go_on = TextStream.feed, [0], threading.Event()

    def late(*args: Any) -> Any:
        fed[0] += 1
        if fed[0] == 3:
            go_on.wait(60)
        return feed(*args)

    monkeypatch.setattr(TextStream, "feed", late)
    return go_on


def test_a_question_that_met_no_server_is_kept(visit: Callable[..., Page]):
    page = visit(tolerate=("ERR_INTERNET_DISCONNECTED",))
    page.evaluate("navigator.serviceWorker.ready")
    page.context.set_offline(True)
    expect(page.locator("#away")).to_be_visible()
    ask(page, "Is anybody there?")
    expect(answer_of(page).get_by_role("alert")).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    expect(page.locator("#away")).to_be_hidden()
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer > .prose")).not_to_be_empty(timeout=60_000)
    assert page.locator(".turn").count() == 2, "an answer that never began stays as a version"


def test_nothing_is_asked_while_nobody_looks(visit: Callable[..., Page]):
    page = visit()
    page.evaluate("Object.defineProperty(document, 'hidden', { get: () => true })")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for_timeout(1500)  # the look that may have been on its way
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []


def test_notices_are_in_the_middle_of_the_conversation(visit: Callable[..., Page]):
    for options in ({}, {"viewport": PHONE}):
        page = visit(**options)
        page.set_input_files("#files", {"name": "notes.zip", "mimeType": "application/zip", "buffer": b"x"})
        expect(page.locator("#notice")).to_contain_text("notes.zip")
        page.wait_for_timeout(400)  # it rises
        notice, main = page.locator("#notice").bounding_box(), page.locator("#main").bounding_box()
        assert abs(notice["x"] + notice["width"] / 2 - main["x"] - main["width"] / 2) < 3


def test_save_is_beside_cancel_on_a_phone(visit: Callable[..., Page]):
    page = visit(viewport=PHONE, is_mobile=True, has_touch=True)
    page.get_by_role("button", name="Chats and settings").tap()
    page.get_by_role("button", name="Settings", exact=True).tap()
    save, cancel = (
        page.locator("#settings").get_by_role("button", name=name).bounding_box() for name in ("Save", "Cancel")
    )
    assert save["y"] == cancel["y"]
    assert save["width"] == pytest.approx(cancel["width"], rel=0.3)


def test_a_white_page_has_an_edge_and_the_drop_area_hides_what_is_below(visit: Callable[..., Page]):
    page = visit()
    page.set_input_files("#files", SIGN)
    border = page.locator("#attached img").evaluate("(node) => getComputedStyle(node).borderTopWidth")
    assert border == "1px"
    alpha = page.locator("#dropzone").evaluate("(node) => getComputedStyle(node).backgroundColor")
    assert alpha.startswith("rgb("), "what is below shines through"
