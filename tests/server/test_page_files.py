"""What the server sends of the page, without a browser: types, policies, names, colours."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from edge_runtime.server.web_page import FOLDER, static_files

ROOT = Path(__file__).parents[2]


def test_browsers_get_the_page_and_others_what_ollama_says(client: httpx.Client):
    assert client.get("/").text == "Ollama is running"
    assert client.head("/").status_code == 200
    page = client.get("/", headers={"Accept": "text/html,application/xhtml+xml"})
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>edge-runtime</title>" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert "script-src" not in policy, "default-src says it"
    again = client.get("/", headers={"Accept": "text/html", "If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fpages.py", "%2e%2e%2fpages.py", "..%5cpages.py", "__init__.py", ""]
)
def test_no_name_leads_out_of_the_folder(client: httpx.Client, name: str):
    assert client.get(f"/static/{name}").status_code == 404


def test_the_service_worker_knows_every_file(client: httpx.Client):
    listed = set(re.findall(r'"static/([^"]+)"', client.get("/sw.js").text))
    assert listed == {*static_files()} - {"index.html", "sw.js"}
    for name in listed:
        assert client.get(f"/static/{name}").status_code == 200
    assert "VERSION" not in client.get("/sw.js").text


def test_no_file_parses_html_or_names_another_server():
    for name, file in static_files().items():
        if file.media_type in ("image/png", "font/woff2"):
            continue
        text = file.body.decode()
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        addresses = set(re.findall(r"https?://[\w.-]+", text))
        assert addresses <= {"http://www.w3.org"}, f"{name} names {addresses}"  # namespaces of SVG and MathML


LATER = ("highlight.js", "math.js", "texts.js", "vendor/")
"""Loaded only when there is a use for them."""


def test_the_page_stays_small():
    sizes = {name: len(file.body) for name, file in static_files().items() if not name.startswith("icon-")}
    at_once = sum(size for name, size in sizes.items() if not name.startswith(LATER))
    assert at_once <= 200_000
    assert sum(sizes.values()) <= 400_000


def test_what_comes_from_elsewhere_has_its_licence():
    names = {name.split("/")[1] for name in static_files() if name.startswith("vendor/")}
    assert names == {"temml"}
    table = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    for name in names:
        assert "Permission is hereby granted" in (FOLDER / "vendor" / name / "LICENSE").read_text("utf-8")
        assert f"{name.capitalize()} 0.13.5, MIT" in table


def test_colours_can_be_told_apart():
    """Contrast of text to each ground it stands on is 4.5 or more (WCAG AA), in light and in dark."""
    light, dark = re.findall(r":root[^{]*\{(.*?)\}", static_files()["style.css"].body.decode(), re.DOTALL)[:2]

    def colours(block: str) -> dict[str, str]:
        return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for theme in (colours(light), colours(light) | colours(dark)):
        grounds = ("ground", "side", "raised", "hover")
        pairs = [(text, ground) for text in ("ink", "soft") for ground in grounds]
        pairs += [("accent", "ground"), ("accent", "raised"), ("accent", "tint"), ("ink", "tint")]
        pairs += [(f"code-{kind}", "raised") for kind in ("keyword", "string", "number", "name")]
        pairs += [("on-accent", "accent"), ("danger", "danger-tint"), ("on-accent", "accent-strong")]
        for text, ground in pairs:
            assert contrast(theme[text], theme[ground]) >= 4.5, f"{text} on {ground}"
        for number in range(6):
            assert contrast("#ffffff", theme[f"place-{number}"]) >= 4.5
