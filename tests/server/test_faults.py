"""A server that is killed, whose disk is full, whose home cannot be written to: nothing lost, and a sentence."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_runtime.server.registry.blobs import Blobs
from edge_runtime.server.registry.names import Names
from edge_runtime.store.find import find_model
from edge_runtime.store.library import Library
from edge_runtime.store.pull import pull
from server.attacking import wait_until
from server.test_ollama_client import DEMO_FILES, hub
from server.test_serve_command import process
from support.hub_server import Fault

__all__ = ["hub"]

LONG = "A question that is longer than a block of what is kept, so that something of it is written down. " * 8


def ask(address: str, text: str = "Hi", **fields: Any) -> httpx.Response:
    body = {"model": "demo", "messages": [{"role": "user", "content": text}], "stream": False, **fields}
    return httpx.post(f"{address}/api/chat", json=body, timeout=120, trust_env=False)


def left_in(store: Path) -> set[str]:
    """Hidden files: those that are not finished."""
    return {path.name for path in store.rglob(".*") if path.is_file() and not path.name.endswith(".lock")}


def arrived(store: Path) -> int:
    """Bytes of a download that is not complete."""
    return sum(path.stat().st_size for path in store.rglob(".*.part"))


@contextlib.contextmanager
def uploading(address: str, digest: str, announced: int, sent: bytes) -> Iterator[socket.socket]:
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/blobs/{digest} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {announced}\r\n\r\n"
        connection.sendall(head.encode() + sent)
        yield connection


def test_a_killed_server_leaves_nothing_half(hub, tmp_path):
    """While it receives an upload, pulls a model, writes names and keeps what it reads."""
    store, data = tmp_path / "models", DEMO_FILES[0].read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    over = threading.Event()
    os.environ["HF_ENDPOINT"] = hub.url
    try:
        with process(store, "--no-cache-dir", "--cache-limit", "1") as (child, address):
            for name in ("first", "second"):
                body = {"model": name, "from": "demo", "system": "s" * 50_000, "stream": False}
                assert httpx.post(f"{address}/api/create", json=body, trust_env=False).status_code == 200
            hub.faults.append(Fault(stall_after=1_000_000))

            def go_on(path: str, body: dict[str, Any]) -> None:
                while not over.is_set():
                    with contextlib.suppress(httpx.HTTPError):
                        httpx.post(address + path, json=body, timeout=60, trust_env=False)

            busy = [
                threading.Thread(target=go_on, args=(path, body), daemon=True)
                for path, body in (
                    ("/api/pull", {"model": "hf:org/demo"}),
                    ("/api/create", {"model": "second", "from": "demo", "system": "t" * 3_000_000, "stream": False}),
                )
            ]
            for thread in busy:
                thread.start()
            with uploading(address, digest, len(data), data[:-100_000]):
                assert hub.stalled.wait(60)
                wait_until(lambda: any(name.startswith(f".{digest[7:]}") for name in left_in(store)))
                wait_until(lambda: arrived(store) > 0)
                child.send_signal(signal.SIGKILL)
                child.wait(20)
            over.set()
            hub.released.set()
            for thread in busy:
                thread.join(20)
    finally:
        del os.environ["HF_ENDPOINT"]
    names, blobs = Names(store / ".served" / "names"), Blobs(store / ".served" / "blobs", 1 << 40)
    assert {record.name for record in names.all()} == {"first", "second"}
    assert {len(record.system) for record in names.all()} <= {50_000, 3_000_000}
    assert not blobs.has(digest)
    assert [entry.complete for entry in Library(store).entries()] == [False]
    with process(store) as (child, address):
        wait_until(lambda: not [name for name in left_in(store) if name.startswith(f".{digest[7:]}")])
        tags = httpx.get(f"{address}/api/tags", trust_env=False).json()["models"]
        assert {model["name"] for model in tags} == {"demo:latest", "first:latest", "second:latest"}
        assert ask(address, options={"num_predict": 1}).status_code == 200
        names.put(names.get("second"))  # type: ignore[arg-type]
    hub.requests.clear()
    n_bytes = arrived(store)
    assert 0 < n_bytes <= 1_000_000
    assert pull("hf:org/demo").complete
    assert hub.bytes_requests()[0]["range"] == f"bytes={n_bytes}-", "what had arrived was fetched again"
    assert find_model("hf:org/demo").decoder.read_bytes() in {path.read_bytes() for path in DEMO_FILES}
    assert not left_in(store)


# --- a full disk ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_namespace(script: str, *arguments: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve where `script` has mounted what it likes; skips where nobody may."""
    serve = (sys.executable, "-m", "edge_runtime", "serve", "--port", "0", *arguments)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh", *serve]
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    except FileNotFoundError:
        pytest.skip("this system has no namespaces")
    with child:
        try:
            assert child.stdout is not None
            assert child.stderr is not None
            line = child.stdout.readline()
            if not line and ("unshare" in (said := child.stderr.read()) or "mount" in said):
                pytest.skip("this system lets nobody mount")
            yield child, line.partition(" serves ")[2].partition(";")[0]
        finally:
            child.kill()


def test_a_full_disk_fails_what_needs_it_and_nothing_else(tmp_path):
    """Uploads, announced and not, names, pulls and the cache; each with its sentence, and what was there stays."""
    store = tmp_path / "models"
    store.mkdir()
    environment = os.environ | {"EDGE_RUNTIME_MODELS": str(store), "EDGE_RUNTIME_CACHE_DIR": str(store / "cache")}
    script = f"mount -t tmpfs -o size=3m tmpfs {store}"
    with in_namespace(script, env=environment) as (child, address), httpx.Client(trust_env=False) as client:

        def create(name: str, n: int) -> httpx.Response:
            body = {"model": name, "from": "demo", "system": "s" * n, "stream": False}
            return client.post(f"{address}/api/create", json=body, timeout=60)

        assert create("first", 100_000).status_code == 200
        data = bytes(range(256)) * 20_000  # 5 MB
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        announced = client.post(f"{address}/api/blobs/{digest}", content=data)
        assert announced.status_code == 507
        assert "The upload has 0.01 GB, the model store has 0.00 GB free; free some space" in announced.text
        chunks = client.post(
            f"{address}/api/blobs/{digest}", content=(data[i : i + 4096] for i in range(0, 10**7, 4096))
        )
        assert chunks.status_code == 507, chunks.text
        assert "cannot be written: the disk is full (" in chunks.text
        assert "free some space and send the upload again" in chunks.text
        assert str(tmp_path) not in announced.text + chunks.text
        assert client.head(f"{address}/api/blobs/{digest}").status_code == 404
        refused = create("second", 3_500_000)
        assert refused.status_code == 507, refused.text
        assert "free some space and make the model again" in refused.text
        assert create("first", 3_500_000).status_code == 507
        assert create("third", 100_000).status_code == 200, "what was refused has left something on the disk"
        shown = client.post(f"{address}/api/show", json={"model": "first"}).json()
        assert shown["system"] == "s" * 100_000
        tags = client.get(f"{address}/api/tags").json()["models"]
        assert {model["name"] for model in tags} == {"demo:latest", "first:latest", "third:latest"}
        assert create("filling", 2_600_000).status_code == 200
        for i in range(3):  # what is read does not fit beside it
            assert ask(address, f"{i} {LONG}", options={"num_predict": 1}).status_code == 200
        child.terminate()
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0
        assert said.count("nothing further is kept there") == 1, said
        assert "cannot be written to any more (the disk is full (" in said


# --- a home that cannot be written to ------------------------------------------------------------------------------


def read_only(tmp_path: Path) -> tuple[str, dict[str, str]]:
    """A script that makes a home without anything in it, and an environment that leads there."""
    home = tmp_path / "home"
    home.mkdir()
    drop = {"EDGE_RUNTIME_MODELS", "EDGE_RUNTIME_CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "OLLAMA_MODELS"}
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    script = f"mount -t tmpfs -o ro,size=1m tmpfs {home}"
    return script, environment | {"HOME": str(home), "NUMBA_CACHE_DIR": str(_kernels())}


def _kernels() -> Path:
    """Compiled code is elsewhere: what happens without is a test of its own, and takes minutes."""
    from edge_kernels.compile import cache_directory

    found = cache_directory()
    assert found is not None
    return found.parent


def test_a_server_needs_no_home(tmp_path):
    script, environment = read_only(tmp_path)
    with in_namespace(script, env=environment) as (child, address), httpx.Client(trust_env=False) as client:
        assert ask(address, options={"num_predict": 2}).status_code == 200
        assert client.get(f"{address}/api/tags").json()["models"][0]["name"] == "demo:latest"
        for path, body in (
            ("/api/create", {"model": "mine", "from": "demo", "system": "x", "stream": False}),
            ("/api/copy", {"source": "demo", "destination": "mine"}),
            (f"/api/blobs/sha256:{'0' * 64}", {}),
        ):
            reply = client.post(address + path, json=body)
            assert reply.status_code == 507, (path, reply.text)
            assert "Read-only file system; check its permissions, or point EDGE_RUNTIME_MODELS" in reply.text
            assert str(tmp_path) not in reply.text
        child.terminate()
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0
        assert said.count("Prompts that were read are not kept.") == 1
        assert "Traceback" not in said


COMMANDS = (
    (("run", "Hi", "--max-tokens", "2", "--greedy"), 0, ""),
    (("info",), 0, ""),
    (("list",), 0, "No model was pulled yet"),
    (("run", "-m", "minicpm-v-4.5", "Hi"), 1, "was not pulled; run 'edge-runtime pull minicpm-v-4.5'"),
    (
        ("run", "Hi", "--cache-dir", "~/cache"),
        1,
        "cannot be used (Read-only file system); choose another --cache-dir",
    ),
    (("export", "ollama", "demo", "-o", "HOME"), 1, "Read-only file system; choose another folder"),
)


def test_commands_that_write_nothing_need_no_home(tmp_path):
    script, environment = read_only(tmp_path)
    home = environment["HOME"]
    lines = []
    for i, (arguments, _, _) in enumerate(COMMANDS):
        words = " ".join(f"'{home if word == 'HOME' else word}'" for word in arguments)
        lines.append(f"{sys.executable} -m edge_runtime {words} >{tmp_path}/{i}.out 2>{tmp_path}/{i}.err; echo $?")
    whole = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{script} || exit 99; {'; '.join(lines)}"]
    try:
        done = subprocess.run(whole, capture_output=True, text=True, env=environment, timeout=300, check=False)
    except FileNotFoundError:
        pytest.skip("this system has no namespaces")
    if not done.stdout:
        pytest.skip("this system lets nobody mount")
    codes = [int(line) for line in done.stdout.split()]
    for i, ((arguments, code, words), found) in enumerate(zip(COMMANDS, codes, strict=True)):
        said = (tmp_path / f"{i}.err").read_text()
        assert found == code, (arguments, said)
        assert words in said
        assert "Traceback" not in said
        if code:
            assert said.startswith("edge-runtime: "), said
            assert said.count("\n") == 1
