"""`edge-runtime serve` as a process: what it says, how it ends, and what it refuses to start with."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from edge_runtime import MessageError
from edge_runtime.cli.program import main
from edge_runtime.cli.serve import settings_of
from edge_runtime.server.settings import Settings
from support.command import refused

QUESTION = {"model": "demo", "messages": [{"role": "user", "content": "ab"}]}
ONE_PIECE = {**QUESTION, "stream": False, "options": {"num_predict": 2}}
ITEMS = 300
LONG = {
    **QUESTION,  # about 3000 tokens, some seconds; drawn among many, so that it does not go in circles
    "format": {"type": "array", "items": {"enum": [*"abcdefghijkl"]}, "minItems": ITEMS, "maxItems": ITEMS},
    "options": {"num_predict": 3500, "temperature": 50.0, "top_k": 0, "top_p": 1.0, "seed": 3},
}


@contextlib.contextmanager
def process(store: Path, *options: str, before: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port, `before` it some Python; yields the process and its address."""
    environment = {
        **os.environ,
        "EDGE_RUNTIME_MODELS": str(store),
        "EDGE_RUNTIME_CACHE_DIR": str(store / "cache"),
    }
    program = (
        ["-c", f"{before}\nfrom edge_runtime.cli.program import main\nmain()"] if before else ["-m", "edge_runtime"]
    )
    command = [sys.executable, *program, "serve", "--port", "0", *options]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            found = re.search(r"http://\S+:\d+", line)
            assert found, line + (child.stderr.read() if child.stderr and child.poll() is not None else "")
            yield child, found[0]
        finally:
            child.kill()


def until_refused(address: str) -> None:
    """Ask until nobody takes connections any more."""
    for _ in range(1000):
        try:
            httpx.get(f"{address}/api/version", trust_env=False)
        except httpx.ConnectError:
            return
        except httpx.RemoteProtocolError:
            continue  # it had waited in line when the doors closed
    raise AssertionError("the server still takes connections")


def test_it_says_where_it_is_and_its_example_works(tmp_path):
    with process(tmp_path) as (child, address), httpx.Client(base_url=address, trust_env=False) as client:
        assert child.stdout is not None
        said = [child.stdout.readline() for _ in range(4)]
        assert f"OLLAMA_HOST={address}\n" in said[2]
        url, body = re.fullmatch(r"  curl (\S+) -d '(.*)'\n", said[3]).groups()  # type: ignore[union-attr]
        reply = client.post(url, content=body, timeout=60)
        assert json.loads(reply.text.splitlines()[-1])["done"] is True
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
        assert child.stderr is not None
        assert "Traceback" not in child.stderr.read()


def test_sigterm_lets_a_running_answer_finish(tmp_path):
    with process(tmp_path, "--grace", "600") as (child, address), httpx.Client(trust_env=False, timeout=60) as client:
        with client.stream("POST", f"{address}/api/chat", json=LONG) as reply:
            lines = reply.iter_lines()
            told = [json.loads(next(lines))]
            child.send_signal(signal.SIGTERM)
            told += map(json.loads, lines)
        assert told[-1]["done"] is True
        assert len(json.loads("".join(line["message"]["content"] for line in told))) == ITEMS
        assert child.wait(30) == 0


def test_after_the_grace_time_clients_are_told(tmp_path):
    with process(tmp_path, "--grace", "0.3") as (child, address), httpx.Client(trust_env=False, timeout=60) as client:
        with client.stream("POST", f"{address}/api/chat", json=LONG) as reply:
            lines = reply.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            until_refused(address)
            *_, last = map(json.loads, lines)
        assert list(last) == ["error"], last
        assert child.wait(30) == 0
        assert child.stderr is not None
        assert "Traceback" not in child.stderr.read()


IN_C = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # a quarter of an hour, without the lock
IN_PYTHON = "[None for _ in iter(int, 1)]"
STUCK = {
    "a decoder in C": ("edge_runtime.model.Model.submit", IN_C),
    "a decoder in Python": ("edge_runtime.model.Model.submit", IN_PYTHON),
    "the engine": ("edge_runtime.engine.scheduler.Scheduler.step", IN_C),
    "unloading": ("edge_runtime.model.Model.close", IN_C),
    "the event loop": ("edge_runtime.server.inference.Inference._admit", IN_C),
}


@pytest.mark.parametrize("where", STUCK)
def test_the_end_comes_whatever_a_thread_is_doing(tmp_path, where):
    name, work = STUCK[where]
    before = f"from unittest import mock\nmock.patch({name!r}, lambda *_, **__: {work}).start()"
    with (
        process(tmp_path, "--grace", "0.5", "-m", "demo", before=before) as (child, address),
        httpx.Client(trust_env=False) as client,
    ):
        with contextlib.suppress(httpx.HTTPError):
            client.post(f"{address}/api/chat", json=ONE_PIECE, timeout=60 if where == "unloading" else 2)
        child.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert child.wait(30) == 0
        assert time.monotonic() - started < 0.5 + 2 + 1.5  # grace, what is promised, and a busy machine
        assert child.stderr is not None
        assert "did not shut down in time" in child.stderr.read()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    name, work = STUCK["a decoder in C"]
    before = f"from unittest import mock\nmock.patch({name!r}, lambda *_, **__: {work}).start()"
    with process(tmp_path, "--grace", "600", "-m", "demo", before=before) as (child, address):
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{address}/api/chat", json=ONE_PIECE, timeout=2, trust_env=False)
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        code = child.wait(20)
        assert child.stderr is not None
        assert code == 130, child.stderr.read()


def test_a_host_for_everybody_without_a_key_is_warned_about(tmp_path):
    with process(tmp_path, "--host", "0.0.0.0") as (child, _):
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
        assert child.stderr is not None
        assert child.stderr.read().startswith("WARNING: Anybody who can reach 0.0.0.0")


def test_what_it_does_not_start_with(own_store):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused(["serve", "--port", port], rf"port {port} is not available: .*; end what uses it")
    refused(["serve", "-m", "nowhere"], "'nowhere' is neither 'demo' nor an existing folder or file")
    refused(["serve", "--keep-alive", "soon"], "keep_alive is 'soon'")
    refused(["serve", "--api-key", ""], "The API key is empty")


def settings_for(*arguments: str) -> Settings:
    """What the options of the command come to."""
    from edge_runtime.cli.serve import serve

    context = serve.make_context("serve", [*arguments])
    return settings_of(context.params)


def test_where_read_prompts_are_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGE_RUNTIME_CACHE_DIR", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    usual = tmp_path / "edge-runtime" / "prompts"
    assert settings_for().load["cache_dir"] == usual
    assert usual.stat().st_mode & 0o077 == 0
    assert settings_for("--no-cache-dir").load["cache_dir"] is None
    chosen = settings_for("--cache-dir", str(tmp_path / "mine"), "--cache-limit", "0.5").load
    assert (chosen["cache_dir"], chosen["cache_limit"]) == (tmp_path / "mine", 1 << 29)
    monkeypatch.setenv("EDGE_RUNTIME_CACHE_DIR", str(tmp_path / "told"))
    assert settings_for().load["cache_dir"] == tmp_path / "told"
    assert settings_for("--no-cache-dir").load["cache_dir"] is None
    (tmp_path / "file").write_text("x")
    refused(["serve", "--cache-dir", str(tmp_path / "file")], "cannot be used .* choose another --cache-dir")
    found = CliRunner().invoke(main, ["serve", "--cache-dir", str(tmp_path), "--no-cache-dir"])
    assert (found.exit_code, "were both given" in found.output) == (2, True)


def test_whether_models_are_offered_with_tools():
    assert settings_for("--no-cache-dir").tools == "auto"
    assert settings_for("--no-cache-dir", "--tools", "off").tools == "off"
    with pytest.raises(MessageError, match="tools is 'maybe'; expected one of auto, off"):
        Settings(tools="maybe").checked()


def test_without_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else object())
    refused(["serve"], r"need fastapi, which is not installed; run: pip install 'edge-runtime\[serve\]'")


def test_ends_of_a_server_in_a_thread(serve):
    """Fixtures end servers without a signal: nothing of theirs stays behind."""
    before = threading.active_count()
    served = serve()
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        assert client.get("/health").status_code == 200
    assert threading.active_count() > before
