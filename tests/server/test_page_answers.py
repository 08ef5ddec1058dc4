"""What the page makes of answers: formulas, colours of code, tables, percent and rates."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from edge_runtime.engine.events import Progress
from edge_runtime.server import sse
from server.test_page import answer_of, ask, browser, say, visit
from server.test_page_looks import PHONE

__all__ = ["browser", "visit"]

pytestmark = pytest.mark.slow

FORMULAS = r"""Einstein: $E = mc^2$, a half \(\frac{1}{2}\), **bold $x$**; it costs $5 and $6, $HOME/$USER.

$$\int_0^\infty e^{-x^2}\,dx
= \frac{\sqrt{\pi}}{2}$$

\[\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}\]

- in a list \(\alpha\)

Not understood: $\nosuchmacro{x}$, `$code$`, \$7 and \$8.
"""

HOSTILE = r"""$\href{javascript:window.hacked=1}{x}$ $\url{https://tracker.example}$ \(\class{skip}{y}\)
$\style{position:fixed;inset:0}{w}$ $\includegraphics{https://tracker.example/x.png}$ $\data{x=1}{v}$
\(\rule{9999em}{9999em}\) \(\htmlId{model}{z}\)
$\def\a{\a\a}\a$ $\text{<img src=x onerror=window.hacked=1>}$ $\color{red}{u}$ $\fbox{t}$ $\hspace{9999em}$
"""


def test_formulas_are_mathml(visit: Callable[..., Page]):
    page = visit()
    say(page, FORMULAS, thinking="Hm, $y^2$.")
    ask(page, "Show formulas")
    body = answer_of(page).locator("> .prose")
    expect(body.locator("math")).to_have_count(6)
    expect(body.locator(".formula.displayed math")).to_have_count(2)
    expect(body.locator("strong math")).to_have_count(1)
    expect(body.locator("li math")).to_have_text("α")
    assert body.locator("math mfrac").first.evaluate("(node) => node.children.length") == 2
    text = body.inner_text()
    assert "it costs $5 and $6, $HOME/$USER." in text
    assert r"Not understood: $\nosuchmacro{x}$, $code$, $7 and $8." in text
    page.get_by_role("button", name="Copy as Markdown").click()
    assert page.evaluate("navigator.clipboard.readText()").replace("\r", "") == FORMULAS


def test_no_formula_is_more_than_a_formula(visit: Callable[..., Page]):
    page = visit()
    say(page, HOSTILE)
    ask(page, "Be hostile")
    answer = answer_of(page)
    expect(answer.locator("math").first).to_be_attached()
    page.wait_for_timeout(300)
    found = answer.locator("> .prose").evaluate(
        """(node) => [...node.querySelectorAll("*")].map(
            (x) => [x.localName, [...x.attributes].map((a) => a.name)])"""
    )
    assert not {name for name, _ in found} & {"a", "img", "script", "iframe", "style", "svg", "annotation-xml"}
    attributes = {name for _, names in found for name in names}
    assert not {name for name in attributes if name.startswith("on")}
    assert not attributes & {"href", "src", "id", "xlink:href", "data-x"}
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('.prose .skip').length") == 0
    box = answer.bounding_box()
    for formula in answer.locator("math").all():
        assert formula.evaluate("(node) => getComputedStyle(node).position") == "static"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert box is not None


def test_code_is_coloured_and_stays_the_same(visit: Callable[..., Page]):
    page = visit()
    blocks = {
        "python": '# a note\ndef f(x=1.5):\n    return "a\\"b" + f\'{x}\'  # end',
        "js": "/* note */ const a = `b ${c}`; // d\nfoo(1, 'x')",
        "json": '{"key": [1, true, "text"]}',
        "html": '<!-- note --><p class="x">Don\'t</p>',
        "bash": "echo $HOME # note\nfor f in *; do cat 'x'; done",
        "sql": "SELECT name FROM t WHERE a = 'b' -- note",
        "diff": "@@ -1 +1 @@\n-old\n+new",
        "nosuch": "plain text 1 2 3",
        "constructor": "x",
    }
    say(page, "\n\n".join(f"```{name}\n{code}\n```" for name, code in blocks.items()))
    ask(page, "Show code")
    shown = answer_of(page).locator("pre code")
    expect(page.locator(".code-comment").first).to_be_attached()
    assert shown.all_inner_texts() == [*blocks.values()]
    page.wait_for_timeout(200)
    kinds = [
        set(node.evaluate("(n) => [...n.children].map((x) => x.className.replace('code-', ''))"))
        for node in shown.all()
    ]
    assert {"comment", "keyword", "string", "number", "name"} <= kinds[0]
    assert {"comment", "keyword", "string", "number", "name"} <= kinds[1]
    assert {"name", "number", "keyword", "string"} == kinds[2]
    assert {"comment", "keyword", "string"} == kinds[3]
    assert all("comment" in kind and "keyword" in kind for kind in kinds[4:6])
    assert {"comment", "deleted", "inserted"} == kinds[6]
    assert kinds[7:] == [set(), set()]


def test_hostile_code_takes_no_time(visit: Callable[..., Page]):
    """Colouring must not hang the page: a grammar that backtracks would take longer than any test may."""
    page = visit()
    attacks = {
        "html": "<a" + "  b" * 15_000,
        "python": '"""' * 10_000 + "\\" * 10_000,
        "js": " " * 40_000 + "/",
        "css": "a" * 50_000,
        "yaml": ("a" * 100 + " " * 100) * 250,
        "tex": "\\" * 50_000,
    }
    say(page, "\n\n".join(f"```{name}\n{code}\n```" for name, code in attacks.items()))
    ask(page, "Be slow")
    assert answer_of(page).locator("pre").count() == len(attacks)
    expect(page.locator(".code-keyword, .code-string").first).to_be_attached()


def test_a_wide_table_scrolls_on_a_phone(visit: Callable[..., Page]):
    page = visit(viewport=PHONE, is_mobile=True, has_touch=True)
    row = "| A large cup of filter coffee | with oat milk and sugar | 3.50 | 2 | 7.00 |\n"
    say(page, "| Item | Description | Price | Amount | Total |\n|---|---|--:|--:|--:|\n" + row * 3)
    ask(page, "Copy the table")
    table = answer_of(page).locator(".table")
    assert table.evaluate("(node) => node.scrollWidth > node.clientWidth")
    assert table.locator("td").first.bounding_box()["width"] > 150, "cells are squeezed instead"
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


# --- Waiting ---


def test_percent_is_shown_while_a_picture_is_read(visit: Callable[..., Page], tmp_path: Path):
    page, new = visit(), tmp_path / "new.png"  # visual tokens of one that was seen before are known
    Image.new("RGB", (448, 448), "orchid").save(new)
    page.evaluate(
        """() => {
            const told = (window.told = []);
            const look = () => told.push(document.querySelector(".waiting")?.textContent ?? "");
            const everything = { subtree: true, childList: true, characterData: true };
            new MutationObserver(look).observe(document.getElementById("turns"), everything);
        }"""
    )
    with page.expect_request("**/v1/chat/completions") as asked:
        ask(page, "What does it say?", new)
    answer_of(page)
    assert asked.value.post_data_json["return_progress"] is True
    told = page.evaluate("window.told")
    assert any(re.search(r"Looking at it … \d+ %", text) for text in told), told
    assert any(re.search(r"Reading … \d+ %", text) for text in told), told


def test_beats_tell_the_stage_to_whoever_asked():
    assert sse.beat() == sse.BEAT
    assert sse.beat(Progress("encode", 3, 10, 0.34)) == ": working encode 3 10 0.3400\n\n"


def asked_about(color: str) -> dict[str, Any]:
    """A question about a picture that no other test shows: it must be encoded, which has stages."""
    file = io.BytesIO()
    Image.new("RGB", (448, 448), color).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    return {"model": "demo", "messages": [{"role": "user", "content": content}], "max_tokens": 4}


def test_only_streams_that_report_progress_tell_stages(client: Any):
    told, plain = (
        client.post("/v1/chat/completions", json={**asked_about(color), "stream": True, **more}).text
        for color, more in (("teal", {"return_progress": True}), ("olive", {}))
    )
    assert set(re.findall(r"^:.*$", plain, re.MULTILINE)) <= {": working"}
    assert re.search(r"^: working (encode|prefill) \d+ \d+ [\d.]+$", told, re.MULTILINE)
