"""What clients may store, who waits for whom, and that one slow download is nobody else's."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from edge_runtime.errors import StoreFull
from edge_runtime.server.errors import RequestError
from edge_runtime.server.registry.blobs import UNNEEDED_AFTER_S, Blobs
from edge_runtime.server.registry.catalog import Catalog
from edge_runtime.server.registry.names import Record
from edge_runtime.server.settings import Settings
from edge_runtime.store.library import Library
from server.attacking import Serve, chat, post, wait_until
from server.conftest import Served
from server.test_ollama_client import hub
from support.hub_server import Fault

__all__ = ["hub"]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def upload(served: Served, data: bytes, *, chunked: bool = False) -> httpx.Response:
    content = (data[i : i + 100_000] for i in range(0, len(data), 100_000)) if chunked else data
    return httpx.post(f"{served.url}/api/blobs/{digest_of(data)}", content=content, timeout=60, trust_env=False)  # type: ignore[arg-type]


@pytest.fixture
def catalog(tmp_path, own_store) -> Catalog:
    return Catalog(Settings(max_names=3, max_stored_bytes=10_000), Library(tmp_path / "models"))


# --- how much ------------------------------------------------------------------------------------------------------


def test_uploads_beyond_the_quota(serve: Serve, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    served = serve(max_stored_bytes=10_000_000)
    small, large = os.urandom(4_000_000), os.urandom(7_000_000)
    assert upload(served, small).status_code == 201
    for chunked in (False, True):
        reply = upload(served, large, chunked=chunked)
        assert reply.status_code == 507
        assert "--max-store" in reply.json()["error"]
    assert served.state.catalog.blobs.size() == len(small)  # nothing is left of them
    assert upload(served, small[:-1]).status_code == 201


def test_pulls_beyond_the_quota(hub, serve: Serve, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    served = serve(max_stored_bytes=1_000_000)
    reply = post(served, "/api/pull", {"model": "hf:org/demo", "stream": False})
    assert reply.status_code == 507
    assert "--max-store" in reply.json()["error"]
    lines = post(served, "/api/pull", {"model": "hf:org/demo"}).text.splitlines()
    assert "--max-store" in json.loads(lines[-1])["error"]
    assert hub.bytes_requests() == []


def test_names_beyond_the_quota(catalog: Catalog):
    for name in ("a", "b", "c"):
        catalog.put(Record("", base="demo"), name)
    with pytest.raises(StoreFull, match="There are 3 models"):
        catalog.put(Record("", base="demo"), "d")
    catalog.put(Record("", base="demo", system="new"), "c")  # one that is there
    catalog.delete("a")
    catalog.put(Record("", base="demo"), "d")
    assert [listed.name for listed in catalog.all()] == ["b", "c", "d", "demo"]


# --- for how long --------------------------------------------------------------------------------------------------


def test_who_asks_for_a_blob_may_need_it(tmp_path):
    blobs = Blobs(tmp_path, 1000)
    digest = digest_of(b"x")
    blobs.path(digest).write_bytes(b"x")
    old = time.time() - UNNEEDED_AFTER_S - 60
    os.utime(blobs.path(digest), (old, old))
    assert blobs.has(digest)
    blobs.tidy(set())
    assert blobs.has(digest)
    os.utime(blobs.path(digest), (old, old))
    blobs.tidy(set())
    assert not blobs.has(digest)


def test_a_link_or_a_pipe_is_no_blob_and_no_name(catalog: Catalog, tmp_path):
    digest = digest_of(b"x")
    place = catalog.blobs.path(digest)
    place.parent.mkdir(parents=True)
    secret = tmp_path / "secret"
    secret.write_bytes(b"x")
    place.symlink_to(secret)
    assert not catalog.blobs.has(digest)
    with pytest.raises(RequestError, match="not all here"):
        catalog.put(Record("", base="demo", adapters=(digest,)), "a")
    catalog.put(Record("", base="demo"), "mine")
    (record,) = (catalog.library.root / ".served" / "names").glob("*.json")
    record.rename(tmp_path / "record.json")
    for make in (lambda: record.symlink_to(tmp_path / "record.json"), lambda: os.mkfifo(record)):
        make()
        assert [listed.name for listed in catalog.all()] == ["demo"]  # and nobody waits for the pipe
        record.unlink()
    assert secret.read_bytes() == b"x"


def test_a_store_that_cannot_be_changed_stays_as_it_is(catalog: Catalog):
    digest = digest_of(b"x")
    catalog.blobs.path(digest).parent.mkdir(parents=True)
    catalog.blobs.path(digest).write_bytes(b"x")
    (catalog.library.root / ".locks").write_bytes(b"")  # no folder, so that no lock can be had
    old = time.time() - UNNEEDED_AFTER_S - 60
    os.utime(catalog.blobs.path(digest), (old, old))
    catalog.tidy()
    assert catalog.blobs.has(digest)


# --- at the same time ----------------------------------------------------------------------------------------------


def test_a_blob_stays_while_a_name_is_made_of_it(catalog: Catalog):
    """One client deletes the last name of a file, another gives it a new one: there is no name without its file."""
    data = b"x"
    digest = digest_of(data)
    catalog.blobs.path(digest).parent.mkdir(parents=True)

    def one(name: str) -> None:
        for _ in range(15):
            with contextlib.suppress(OSError):
                if not catalog.blobs.has(digest):
                    temporary = catalog.blobs.path(digest).with_suffix(f".{name}")
                    temporary.write_bytes(data)
                    temporary.replace(catalog.blobs.path(digest))
            with contextlib.suppress(RequestError):
                catalog.put(Record("", base="demo", adapters=(digest,)), name)
                assert catalog.find(name).files[2].exists()
                catalog.delete(name)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(one, name) for name in ("a", "b")]:
            done.result()
    assert catalog.names.all() == []
    assert not catalog.blobs.has(digest)


def test_pulls_that_stand_still_stop_nobody(hub, serve: Serve, tmp_path, monkeypatch):
    """They are bounded, of one client as well, and have threads of their own, which end when nobody reads."""
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    served = serve()
    assert post(served, "/api/chat", chat(options={"num_predict": 1})).status_code == 200
    hub.faults.append(Fault(stall_after=1000))
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        pulls = [client.build_request("POST", "/api/pull", json={"model": "hf:org/demo"}) for _ in range(3)]
        replies = [client.send(pull, stream=True) for pull in pulls]
        assert hub.stalled.wait(30)
        refused = post(served, "/api/pull", {"model": "hf:org/demo"})
        assert refused.status_code == 429
        assert "from your address" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) > 0
        started = time.monotonic()
        assert post(served, "/api/chat", chat(options={"num_predict": 1})).status_code == 200
        assert httpx.get(served.url + "/api/tags", trust_env=False).status_code == 200
        assert time.monotonic() - started < 10
        assert served.state.pulls.n == 3
        for reply in replies:
            reply.close()
    hub.released.set()
    wait_until(lambda: served.state.pulls.n == 0, 30)
    wait_until(lambda: all(thread.name != "edge-runtime pull" for thread in threading.enumerate()))


def test_uploads_at_once_are_bounded(serve: Serve, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    served = serve()
    leave = [served.state.uploads.take("127.0.0.1") for _ in range(12)]
    reply = upload(served, b"x")
    assert (reply.status_code, "being uploaded" in reply.json()["error"]) == (429, True)
    for each in leave:
        each()
    assert upload(served, b"x").status_code == 201
    assert served.state.uploads.n == 0
    assert Path(served.state.catalog.blobs.path(digest_of(b"x"))).read_bytes() == b"x"
