"""Chats of the page: versions of questions and answers, going on, names, search, files to keep, options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from server.conftest import SIGN
from server.test_page import CHAT, answer_of, ask, browser, prose, say, visit

__all__ = ["browser", "visit"]

pytestmark = pytest.mark.slow

SCHEMA = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


def asked(page: Page, *texts: str) -> None:
    """These questions are shown."""
    expect(page.locator(".question .bubble")).to_have_text([*texts])


def test_an_edited_question_leaves_the_old_one_reachable(visit: Callable[..., Page]):
    page = visit()
    say(page, "First answer")
    ask(page, "Frist question")
    answer_of(page)
    say(page, "More")
    ask(page, "And then?")
    answer_of(page)
    page.locator(".question").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    expect(page.locator("#editing")).to_be_visible()
    asked(page, "Frist question", "And then?")
    seen: list[dict[str, Any]] = []
    say(page, "Second answer", seen=seen)
    ask(page, "First question")
    answer_of(page)
    expect(page.locator("#editing")).to_be_hidden()
    asked(page, "First question")
    assert [message["content"] for message in seen[0]["messages"]] == ["First question"]

    page.reload()
    asked(page, "First question")
    expect(page.locator(".versions")).to_contain_text("2 of 2")
    page.get_by_role("button", name="Earlier version").click()
    asked(page, "Frist question", "And then?")
    assert prose(page) == "More"
    page.get_by_role("button", name="Later version").click()
    assert prose(page) == "Second answer"


def test_editing_can_be_left(visit: Callable[..., Page]):
    page = visit()
    say(page, "Answer")
    ask(page, "Question")
    answer_of(page)
    for leave in (
        lambda: page.keyboard.press("Escape"),
        lambda: page.get_by_role("button", name="Leave it as it was").click(),
    ):
        page.locator(".question").hover()
        page.get_by_role("button", name="Edit").click()
        leave()
        expect(page.locator("#editing")).to_be_hidden()
        expect(page.get_by_label("Question", exact=True)).to_have_value("")
    ask(page, "Another")
    answer_of(page)
    asked(page, "Question", "Another")


def test_answers_have_versions(visit: Callable[..., Page]):
    page = visit()
    say(page, "One")
    ask(page, "Question")
    answer_of(page)
    say(page, "Two")
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer .versions")).to_contain_text("2 of 2")
    assert prose(page) == "Two"
    page.get_by_role("button", name="Earlier version").click()
    assert prose(page) == "One"
    expect(page.get_by_role("button", name="Earlier version")).to_be_disabled()


def test_chats_from_before_there_were_versions(visit: Callable[..., Page]):
    """A chat as the page kept it until now: messages in a row, without ids."""
    page = visit()
    old = {
        "id": "old",
        "title": "Old chat",
        "updated": 1_800_000_000_000,
        "messages": [
            {"role": "user", "text": "One?", "files": []},
            {"role": "assistant", "text": "One.", "thinking": "", "state": "done", "timings": {}},
            {"role": "user", "text": "Two?", "files": []},
            {"role": "assistant", "text": "Two.", "thinking": "", "state": "running", "timings": {}},
        ],
    }
    page.evaluate(
        """(chat) => new Promise((resolve) => {
            indexedDB.open("edge-runtime").onsuccess = ({ target }) => {
                const work = target.result.transaction("chats", "readwrite");
                work.objectStore("chats").put(chat);
                work.oncomplete = resolve;
            };
        })""",
        old,
    )
    page.reload()
    page.get_by_role("button", name="Old chat", exact=True).click()
    asked(page, "One?", "Two?")
    expect(page.locator(".answer").last.locator(".timings")).to_contain_text("Stopped")
    say(page, "Three.")
    ask(page, "Three?")
    answer_of(page)
    asked(page, "One?", "Two?", "Three?")


def test_an_answer_that_broke_off_goes_on(visit: Callable[..., Page]):
    page = visit()
    chunk = {"choices": [{"index": 0, "delta": {"content": "The first half"}, "finish_reason": None}], "usage": None}
    body = f"data: {json.dumps(chunk)}\n\n"
    page.route(CHAT, lambda route: route.fulfill(content_type="text/event-stream", body=body))
    ask(page, "Question")
    assert prose(page) == "The first half", "what came is kept"
    expect(page.locator(".answer .trouble")).to_contain_text("continue it, or ask again")
    page.unroute(CHAT)
    seen: list[dict[str, Any]] = []
    say(page, " and the second.", seen=seen)
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".answer .trouble")).to_be_hidden()
    assert prose(page) == "The first half and the second."
    assert seen[0]["messages"][-1] == {"role": "assistant", "content": "The first half"}
    assert seen[0]["continue_final_message"] is True
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()


def test_the_server_continues_an_answer(visit: Callable[..., Page]):
    page = visit()
    page.get_by_role("button", name="Options of this chat").click()
    page.get_by_label("Most tokens of an answer").fill("2")
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "What does it say?", SIGN)
    half = prose(page)
    expect(page.locator(".timings")).to_contain_text("Ended early")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    whole = prose(page)
    assert whole != half
    assert whole.startswith(half)


def test_chats_are_searched_and_renamed(visit: Callable[..., Page]):
    page = visit()
    say(page, "The receipt says 7.00")
    ask(page, "A receipt")
    answer_of(page)
    page.get_by_role("button", name="New chat").first.click()
    say(page, "A cat")
    ask(page, "An animal")
    answer_of(page)
    search, titles = page.get_by_role("searchbox", name="Search the chats"), page.locator(".chat .open")
    search.fill("7.00")
    expect(titles).to_have_text(["A receipt"])
    search.fill("nowhere")
    expect(page.locator("#no-chats")).to_have_text("No chat holds that.")
    search.fill("")
    page.get_by_role("button", name="Rename or export the chat “An animal”").click()
    page.get_by_role("textbox", name="Name").fill("  My cat ")
    page.get_by_role("button", name="Rename", exact=True).click()
    expect(titles).to_have_text(["My cat", "A receipt"])
    page.reload()
    expect(titles).to_have_text(["My cat", "A receipt"])
    assert page.title() == "My cat – edge-runtime"


def test_a_chat_is_exported(visit: Callable[..., Page], tmp_path: Path):
    page = visit()
    say(page, "**CAFE**", thinking="Hm")
    ask(page, "What does it say?", SIGN)
    answer_of(page)
    page.get_by_role("button", name="Rename or export").click()
    with page.expect_download() as given:
        page.get_by_role("button", name="Save as Markdown").click()
    assert given.value.suggested_filename == "What does it say.md"
    given.value.save_as(tmp_path / "chat.md")
    text = (tmp_path / "chat.md").read_text("utf-8")
    assert text == "# What does it say?\n\n## Question\n\n- sign.png\n\nWhat does it say?\n\n## Answer\n\n**CAFE**\n"
    with page.expect_download() as given:
        page.get_by_role("button", name="Save as JSON").click()
    given.value.save_as(tmp_path / "chat.json")
    chat = json.loads((tmp_path / "chat.json").read_text("utf-8"))
    assert [message["text"] for message in chat["messages"]] == ["What does it say?", "**CAFE**"]
    assert chat["messages"][1]["thinking"] == "Hm"
    assert chat["files"][0]["data"].startswith("data:image/png;base64,")


def test_options_of_a_chat_go_along(visit: Callable[..., Page]):
    page = visit()
    seen: list[dict[str, Any]] = []
    say(page, "{}", seen=seen)
    page.get_by_role("button", name="Options of this chat").click()
    values = {"Temperature": "0.3", "Top p": "0.9", "Top k": "20", "Seed": "7"}
    values |= {"Most tokens of an answer": "50", "Slices of a picture": "4"}
    for name, value in values.items():
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Instructions for this chat").fill("Answer briefly.")
    page.get_by_label("JSON schema of the answers").fill(json.dumps(SCHEMA))
    page.get_by_label("New chats begin with these options").check()
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "What does it say?", SIGN)
    answer_of(page)
    sent = seen[-1]
    numbers = {name: sent[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "max_slices")}
    assert numbers == {
        "temperature": 0.3,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 7,
        "max_tokens": 50,
        "max_slices": 4,
    }
    assert sent["messages"][0] == {"role": "system", "content": "Answer briefly."}
    assert sent["response_format"]["json_schema"]["schema"] == SCHEMA

    page.reload()
    page.get_by_role("button", name="Options of this chat").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.3")
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "Again")
    answer_of(page)
    assert "temperature" not in seen[-1]
    page.get_by_role("button", name="New chat").first.click()
    ask(page, "With the usual options")
    answer_of(page)
    assert seen[-1]["seed"] == 7


def test_options_are_checked_before_they_are_kept(visit: Callable[..., Page]):
    page = visit()
    page.get_by_role("button", name="Options of this chat").click()
    schema = page.get_by_label("JSON schema of the answers")
    save = page.get_by_role("button", name="Save", exact=True)
    for text, told in (
        ("{", "This is not JSON"),
        ("[]", "A schema is an object"),
        ('{"type": "objekt"}', "“objekt” is no type of JSON"),
    ):
        schema.fill(text)
        expect(page.locator("#schema-trouble")).to_contain_text(told)
        save.click()
        expect(page.get_by_role("dialog")).to_be_visible()
    schema.fill(json.dumps(SCHEMA))
    expect(page.locator("#schema-trouble")).to_have_text("")
    page.get_by_label("Top p").fill("1.5")
    save.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_label("Top p").fill("1")
    save.click()
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_the_server_keeps_to_the_schema(visit: Callable[..., Page]):
    page = visit()
    page.get_by_role("button", name="Options of this chat").click()
    page.get_by_label("JSON schema of the answers").fill(json.dumps(SCHEMA))
    page.get_by_role("button", name="Save", exact=True).click()
    ask(page, "What does it say?", SIGN)
    assert isinstance(json.loads(prose(page))["word"], str)
    page.get_by_role("button", name="Options of this chat").click()
    expect(page.locator("#context")).to_contain_text("tokens at a time; this chat fills")
