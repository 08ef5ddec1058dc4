"""What a person who calls `Model.chat` sees: names of files in place of files, and help."""

from __future__ import annotations

import pydoc
import re
import shutil
from pathlib import Path
from typing import get_type_hints

import pytest

from edge_runtime import MessageError, Model
from edge_runtime.inputs.mistaken_paths import refuse_mistaken_paths
from edge_runtime.options import GenerationKeywords

SIGN = Path(__file__).parents[2] / "examples" / "sign.png"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SIGN, tmp_path / "my sign.png")
    shutil.copy(SIGN, tmp_path / "sign.png")


@pytest.mark.parametrize("name", ["sign.png", "my sign.png", "none.JPG", "/no/such/scan.pdf", "clip.mp4", "~/a.webp"])
def test_a_file_name_as_a_string_is_refused(name):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": [name, "What is it?"]}]
    with pytest.raises(MessageError, match=r"Message 1 has the string .*no file is opened: write Path\('"):
        refuse_mistaken_paths(messages)


@pytest.mark.parametrize(
    "content",
    [
        ["What is in sign.png?", "Is it a .png"],
        [
            "none of my sign.png",
            "e.g.",
            "1/2",
            "v1.2",
            "",
            "a.py",
            "x.png\ny.png",
            "\0.png",
            "." + "x" * 5000 + ".png",
        ],
        [{"type": "text", "text": "sign.png"}],
        [Path("sign.png"), "What is it?"],
        "sign.png",
    ],
)
def test_texts_are_texts(content):
    refuse_mistaken_paths([{"role": "user", "content": content}])
    refuse_mistaken_paths("sign.png")


def test_every_call_refuses_them(demo: Model):
    question = [{"role": "user", "content": ["sign.png", "What does it say?"]}]
    for ask in (demo.chat, lambda messages: demo.chat_n(messages, 2)):
        with pytest.raises(MessageError, match="which names a file"):
            ask(question)
    answer = demo.chat([{"role": "user", "content": [Path("sign.png"), "What does it say?"]}], greedy=True)
    assert answer.text == answer.answer == str(answer) == "CAFE"


def test_help_names_the_options_that_there_are():
    text = pydoc.plain(pydoc.render_doc(Model.chat))
    assert "Unpack[GenerationKeywords]" in text
    common = text[text.index("The common ones:") : text.index("Raises")]
    listed = [line.rpartition(" : ")[0] for line in common.splitlines() if " : " in line]
    names = {re.sub(r"\(.*?\)", "", name).strip() for line in listed for name in line.split(", ")}
    assert {"max_tokens", "temperature", "schema", "tools"} <= names
    assert names <= get_type_hints(GenerationKeywords).keys()
