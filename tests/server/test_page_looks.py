"""The page in a browser: what it shows, and that everybody can use it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Page, expect

from edge_runtime.answers import TOY_NOTICE
from edge_runtime.generation.grounding import find_regions
from server.conftest import SIGN, Served
from server.test_page import answer_of, ask, browser, say, size_of_sign, visit

__all__ = ["browser", "visit"]

HOSTILE = """<img src=x onerror="window.hacked=1"> <script>window.hacked=1</script> <svg onload="window.hacked=1">

[one](javascript:window.hacked=1) [two](  JaVaScRiPt:window.hacked=1) [three](data:text/html,<script>1</script>)
![a picture](https://tracker.example/pixel.png) <a href="javascript:window.hacked=1">four</a>
<javascript:window.hacked=1> [five](&#106;avascript:window.hacked=1) [six](//tracker.example)
[fine](https://example.org/page "title")

| <b>x</b> | <iframe src="https://tracker.example"></iframe> |
|---|---|
| `<img src=x onerror=window.hacked=1>` | <style>body{display:none}</style> |

```html
<img src=x onerror="window.hacked=1">
```
"""

PHONE = {"width": 390, "height": 844}

pytestmark = pytest.mark.slow


# --- What comes out ---


def test_hostile_text_stays_text(visit: Callable[..., Page]):
    page = visit()
    say(page, HOSTILE, thinking=HOSTILE)
    ask(page, "Be hostile")
    answer = answer_of(page)
    assert page.evaluate("window.hacked") is None
    found = answer.locator(".prose").evaluate_all(
        "(nodes) => nodes.flatMap((node) => [...node.querySelectorAll('*')].map((x) => x.tagName))"
    )
    assert not {name.lower() for name in found} & {"img", "script", "iframe", "style", "object", "embed", "b"}
    addresses = answer.locator(".prose a").evaluate_all("(links) => links.map((link) => link.href)")
    # Addresses in plain sight may be followed by whoever reads them, but nothing follows them by itself.
    tracker = "https://tracker.example/"
    assert set(addresses) == {tracker, f"{tracker}pixel.png", "https://example.org/page"}
    assert answer.locator(".prose a").first.get_attribute("rel") == "noopener noreferrer nofollow"
    assert "<script>window.hacked=1</script>" in answer.locator("> .prose").inner_text()


def test_markup_would_not_run_even_if_it_got_in(visit: Callable[..., Page]):
    """The second lock: under the page's policy a script's mistake cannot become markup, nor markup a script."""
    page = visit(tolerate=("Trusted", "Content Security Policy"))
    sinks = {
        "innerHTML": "document.body.innerHTML = '<b>x</b>'",
        "a handler": "document.body.setAttribute('onclick', 'window.hacked = 1')",
        "a script": "document.createElement('script').src = '/static/app.js'",
        "a timer": "setTimeout('window.hacked = 1')",
    }
    for name, code in sinks.items():
        error = page.evaluate(f"() => {{ try {{ {code}; return null; }} catch (error) {{ return error.name; }} }}")
        assert error == "TypeError", f"{name} was not refused"
    assert page.evaluate("window.hacked") is None


def test_markdown_is_shown(visit: Callable[..., Page]):
    page = visit()
    text = (
        "# Title\n\nSome **bold**, *slanted*, `code` and ~~gone~~; snake_case_stays, 2 * 3 * 4 too.\nA new line.\n\n"
        "1. one\n2. two\n   - deeper\n\n   still two\n3. three\n\n> quoted\n\n"
        "| a | b |\n|---|--:|\n| 1 | 2 \\| 3 |\n\n```python\nprint('<x>')\n```\n\n---\n\n"
        "https://example.org/a_b_c. &lt;done&gt;\n\n" + ">" * 50 + " deep"
    )
    say(page, text)
    ask(page, "Show it")
    body = answer_of(page).locator("> .prose")
    assert body.locator("h3").inner_text() == "Title"
    assert [body.locator(name).first.inner_text() for name in ("strong", "em", "del")] == ["bold", "slanted", "gone"]
    assert "snake_case_stays, 2 * 3 * 4 too.\nA new line." in body.inner_text()
    assert body.locator("> ol > li").count() == 3
    assert body.locator("> ol > li:nth-child(2) li").inner_text() == "deeper"
    assert body.locator("td").all_inner_texts() == ["1", "2 | 3"]
    assert body.locator("pre").inner_text() == "print('<x>')"
    assert body.locator("a").get_attribute("href") == "https://example.org/a_b_c"
    assert "<done>" in body.inner_text()
    body.get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "print('<x>')"
    page.locator(".actions").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()").replace("\r", "") == text


def test_thinking_is_folded(visit: Callable[..., Page]):
    page = visit()
    say(page, "42", thinking="Six times seven is\n\n**forty-two**.")
    ask(page, "What is six times seven?")
    answer = answer_of(page)
    thought = answer.get_by_text("forty-two")
    expect(thought).to_be_hidden()
    answer.get_by_text(re.compile("^Thought")).click()
    expect(thought).to_be_visible()
    assert answer.locator("> .prose").inner_text() == "42"


def test_places_are_drawn_where_the_model_says(visit: Callable[..., Page]):
    page = visit()
    text = (
        "A <ref>word</ref><box>230 340 780 680</box>, its <ref>middle</ref><point>500 500</point> "
        "and <quad>0 0 999 0 999 999 0 2000</quad>."
    )
    say(page, text)
    ask(page, "Where is the <ref>word</ref>?", SIGN)
    answer = answer_of(page)
    assert answer.locator("> .prose").inner_text() == "A word1, its middle2 and 3."
    width, height = size_of_sign()
    box, point, quad = find_regions(text, (width, height))

    def pixels(attribute: str) -> list[tuple[float, float]]:
        numbers = [float(number) for number in re.findall(r"[\d.]+", attribute)]
        return [(x * width / 1000, y * height / 1000) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]

    polygons = [pixels(node.get_attribute("points")) for node in answer.locator("polygon.line").all()]
    assert polygons[0][0] == pytest.approx(box.points[0])
    assert polygons[0][2] == pytest.approx(box.points[1])
    assert [number for xy in polygons[1] for number in xy] == pytest.approx(
        [number for xy in quad.points for number in xy]
    )
    start = re.match(r"M([\d.]+),([\d.]+)h", answer.locator("path.line").get_attribute("d"))
    assert (float(start[1]) * width / 1000, float(start[2]) * height / 1000) == pytest.approx(point.points[0])
    # On the screen, too: the outline lies on the picture where the numbers say.
    picture = answer.locator(".canvas img").bounding_box()
    drawn = answer.locator("polygon.line").first.bounding_box()
    assert drawn["x"] - picture["x"] == pytest.approx(0.23 * picture["width"], abs=3)
    assert drawn["height"] == pytest.approx(0.34 * picture["height"], abs=6)
    answer.get_by_role("button", name="Place 1 in the picture").hover()
    expect(answer.locator("g.place").first).to_have_class("place pointed")


# --- For everybody ---


def unnamed(page: Page) -> list[str]:
    """Controls that a screen reader could only call "button"."""
    session = page.context.new_cdp_session(page)
    roles = {"button", "textbox", "combobox", "checkbox", "radio", "link", "switch", "dialog", "DisclosureTriangle"}
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    return [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles and not node["name"]["value"].strip()
    ]


def test_every_control_has_a_name(visit: Callable[..., Page]):
    page = visit()
    say(page, "A <ref>word</ref><box>230 340 780 680</box>\n\n```\ncode\n```", thinking="Hm")
    ask(page, "Where?", SIGN)
    answer_of(page)
    page.set_input_files("#files", SIGN)
    assert unnamed(page) == []
    page.get_by_role("button", name="Settings").click()
    assert unnamed(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("region", name="Conversation").get_by_role("button", name="Enlarge sign.png").click()
    assert unnamed(page) == []


def test_tab_leads_through_the_page(visit: Callable[..., Page]):
    page = visit()
    page.get_by_text("Skip to the question").focus()
    met = []
    for _ in range(30):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.dataset.question || document.activeElement.name"
            )
        )
        if met[-1] == "attach":
            break
    order = [name for name in met if name in ("new", "theme", "open-settings", "question", "attach")]
    assert order == ["new", "theme", "open-settings", "question", "attach"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit: Callable[..., Page], scheme: str):
    page = visit(color_scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    root = page.locator("html")
    expect(root).to_have_attribute("data-theme", scheme)
    page.get_by_label(f"{other.capitalize()} colours").check()
    expect(root).to_have_attribute("data-theme", other)
    page.reload()
    expect(root).to_have_attribute("data-theme", other)
    page.get_by_label("Colours as the system").check()
    expect(root).to_have_attribute("data-theme", scheme)


def test_a_phone(visit: Callable[..., Page]):
    page = visit(viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)

    def check() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate(
            "document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth"
        )
        small = page.locator("button:visible, select:visible").evaluate_all(
            """(nodes) => nodes.filter((node) => {
                const { width, height } = node.getBoundingClientRect();
                return Math.min(width, height) < 24 && !node.classList.contains("place-number");
            }).map((node) => node.outerHTML)"""
        )
        assert small == [], "too small for a finger"

    check()
    wide = (
        "| " + " | ".join(f"column {i}" for i in range(12)) + " |\n" + "|---" * 12 + "|\n" + "| value " * 12 + "|\n\n"
    )
    say(page, f"{wide}```\n{'x' * 300}\n```\n\n{'y' * 300}\n\n<box>1 1 900 900</box>", thinking="z" * 300)
    ask(page, "w" * 200, SIGN)
    answer_of(page)
    check()
    page.get_by_role("button", name="Chats and settings").tap()
    expect(page.get_by_role("button", name="New chat").first).to_be_focused()
    check()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Chats and settings")).to_be_focused()
    expect(page.locator("#side")).to_be_hidden()


def test_it_can_be_installed(visit: Callable[..., Page], server: Served):
    page = visit()
    session = page.context.new_cdp_session(page)
    manifest = session.send("Page.getAppManifest")
    assert manifest["errors"] == []
    page.evaluate("navigator.serviceWorker.ready")
    errors = session.send("Page.getInstallabilityErrors")["installabilityErrors"]
    assert [error["errorId"] for error in errors if error["errorId"] != "in-incognito"] == []
    data = json.loads(manifest["data"])
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        for icon in data["icons"]:
            assert client.get(f"/static/{icon['src']}").headers["content-type"] == icon["type"]


def test_a_toy_is_labelled(visit: Callable[..., Page]):
    """Whoever opens the page of the demo must not take its answers for those of the real model."""
    page = visit()
    expect(page.locator("#toy")).to_have_text("Toy model")
    expect(page.locator("#note")).to_have_text(TOY_NOTICE)
    expect(page.locator("#think")).to_be_hidden()
    models = page.evaluate("fetch('api/tags').then((reply) => reply.json())")
    del models["models"][0]["details"]["notice"]
    models["models"][0]["capabilities"].append("thinking")
    page.route("**/api/tags", lambda route: route.fulfill(json=models))
    page.reload()
    expect(page.locator("#think")).to_be_visible()
    expect(page.locator("#toy")).to_be_hidden()
    expect(page.locator("#note")).to_have_text("Answers can be wrong; look at the picture yourself.")
