"""The page's words in other languages: one table, complete, with the same values in every text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

from edge_runtime.server.web_page import static_files

NAMED = {"aria-label", "title", "placeholder", "alt", "data-question"}
SAME = {"edge-runtime", "JSON", "minicpm-v-4.5, hf:ORG/REPO or ms:ORG/REPO"}
"""Names, which are the same in every language."""


class Words(HTMLParser):
    """Texts of the HTML that a person sees or hears."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._in_head = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Attributes with words in them."""
        self._in_head = self._in_head and tag != "body"
        if not self._in_head:
            self.found |= {value.strip() for name, value in attrs if name in NAMED and value}

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        if not self._in_head and data.strip():
            self.found.add(data.strip())


def texts() -> dict[str, list[str]]:
    """The table: English → German, Chinese."""
    source = static_files()["texts.js"].body.decode()
    return json.loads(source[source.index("TEXTS =") + 7 :].strip().rstrip(";"))


def english() -> set[str]:
    """Every text of the page, as it stands in the HTML and in calls of `t`."""
    words = Words()
    words.feed(static_files()["index.html"].body.decode())
    found = set(words.found)
    for name, file in static_files().items():
        if name.endswith(".js") and not name.startswith("vendor/"):
            calls = re.findall(r'\bt\(\s*("(?:[^"\\\n]|\\.)*")', file.body.decode())
            found |= {json.loads(call) for call in calls}
    groups = re.search(r"function groupOf.*?^}", static_files()["chats.js"].body.decode(), re.DOTALL | re.MULTILINE)
    found |= set(re.findall(r'"([A-Z][\w ]+)"', groups[0]))
    return found - SAME


def test_every_text_is_in_the_table_and_the_table_has_no_other():
    assert english() == texts().keys()


def test_translations_have_the_same_values():
    for text, row in texts().items():
        assert len(row) == 2, text
        for translated in row:
            assert translated.strip()
            assert sorted(re.findall(r"\{\d\}", translated)) == sorted(re.findall(r"\{\d\}", text)), text
