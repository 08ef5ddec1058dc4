"""Documents and videos in the page: pages that are chosen, asked about one by one, and frames that are seen."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from server.test_page import CHAT, answer_of, ask, browser, prose, say, visit
from support.document_maker import words_pdf
from support.video_maker import make_video

__all__ = ["browser", "visit"]

pytestmark = pytest.mark.slow

WORDS = ["CAFE", "STOP", "TAXI"]


def given(words: list[str]) -> dict[str, Any]:
    return {"name": "words.pdf", "mimeType": "application/pdf", "buffer": words_pdf(words)}


def test_pages_are_chosen(visit: Callable[..., Page]):
    page = visit()
    seen: list[dict[str, Any]] = []
    say(page, "Seen", seen=seen)
    page.set_input_files("#files", given(WORDS))
    page.get_by_role("button", name="Choose pages of words.pdf").click()
    boxes, field = page.get_by_role("checkbox", name=re.compile(r"^Page \d")), page.get_by_label("Pages to look at")
    expect(boxes).to_have_count(3)
    expect(page.locator("#document-status")).to_have_text("3 pages")
    assert [box.is_checked() for box in boxes.all()] == [True] * 3
    boxes.nth(1).uncheck()
    expect(field).to_have_value("1,3")
    save = page.get_by_role("button", name="Save", exact=True)
    for wrong in ("x", "4", "0", "3-1"):
        field.fill(wrong)
        save.click()
        expect(page.get_by_role("dialog")).to_be_visible()
    field.fill("2-")
    assert [box.is_checked() for box in boxes.all()] == [False, True, True]
    save.click()
    expect(page.locator("#attached .document")).to_contain_text("pages 2-")
    ask(page, "What does it say?")
    answer_of(page)
    assert seen[0]["messages"][0]["content"][0]["pages"] == "2-"
    page.reload()
    ask(page, "Again?")
    expect(page.locator(".answer")).to_have_count(2)
    answer_of(page)
    assert seen[1]["messages"][0]["content"][0]["pages"] == "2-", "the choice is forgotten"


def test_every_page_is_asked_about(visit: Callable[..., Page], tmp_path: Path):
    page = visit()

    def greedily(route: Route) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, "temperature": 0}))

    page.route(CHAT, greedily)
    page.set_input_files("#files", given(WORDS))
    page.get_by_role("button", name="Choose pages of words.pdf").click()
    page.get_by_role("checkbox", name="Page 2").uncheck()
    page.get_by_label("Ask about each page separately").check()
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "What does it say?")
    answer_of(page)
    assert prose(page).split("\n\n") == ["Page 1", "CAFE", "Page 3", "TAXI"]
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()
    with page.expect_download() as file:
        page.get_by_role("button", name="Save as Markdown").click()
    file.value.save_as(tmp_path / "a.md")
    assert (tmp_path / "a.md").read_text("utf-8") == "## Page 1\n\nCAFE\n\n## Page 3\n\nTAXI"


def test_a_page_that_fails_keeps_its_place(visit: Callable[..., Page]):
    page = visit(tolerate=("400",))

    def some(route: Route) -> None:
        first = route.request.post_data_json["messages"][0]["content"][0]
        if first["pages"] == "2":
            route.fulfill(status=400, json={"error": {"message": "Page 2 is damaged."}})
        else:
            route.fallback()

    say(page, "Fine")
    page.route(CHAT, some)
    page.set_input_files("#files", given(WORDS))
    page.get_by_role("button", name="Choose pages of words.pdf").click()
    page.get_by_label("Ask about each page separately").check()
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "What does it say?")
    answer_of(page)
    shown = ["Page 1", "Fine", "Page 2", "Page 2 is damaged.", "Page 3", "Fine"]
    assert prose(page).split("\n\n") == shown


def test_a_document_that_cannot_be_read_is_told(visit: Callable[..., Page]):
    page = visit(tolerate=("400",))
    page.set_input_files("#files", {"name": "x.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-1.7 nothing"})
    page.get_by_role("button", name="Choose pages of x.pdf").click()
    expect(page.locator("#document-status")).not_to_have_text("Reading the document …")
    expect(page.get_by_label("Ask about each page separately")).to_be_disabled()


def test_the_frames_of_a_video_are_shown(visit: Callable[..., Page]):
    page = visit()
    film = {"name": "clip.mp4", "mimeType": "video/mp4", "buffer": make_video(50, 25)}
    page.set_input_files("#files", film)
    page.get_by_role("button", name="Enlarge clip.mp4").click()
    page.get_by_role("button", name="Show the frames that the model sees").click()
    drawing = page.get_by_alt_text("The frames that the model sees")
    expect(drawing).to_be_visible()
    assert drawing.evaluate("async (node) => (await node.decode(), node.naturalWidth)") > 100
    expect(page.get_by_role("dialog")).to_contain_text("frames in")
