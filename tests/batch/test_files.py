"""Names of files, folders and patterns → files; jobs → items."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edge_runtime import DecoderPool
from edge_runtime.batch.files import Files
from edge_runtime.batch.inputs import Inputs
from edge_runtime.batch.items import Asking, Item
from edge_runtime.batch.jobs import Jobs, has_openai_lines
from edge_runtime.errors import ImageError, MessageError
from support.document_maker import words_pdf

SUFFIXES = (".png", ".pdf", ".tif")
ASKING = Asking("What is it?", options={"max_tokens": 4})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of several kinds, below the current folder."""
    for name in ("a/2.png", "a/10.PNG", "a/deep/1.png", "a/notes.txt", "a/.hidden.png", "b.png", "odd"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "a/link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*words: str) -> list[str]:
    return [path.as_posix() for path in Files(words, SUFFIXES)]


def test_a_folder_stands_for_what_can_be_read_below_it(folder):
    assert names("a") == ["a/10.PNG", "a/2.png", "a/deep/1.png"]
    files = Files(["a"], SUFFIXES)
    assert len([*files]) == 3
    assert files.left_out == {".txt": 1, "hidden": 1, "links to folders": 1}


def test_patterns_are_sorted_and_nothing_comes_twice(folder):
    assert names("[ab]/**/*.png") == ["a/2.png", "a/deep/1.png"]
    assert names("b.png", "./b.png", "*", "a/../b.png") == ["b.png", "a/10.PNG", "a/2.png", "a/deep/1.png"]


def test_a_file_is_taken_whatever_it_is_called(folder):
    (folder / "[1].png").write_bytes(b"x")
    assert names("odd", "[1].png") == ["odd", "[1].png"]


@pytest.mark.parametrize("word", ["missing.png", "What is it?", "*.jpg", "a/notes*", "empty"])
def test_what_stands_for_nothing_is_refused(folder, word):
    (folder / "empty").mkdir()
    with pytest.raises(ImageError, match=r"expected one|does not exist"):
        names("b.png", word)


def test_a_pipe_is_refused(folder):
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(ImageError, match="pipe or a device"):
        names("pipe.png")


# --- documents ------------------------------------------------------------------------------------


def inputs(*words: str, **options: Any) -> list[Item]:
    pool = DecoderPool()
    try:
        asking = Asking("What is it?", options={"max_tokens": 4, **options})
        source = Inputs(Files(words, SUFFIXES), asking, lambda path: path, pool)
        found = [*source]
        assert source.total == len(found)
        assert source.is_final
        return found
    finally:
        pool.close()


def test_documents_are_items_page_by_page(folder):
    (folder / "three.pdf").write_bytes(words_pdf(["one", "two", "three"]))
    ids = [item.id for item in inputs("three.pdf", "b.png")]
    assert ids == ["three.pdf#page=1", "three.pdf#page=2", "three.pdf#page=3", "b.png"]
    (item,) = inputs("three.pdf", pages="2")
    assert item.about == {"input": "three.pdf", "page": 2}
    assert "pages" not in item.options


def test_a_document_that_cannot_be_opened_is_one_item_with_the_reason(folder):
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 nonsense")
    bad, good = inputs("bad.pdf", "b.png")
    assert bad.id == "bad.pdf"
    assert bad.failure is not None
    assert "bad.pdf" in bad.failure.reason
    assert good.failure is None


def test_the_fingerprint_is_that_of_the_question(folder):
    (first,), (same,) = inputs("b.png"), inputs("odd")
    (other,) = inputs("b.png", max_tokens=5)
    (secret,) = inputs("b.png", password="x")
    assert first.asked == same.asked == secret.asked
    assert first.asked != other.asked


# --- jobs -----------------------------------------------------------------------------------------


def jobs(tmp_path: Path, *lines: Any, asking: Asking = ASKING) -> list[Item]:
    path = tmp_path / "jobs.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\ufeff" + "\n".join(texts) + "\n", "utf-8")
    return [*Jobs(path, asking, lambda path: path)]


def test_jobs_have_the_commands_question_or_their_own(tmp_path):
    messages = [{"role": "user", "content": "Who are you?"}]
    first, second, third = jobs(
        tmp_path,
        {"id": "a", "input": "a.png"},
        "",
        {"input": ["a.png", "b.png"], "prompt": "Which?", "system": "Be brief.", "options": {"max_tokens": 9}},
        {"id": "c", "messages": messages},
    )
    assert first.messages == [{"role": "user", "content": [Path("a.png"), "What is it?"]}]
    assert first.about == {"input": "a.png"}
    assert second.id == "line 3"
    assert second.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [Path("a.png"), Path("b.png"), "Which?"]},
    ]
    assert second.options == {"max_tokens": 9}
    assert third.messages == messages
    assert len({first.asked, second.asked, third.asked}) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 2 .*not valid JSON"),
        ("[1]", "Line 2 .*is a list; expected a JSON object"),
        ({"id": "x"}, "Line 2 .*has the id 'x', as line 1"),
        ({"id": 7}, "id is 7; expected a text"),
        ({"max_tokens": 7}, "'max_tokens' is no field of a job; it belongs into options"),
        ({"question": "?"}, "'question' is no field"),
        ({"options": {"max_token": 7}}, "'max_token' is no option"),
        ({"options": 7}, "options is 7"),
        ({"input": 7}, "input is 7"),
        ({"input": [""]}, "input is a list"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": "?"}], "prompt": "?"}, "messages stand beside"),
        ({"prompt": " "}, "prompt is"),
    ],
)
def test_wrong_jobs_are_refused_by_their_line(tmp_path, line, message):
    with pytest.raises(MessageError, match=message):
        jobs(tmp_path, {"id": "x"}, line)


def test_a_job_without_a_question_is_refused(tmp_path):
    with pytest.raises(MessageError, match=r"Line 1 .*there is no question"):
        jobs(tmp_path, {"input": "a.png"}, asking=Asking())


def test_files_of_jobs_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(MessageError, match="no lines"):
        jobs(tmp_path, "")
    with pytest.raises(MessageError, match="cannot be read"):
        has_openai_lines(tmp_path / "missing.jsonl")
    with pytest.raises(MessageError, match="is no file"):
        has_openai_lines(tmp_path)
    path = tmp_path / "utf16.jsonl"
    path.write_text('{"id": "a"}\n', "utf-16")
    with pytest.raises(MessageError, match="not valid JSON"):
        has_openai_lines(path)
