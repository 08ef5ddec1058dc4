"""`edge-runtime batch` as people run it: killed, interrupted, twice at once, on a full disk, with OpenAI's lines."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw, ImageFont

from edge_runtime import Model
from edge_runtime.cli.program import main
from support.document_maker import words_pdf

N = 40
QUESTION = "What does it say?"
ASKED = ["--prompt", QUESTION, "--greedy", "--max-tokens", "6"]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Answers about pictures of words, one by one, of which the demo is sure whatever else is computed with them."""
    folder = tmp_path_factory.mktemp("batch")
    with contextlib.chdir(folder):
        yield answers_about_words(folder)


def answers_about_words(folder: Path) -> dict[str, str]:
    (folder / "pics").mkdir()
    found: dict[str, str] = {}
    with Model.load("demo") as model:
        for i in range(4 * N):
            picture = Image.new("RGB", (112, 112), (250, 250, 250))
            word = "".join("ABCDEFGH"[i // 8**place % 8] for place in range(3))
            ImageDraw.Draw(picture).text((6 + i % 17, 20 + i % 13), word, (20, 20, 20), ImageFont.load_default(40))
            name = f"pics/{i:03}.png"
            picture.save(name)
            content = [Path(name), QUESTION]
            answer = model.chat([{"role": "user", "content": content}], greedy=True, max_tokens=6, logprobs=True)
            if min(token.logprob for token in answer.logprobs or ()) > -0.2 and len(found) < N:
                found[name] = answer.answer
            else:
                Path(name).unlink()
    assert len(found) == N
    return found


@pytest.fixture
def here(right: dict[str, str], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the pictures as the current one."""
    folder = next(path for path in tmp_path_factory.getbasetemp().glob("batch*") if (path / "pics").is_dir())
    monkeypatch.chdir(folder)
    return folder


def started(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "edge_runtime", "batch", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def await_lines(process: subprocess.Popen[str], path: str, n: int) -> None:
    ends = time.monotonic() + PATIENCE_S
    while process.poll() is None and time.monotonic() < ends:
        if Path(path).exists() and Path(path).read_bytes().count(b"\n") >= n:
            return
        time.sleep(0.002)


def check_right(path: str, right: dict[str, str]) -> None:
    """Every picture has exactly one line, and it is right."""
    found = lines_of(path)
    assert len(found) == N
    assert {line["id"]: line["answer"] for line in found} == right
    assert all(line["error"] is None and line["timings_s"]["total"] > 0 for line in found)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["batch", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_killed_anywhere_no_line_is_lost_or_doubled(here, right):
    chance = random.Random(21)
    for n in sorted(chance.sample(range(N - 8), 3)):
        process = started("pics", *ASKED, "-o", "killed.jsonl")
        await_lines(process, "killed.jsonl", n + 1)
        time.sleep(chance.random() / 20)
        process.kill()
        process.communicate()
    with Path("killed.jsonl").open("ab") as file:
        file.write(b'{"id": "pics/0')  # what a kill in the middle of a write leaves
    process = started("pics", *ASKED, "-o", "killed.jsonl")
    _, notes = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, notes
    check_right("killed.jsonl", right)
    code, notes = invoke("pics", *ASKED, "-o", "killed.jsonl")
    assert code == 0
    assert f"0 answered, {N} done before" in notes


def test_of_two_processes_one_is_refused(here, right):
    both = [started("pics", *ASKED, "-o", "two.jsonl") for _ in range(2)]
    notes = [process.communicate(timeout=PATIENCE_S)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert sum("Another process is writing" in text for text in notes) == 1
    check_right("two.jsonl", right)


LIMIT_BYTES = 8 << 20
"""Far above all that the command writes besides: pixels, in memory that counts as files."""


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_in_mid_run_stops_it_and_it_goes_on_later(here, right):
    other = {"id": "other", "asked": "", "error": None, "answer": "x" * (LIMIT_BYTES - 10_000)}
    Path("full.jsonl").write_text(json.dumps(other) + "\n", "utf-8")
    process = started("pics", *ASKED, "-o", "full.jsonl", preexec_fn=limit_files)
    _, notes = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "cannot be written: the file system or a limit" in notes.splitlines()[-1]
    assert 1 < len(lines_of("full.jsonl")) < 1 + N
    assert invoke("pics", *ASKED, "-o", "full.jsonl", "--ordered")[0] == 0
    first, _, rest = Path("full.jsonl").read_text("utf-8").partition("\n")
    assert json.loads(first) == other
    Path("full.jsonl").write_text(rest, "utf-8")
    check_right("full.jsonl", right)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_items_at_work(here, right, number, interruptible):
    path = f"signal{int(number)}.jsonl"
    process = started("pics", *ASKED, "-o", path, "--parallel", "1")
    await_lines(process, path, 2)
    process.send_signal(number)
    _, notes = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number
    assert "Ending after the items at work" in notes
    n = len(lines_of(path))
    assert 2 <= n < N
    code, notes = invoke("pics", *ASKED, "-o", path)
    assert code == 0
    assert f"{N - n} answered, {n} done before" in notes
    check_right(path, right)


def test_failures_are_lines_and_tried_again_only_if_asked(here, right):
    pictures = [*right][:3]
    Path("late.png").write_bytes(b"nonsense")
    words: Sequence[str] = [pictures[0], "late.png", *pictures[1:]]
    code, notes = invoke(*words, *ASKED, "-o", "failed.jsonl", "--ordered")
    assert code == 1
    assert "3 answered, 1 failed" in notes
    found = lines_of("failed.jsonl")
    assert [line["id"] for line in found] == [*words]
    assert found[1]["answer"] is None
    assert found[1]["error"]["type"] == "ImageError"
    assert "late.png" in found[1]["error"]["message"]
    Path("late.png").write_bytes(Path(pictures[0]).read_bytes())
    assert invoke(*words, *ASKED, "-o", "failed.jsonl")[0] == 1
    assert invoke(*words, *ASKED, "-o", "failed.jsonl", "--retry-failed")[0] == 0
    answers = {line["id"]: line["answer"] for line in lines_of("failed.jsonl")}
    assert answers == {name: right[name] for name in pictures} | {"late.png": right[pictures[0]]}


def test_another_question_is_refused_before_a_model_is_loaded(here, right):
    assert invoke(next(iter(right)), *ASKED, "-o", "asked.jsonl")[0] == 0
    before = Path("asked.jsonl").read_bytes()
    code, notes = invoke(next(iter(right)), "--prompt", "Why?", "-o", "asked.jsonl", "-m", "no-such-model")
    assert code == 1
    assert "to another question" in notes
    assert Path("asked.jsonl").read_bytes() == before


def test_jobs_ask_what_they_say(here, right):
    name = next(iter(right))
    Path("pages.pdf").write_bytes(words_pdf(["ONE", "TWO"]))
    jobs = [
        {"id": "a", "input": name, "prompt": QUESTION},
        {"id": "b", "input": "pages.pdf", "options": {"pages": "2", "max_tokens": 2}},
        {"messages": [{"role": "user", "content": "Who are you?"}], "options": {"max_tokens": 1}},
    ]
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs), "utf-8")
    shared = ["--prompt", "Read it.", "--greedy", "--max-tokens", "6"]
    code, _ = invoke("--jobs", "jobs.jsonl", *shared, "-o", "jobs_out.jsonl", "--ordered")
    assert code == 0
    first, second, third = lines_of("jobs_out.jsonl")
    assert (first["id"], first["answer"]) == ("a", right[name])
    assert (second["id"], second["completion_tokens"], len(second["pictures"])) == ("b", 2, 1)
    assert (third["id"], third["completion_tokens"]) == ("line 3", 1)


def openai_line(custom_id: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def test_openais_lines_are_answered_in_their_form(here):
    pytest.importorskip("fastapi", reason="extra [serve]")
    messages = [{"role": "user", "content": "Who are you?"}]
    lines = [openai_line(str(i), messages=messages, max_tokens=2, temperature=0) for i in range(6)]
    lines.append(openai_line("odd", messages=[]))
    Path("openai.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    Path("openai_out.jsonl").write_text('{"id": "batch_req_1", "cus', "utf-8")
    code, _ = invoke("--jobs", "openai.jsonl", "-o", "openai_out.jsonl", "--ordered")
    assert code == 1
    found = lines_of("openai_out.jsonl")
    assert [line["custom_id"] for line in found] == [*"012345", "odd"]
    assert {*found[0]} == {"id", "custom_id", "response", "error"}
    assert found[0]["response"]["status_code"] == 200
    assert found[0]["response"]["body"]["usage"]["completion_tokens"] == 2
    assert found[-1]["response"]["status_code"] == 400
    before = Path("openai_out.jsonl").read_bytes()
    assert invoke("--jobs", "openai.jsonl", "-o", "openai_out.jsonl")[0] == 1
    assert Path("openai_out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "GET"}, "Line 2: method is"),
        ({"url": "/v1/embeddings"}, "Line 2: url is"),
        ({"custom_id": "a"}, "Line 2 .*custom_id 'a', as line 1"),
        ({"body": {"model": "gpt-4o", "messages": []}}, "Line 2: model 'gpt-4o' not found"),
    ],
)
def test_wrong_openai_lines_are_refused_before_any_is_answered(here, change, reason):
    pytest.importorskip("fastapi", reason="extra [serve]")
    lines = [openai_line("a", messages=[]), openai_line("b", messages=[]) | change]
    Path("wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    code, notes = invoke("--jobs", "wrong.jsonl", "-o", "wrong_out.jsonl")
    assert code == 1
    (line,) = notes.splitlines()
    assert line.startswith("edge-runtime: ")
    assert re.search(reason, line)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "Name files or folders, or --jobs"),
        (["pics", "--jobs", "x.jsonl"], "Name files or folders, or --jobs"),
        (["pics"], "There is no question"),
        (["pics", "--prompt", " "], "--prompt is empty"),
        (["pics", "--preset", "ocr", "--max-slices", "1,2"], "one number"),
        (["out.png", "--preset", "ocr"], "which is read"),
    ],
)
def test_combinations_that_mean_nothing_are_usage_errors(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    Path("out.png").write_bytes(b"x")
    code, notes = invoke(*arguments, "-o", "out.png")
    assert code == 2
    assert reason in notes
    assert Path("out.png").read_bytes() == b"x"


def test_a_schema_that_cannot_be_enforced_is_refused_once(here):
    schema = '{"type": "object", "properties": {"a": {"type": "nonsense"}}}'
    code, notes = invoke("pics", *ASKED, "--schema", schema, "-o", "schema_out.jsonl")
    assert code == 1
    assert "nonsense" in notes
    assert Path("schema_out.jsonl").read_bytes() == b""


def test_options_that_openais_lines_cannot_have_are_refused(here):
    pytest.importorskip("fastapi", reason="extra [serve]")
    Path("one.jsonl").write_text(json.dumps(openai_line("a", messages=[])) + "\n", "utf-8")
    for option, value in (("--mmproj", "x.gguf"), ("--lora", "x.gguf"), ("--prompt", "Why?"), ("--ray", "local")):
        code, notes = invoke("--jobs", "one.jsonl", "-o", "refused_out.jsonl", option, value)
        assert code == 2
        assert option in notes
    assert not Path("refused_out.jsonl").exists()
