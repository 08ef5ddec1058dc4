"""A real llama-server with the demo model behind `Model.connect`.

Runs where EDGE_RUNTIME_LLAMA_SERVER names the program, which llama-cpp-python's source distribution builds (cmake,
target llama-server). The strict fakes of `test_dialects` run everywhere.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from PIL import Image, ImageDraw

import edge_runtime
from edge_runtime import Model, PromptTooLongError, RemoteModel

BINARY = os.environ.get("EDGE_RUNTIME_LLAMA_SERVER")
DEMO = Path(edge_runtime.__file__).parent / "demo"
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
STARTS_WITHIN_S = 60

pytestmark = pytest.mark.skipif(not BINARY, reason="EDGE_RUNTIME_LLAMA_SERVER names no llama-server")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteModel]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    files = ["-m", str(DEMO / "ggml-model-Q4_K_M.gguf"), "--mmproj", str(DEMO / "mmproj-model-q8_0.gguf")]
    command = [str(BINARY), *files, "--host", "127.0.0.1", "--port", str(port), "-t", "1", "-c", "2048", "--jinja"]
    log = tmp_path_factory.mktemp("llama-server") / "log"
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT) as process:
        try:
            await_health(process, port, log)
            with Model.connect(f"http://127.0.0.1:{port}", retries=1) as connected:
                yield connected
        finally:
            process.terminate()


def await_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    ends = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < ends:
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text(errors="replace")[-2000:])


def picture() -> Image.Image:
    found = Image.new("RGB", (448, 448), "white")
    ImageDraw.Draw(found).text((100, 100), "CAT", fill="black", font_size=120)
    return found


def test_it_is_recognised(model):
    assert model.n_ctx == 2048
    assert "llama-server" in repr(model)


def test_text_stop_strings_and_log_probabilities(model):
    answer = model.chat("Who are you?", greedy=True, max_tokens=8)
    assert answer.answer == "I am a tiny demo model."
    assert (answer.finish_reason, answer.completion_tokens > 0, answer.prompt_tokens > 0) == ("stop", True, True)
    pieces = [*model.chat("Who are you?", greedy=True, max_tokens=8, stream=True)]
    assert "".join(piece.text for piece in pieces) == answer.answer
    assert "demo" not in model.chat("Who are you?", stop=["demo"], greedy=True, max_tokens=8).answer
    scored = model.chat("Who are you?", greedy=True, max_tokens=3, logprobs=True, top_logprobs=2).logprobs
    assert len(scored) == 3
    assert all(token.logprob <= 0 for token in scored)


def test_pictures_and_videos_are_seen(model):
    """Its preprocessing is its own, so words may differ by a letter; without the picture it says none."""
    for parts in ([picture()], [{"type": "video", "video": [picture()] * 3}]):
        answer = model.chat([{"role": "user", "content": [*parts, "What does it say?"]}], greedy=True, max_tokens=8)
        assert answer.answer[-2:] == "AT"


def test_forms_and_thinking(model):
    assert json.loads(model.chat("x", schema=SCHEMA, max_tokens=64).answer)["a"] in (1, 2)
    assert model.chat("x", choices=["red", "green"], max_tokens=16).answer in ("red", "green")
    assert model.chat("x", thinking=True, max_tokens=24, seed=1).reasoning is not None


def test_a_prompt_that_is_too_long_is_told_as_here(model):
    with pytest.raises(PromptTooLongError, match="2048"):
        model.chat("word " * 4000, max_tokens=8)
