"""The page for everybody: what axe finds, the keyboard, contrast, motion, languages, writing from right to left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from server.conftest import SIGN
from server.test_page import CHAT, answer_of, ask, browser, say, visit
from server.test_page_looks import PHONE

__all__ = ["browser", "visit"]

pytestmark = pytest.mark.slow

AXE = Path(__file__).with_name("axe") / "node_modules"
needs_axe = pytest.mark.skipif(not (AXE / "ready").exists(), reason="needs `make clients`")
EVERYTHING = (
    "# Title\n\nSome **bold** and `code`, [a link](https://example.org), $E = mc^2$:\n\n$$\\frac{a}{b}$$\n\n"
    "> quoted\n\n"
    "1. one\n2. two\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\n```python\n# note\nprint('x', 1)\n```\n\n"
    "A <ref>word</ref><box>230 340 780 680</box>"
)


def violations(page: Page) -> list[str]:
    """What axe finds, one line each."""
    page.evaluate((AXE / "axe-core" / "axe.min.js").read_text("utf-8"))
    found = page.evaluate("axe.run(document)")
    assert len(found["passes"]) > 10
    return [
        f"{item['id']}: {node['html'][:120]} {node['any'][:1] or node['failureSummary']}"
        for item in found["violations"]
        for node in item["nodes"]
    ]


def views(page: Page) -> Iterator[str]:
    """Lead a page through all that it can show; yields the name of each view while it is shown."""
    yield "empty"
    say(page, EVERYTHING, thinking="Hm, **so**.")
    ask(page, "What is *this*?", SIGN)
    answer = answer_of(page)
    expect(answer.locator("math").first).to_be_attached()
    yield "an answer"
    answer.locator("summary").click()
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".versions")).to_be_visible()
    page.set_input_files("#files", [SIGN])
    page.locator(".question").hover()
    page.get_by_role("button", name="Edit").click()
    yield "editing"
    page.keyboard.press("Escape")
    error = {"message": "The prompt has 9120 tokens, but the context holds 8192; ask for less."}
    page.route(
        CHAT,
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps({'error': error})}\n\n"
        ),
    )
    ask(page, "Too long")
    expect(page.locator(".trouble:visible")).to_be_visible()
    yield "an error"
    page.get_by_role("button", name="Enlarge sign.png").first.click()
    yield "a picture"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Options of this chat").click()
    page.get_by_label("JSON schema of the answers").fill("{")
    yield "options"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Models", exact=True).click()
    expect(page.locator("#model-list li")).not_to_have_count(0)
    yield "models"
    page.keyboard.press("Escape")
    menu = page.get_by_role("button", name="Chats and settings")
    if menu.is_visible():
        menu.click()
        page.wait_for_timeout(400)  # it slides in
        yield "the side"
    page.locator(".chat").first.hover()
    page.get_by_role("button", name="Rename or export").click()
    yield "a chat"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Settings", exact=True).click()
    yield "settings"
    page.get_by_role("button", name="Delete all chats").click()
    yield "a question"
    page.get_by_role("button", name="Keep").click()
    if menu.is_visible():
        page.keyboard.press("Escape")
        page.wait_for_timeout(400)
    page.context.set_offline(True)
    expect(page.locator("#away")).to_be_visible()
    yield "no server"


@needs_axe
def test_axe_would_find_something(visit: Callable[..., Page]):
    page = visit()
    page.evaluate("document.getElementById('main').append(document.createElement('img'))")
    page.evaluate("document.getElementById('note').style.color = '#bbbbbb'")
    assert {line.split(":")[0] for line in violations(page)} == {"image-alt", "color-contrast"}


@needs_axe
@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit: Callable[..., Page], scheme: str, phone: bool):
    options: dict[str, Any] = {"viewport": PHONE, "is_mobile": True, "has_touch": True} if phone else {}
    page = visit(color_scheme=scheme, reduced_motion="reduce", tolerate=("ERR_INTERNET_DISCONNECTED",), **options)
    found = {view: violations(page) for view in views(page)}
    assert len(found) == 11 + phone
    assert {view: some for view, some in found.items() if some} == {}


def test_tab_reaches_every_control(visit: Callable[..., Page]):
    page = visit()
    say(page, EVERYTHING, thinking="Hm")
    ask(page, "What is this?", SIGN)
    answer_of(page)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".versions")).to_be_visible()
    page.set_input_files("#files", [SIGN])
    controls = """() => [...document.querySelectorAll("a, button, input, select, textarea, summary")].filter((node) =>
        node.checkVisibility({ visibilityProperty: true }) && !node.disabled && node.type !== "radio")"""
    wanted = page.evaluate(f"({controls})().length")
    page.evaluate(f"({controls})().forEach((node, number) => (node.dataset.met = number))")
    page.locator(".skip").focus()
    met = {"0"}
    for _ in range(wanted + 30):
        page.keyboard.press("Tab")
        met.add(page.evaluate("document.activeElement.dataset.met ?? ''"))
    left = page.evaluate(
        f"""({controls})().filter((node) => !{json.dumps(sorted(met))}.includes(node.dataset.met))
            .map((node) => node.outerHTML.slice(0, 120))"""
    )
    assert left == []


def test_the_keyboard_alone_asks_edits_and_deletes(visit: Callable[..., Page]):
    page = visit()
    say(page, "An answer")
    page.keyboard.type("A question")
    page.keyboard.press("Enter")
    answer_of(page)

    def press(name: str, key: str = "Enter") -> None:
        """Go to a button by Tab, as somebody without a mouse does, and press it."""
        met = []
        for _ in range(60):
            label = page.evaluate(
                "document.activeElement.getAttribute('aria-label') ?? document.activeElement.innerText"
            )
            if label and label.strip().startswith(name):
                return page.keyboard.press(key)
            met.append(label)
            page.keyboard.press("Tab")
        raise AssertionError(f"no Tab leads to {name}, only to {met}")

    press("Edit")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    page.keyboard.type(", better")
    page.keyboard.press("Enter")
    expect(page.locator(".question .versions")).to_contain_text("2 of 2")
    press("Earlier version", "Space")
    expect(page.locator(".question .bubble")).to_have_text("A question")
    press("Options of this chat")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    press("Rename or export")
    page.keyboard.press("Control+a")
    page.keyboard.type("My name")
    page.keyboard.press("Enter")
    expect(page.locator(".chat .open")).to_have_text(["My name"])
    press("Delete the chat")
    press("Delete")
    expect(page.locator(".chat .open")).to_have_count(0)


def test_no_motion_where_none_is_wanted(visit: Callable[..., Page]):
    page = visit(reduced_motion="reduce")
    moving = """() => [...document.querySelectorAll("*")].filter((node) => {
        const { animationName, transitionDuration } = getComputedStyle(node);
        return animationName !== "none" || parseFloat(transitionDuration) > 0;
    }).length"""
    assert page.evaluate(moving) == 0


def test_more_contrast_where_it_is_wanted(visit: Callable[..., Page]):
    colour = "getComputedStyle(document.documentElement).getPropertyValue('--soft')"
    assert visit().evaluate(colour) != visit(contrast="more").evaluate(colour)
    page = visit(forced_colors="active")
    say(page, EVERYTHING)
    ask(page, "What is this?", SIGN)
    answer_of(page)
    assert page.locator(".bubble").evaluate("(node) => getComputedStyle(node).borderTopStyle") == "solid"
    assert page.locator("#send").evaluate("(node) => getComputedStyle(node).borderTopStyle") == "solid"


@pytest.mark.parametrize(
    ("locale", "new", "placeholder"),
    [("de-AT", "Neuer Chat", "Fragen Sie zu einem Bild"), ("zh-TW", "新对话", "就图片提问")],
)
def test_the_browsers_language(visit: Callable[..., Page], locale: str, new: str, placeholder: str):
    page = visit(locale=locale)
    expect(page.locator("#new")).to_have_text(new)
    expect(page.locator("#question")).to_have_attribute("placeholder", placeholder)
    assert page.evaluate("document.documentElement.lang") == locale[:2]
    say(page, "Eine Antwort")
    page.locator("#question").fill("?")
    page.keyboard.press("Enter")
    answer_of(page)
    visible = page.locator("body").inner_text()
    assert not {"New chat", "Today", "First word", "Ask again", "Copy as"} & {
        line.strip() for line in visible.splitlines()
    }


def test_other_languages_are_english(visit: Callable[..., Page]):
    page = visit(locale="fr-FR")
    expect(page.locator("#new")).to_have_text("New chat")
    names = page.evaluate("performance.getEntriesByType('resource').map((each) => each.name)")
    assert not [name for name in names if "texts.js" in name or "math.js" in name or "highlight.js" in name]


def test_text_from_right_to_left(visit: Callable[..., Page]):
    page = visit()
    say(page, "مرحبا بالعالم\n\n- عنصر\n\nLeft to right\n\n```\nx = 1\n```\n\n| عمود |\n|---|\n| قيمة |")
    ask(page, "ما هذا؟")
    answer = answer_of(page)
    direction = "(node) => getComputedStyle(node).direction"
    assert page.locator(".bubble").evaluate(direction) == "rtl"
    assert [node.evaluate(direction) for node in answer.locator("> .prose > p").all()] == ["rtl", "ltr"]
    assert [answer.locator(name).first.evaluate(direction) for name in ("li", "td", "pre")] == ["rtl", "rtl", "ltr"]
    page.locator("#question").fill("مرحبا")
    assert page.locator("#question").evaluate(direction) == "rtl"
