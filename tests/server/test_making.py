"""Models that clients make: uploads, Modelfiles, adapters, pulls that nobody waits for any more."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import ollama
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoder.test_adapters import make_adapter
from edge_runtime.server.errors import RequestError
from edge_runtime.server.ollama.modelfile import modelfile_of, parse_modelfile
from edge_runtime.server.registry.names import Names, Record
from edge_runtime.store.export_ollama import TEMPLATE, modelfile_text
from edge_runtime.store.find import find_model
from server.conftest import Served
from server.test_ollama_client import DEMO_FILES, GREEDY, PULLED, QUESTION, hub, names
from support.gguf_maker import mini_decoder, mini_mmproj
from support.hub_server import Fault

__all__ = ["hub"]


@pytest.fixture
def served(serve, tmp_path, monkeypatch) -> Served:
    monkeypatch.setenv("EDGE_RUNTIME_MODELS", str(tmp_path / "models"))
    return serve()


@pytest.fixture
def api(served) -> Iterator[ollama.Client]:
    with ollama.Client(served.url, trust_env=False) as client:
        yield client


def blobs(served: Served) -> list[str]:
    """Names of all uploads, unfinished ones too."""
    folder = served.state.catalog.library.root / ".served" / "blobs"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- uploads -------------------------------------------------------------------------------------------------------


def test_an_upload(served):
    data = bytes(range(256)) * 40_000
    number = hashlib.sha256(data).hexdigest()
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        assert client.head(f"/api/blobs/sha256:{number}").status_code == 404
        wrong = client.post(f"/api/blobs/sha256:{'0' * 64}", content=data)
        assert (wrong.status_code, list(wrong.json())) == (400, ["error"])
        assert "expected sha256:0000" in wrong.json()["error"]
        assert blobs(served) == []
        for digest in (f"sha256:{number}", f"sha256-{number}"):
            assert client.post(f"/api/blobs/{digest}", content=data).status_code == 201
            assert client.head(f"/api/blobs/{digest}").status_code == 200
        assert blobs(served) == [f"sha256-{number}"]


@pytest.mark.parametrize(
    "digest",
    [
        "x",
        "sha256:",
        "sha256:" + "g" * 64,
        "sha256:" + "A" * 64,
        "sha256:..%2F..%2Fx",
        "%2e%2e%2fx",
        "md5:" + "0" * 64,
    ],
)
def test_a_digest_that_is_none_becomes_no_path(served, digest):
    with httpx.Client(base_url=served.url, trust_env=False) as client:
        reply = client.post(f"/api/blobs/{digest}", content=b"x")
        assert reply.status_code in (400, 404, 405), reply.text
        assert client.head(f"/api/blobs/{digest}").status_code in (400, 404, 405)
    assert blobs(served) == []


def test_a_cut_upload_leaves_nothing(served):
    number = hashlib.sha256(b"x" * 10_000_000).hexdigest()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/blobs/sha256:{number} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 10000000\r\n\r\n"
        connection.sendall(head.encode() + b"x" * 5_000_000)
        wait_for(lambda: len(blobs(served)) == 1)
    wait_for(lambda: blobs(served) == [])


def wait_for(condition) -> None:
    """Wait until something is so; ten seconds at most."""
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


def test_damaged_uploads_end_nothing(served, api, tmp_path):
    """Headers with a byte changed: refused with a reason, or models that are refused when they are loaded."""
    data, path = mini_decoder().build(), tmp_path / "damaged.gguf"
    path.write_bytes(mini_mmproj().build())
    mmproj = api.create_blob(path)
    for at in (0, 4, 8, 16, 24, 40, 200, 1000, 5000):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        digest = api.create_blob(path)
        body = {"model": "damaged", "files": {"a.gguf": digest, "b.gguf": mmproj}, "stream": False}
        reply = httpx.post(f"{served.url}/api/create", json=body, trust_env=False)
        assert reply.status_code in (200, 400), reply.text
        assert str(tmp_path) not in reply.text
    assert api.chat("demo", QUESTION, options=GREEDY).message.content == "CAFE"
    assert "demo:latest" in names(api)


# --- Modelfiles ----------------------------------------------------------------------------------------------------


def test_a_modelfile_of_uploads(served, api):
    digests = [api.create_blob(path) for path in DEMO_FILES]
    text = f'''# mine
    from @{digests[0]}
    FROM {digests[1]}
    PARAMETER temperature 0
    parameter stop "F"
    SYSTEM """You read
signs."""
    MESSAGE user Hello
    '''
    body = {"model": "mine", "modelfile": text, "stream": False}
    reply = httpx.post(f"{served.url}/api/create", json=body, trust_env=False)
    assert reply.json() == {"status": "success"}
    words = [{"role": "system", "content": "You read\nsigns."}, {"role": "user", "content": "Hello"}]
    told = api.chat("demo", [*words, *QUESTION], options={"temperature": 0, "stop": ["F"]})
    mine = api.chat("mine", QUESTION)
    assert (mine.message.content, mine.prompt_eval_count) == (told.message.content, told.prompt_eval_count)
    shown = api.show("mine")
    assert "You read\nsigns." in shown.modelfile
    (message,) = httpx.post(f"{served.url}/api/show", json={"name": "mine"}, trust_env=False).json()["messages"]
    assert message == {"role": "user", "content": "Hello"}
    api.create("again", from_="mine", parameters={"stop": [mine.message.content[1]]})
    assert api.chat("again", QUESTION).message.content == mine.message.content[0]


def test_the_exported_modelfile_is_understood():
    """What `edge-runtime export ollama` writes; the paths in it are for Ollama's own program."""
    found = parse_modelfile(modelfile_text(find_model("demo")))
    assert found.sources == [str(path.resolve()) for path in DEMO_FILES]
    assert found.template == TEMPLATE
    assert found.parameters["stop"] == ["<|im_end|>", "<|endoftext|>"]
    assert (found.parameters["top_k"], found.parameters["repeat_penalty"]) == (100, 1.03)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no FROM"),
        ("FROM demo\nHELLO x", "Line 2 .* begins with 'HELLO x'"),
        ('FROM demo\nSYSTEM """open', "never closes it"),
        ("FROM demo\nMESSAGE king hi", "a message of 'king'"),
        ("FROM demo\nPARAMETER", "PARAMETER without a name"),
        ("FROM /etc/passwd", "looks like a path"),
        ("FROM ./model.gguf", "looks like a path"),
        ("FROM demo\nADAPTER /etc/passwd", "expected sha256: and 64"),
        ("FROM demo\nFROM other", "several FROM"),
    ],
)
def test_modelfiles_that_are_refused(served, text, reason):
    body = {"model": "mine", "modelfile": text or "\n", "stream": False}
    reply = httpx.post(f"{served.url}/api/create", json=body, trust_env=False)
    assert reply.status_code == 400, reply.text
    assert re.search(reason, reply.json()["error"]), reply.text


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30).filter(
    lambda text: '"""' not in text and not text.endswith('"')
)


@given(
    system=TEXT,
    template=TEXT,
    license=TEXT,
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 9),
            "top_k": st.integers(0, 99),
            "stop": st.lists(TEXT, min_size=1, max_size=3),
        },
    ),
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), max_size=3
    ),
)
def test_what_is_written_reads_back(system, template, license, parameters, messages):
    texts = {"system": system, "template": template, "license": license}
    found = parse_modelfile(modelfile_of("demo", **texts, parameters=parameters, messages=tuple(messages)))
    assert found.sources == ["demo"]
    assert (found.system, found.template, "".join(found.licenses)) == (system, template, license)
    assert found.parameters == parameters
    assert found.messages == messages


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(RequestError):
        assert parse_modelfile(text).sources


# --- adapters, pulls -----------------------------------------------------------------------------------------------


def test_a_model_with_an_adapter(served, api, tmp_path):
    path = tmp_path / "lora.gguf"
    make_adapter(path, DEMO_FILES[0], seed=0, scale=20.0)
    digest = api.create_blob(path)
    api.create("adapted", from_="demo", adapters={"lora.gguf": digest})
    plain = api.chat("demo", QUESTION, options={**GREEDY, "num_predict": 8})
    adapted = api.chat("adapted", QUESTION, options={**GREEDY, "num_predict": 8})
    assert adapted.message.content != plain.message.content == "CAFE"
    assert {slot.listed.name for slot in served.state.registry.loaded()} == {"demo", "adapted"}
    with pytest.raises(ollama.ResponseError, match="expected 'adapter'"):
        api.create("wrong", from_="demo", adapters={"a.gguf": api.create_blob(DEMO_FILES[1])})
    api.delete("adapted")
    wait_for(lambda: {slot.listed.name for slot in served.state.registry.loaded()} == {"demo"})


def test_a_pull_that_nobody_waits_for_stops_and_goes_on_later(hub, served, api):
    hub.faults.append(Fault(stall_after=1_000_000))
    with (
        httpx.Client(base_url=served.url, trust_env=False) as client,
        client.stream("POST", "/api/pull", json={"model": "hf:org/demo"}) as reply,
    ):
        assert json.loads(next(reply.iter_lines())) == {"status": "pulling manifest"}
        assert hub.stalled.wait(30)
    n_requests = len(hub.bytes_requests())
    hub.released.set()
    time.sleep(0.5)
    assert len(hub.bytes_requests()) <= n_requests + 1, "the pull goes on although nobody reads"
    assert PULLED not in names(api)
    assert api.pull("hf:org/demo").status == "success"
    assert PULLED in names(api)
    assert any("range" in headers for headers in hub.bytes_requests()), "what had arrived was fetched again"


def test_a_damaged_record_hides_no_other(served, api):
    api.create("mine", from_="demo", system="Hi")
    folder: Path = served.state.catalog.library.root / ".served" / "names"
    (record,) = folder.glob("*.json")
    good = json.loads(record.read_text())
    for change in ({"decoder": "sha256:../x"}, {"format": 2}, {"messages": ["x"]}, {"system": 5}, {"created": "now"}):
        record.write_text(json.dumps({**good, **change}))
        assert names(api) == {"demo:latest"}
        with pytest.raises(ollama.ResponseError, match="not found"):
            api.show("mine")
    (folder / ("0" * 64 + ".json")).write_text(json.dumps(good))
    assert names(api) == {"demo:latest"}, "a record stands under the hash of its own name"


def test_many_write_one_name_at_once(tmp_path):
    """Temporary files of their own: none takes another's away, and what is there at the end is one of them, whole."""
    store = Names(tmp_path)
    wanted = [Record("race", base="demo", system=str(i) * (20 if i % 2 else 200_000)) for i in range(8)]

    def write(record: Record) -> None:
        for _ in range(25):
            store.put(record)
            assert store.get("race") is not None

    with ThreadPoolExecutor(len(wanted)) as pool:
        for done in [pool.submit(write, record) for record in wanted]:
            done.result()
    assert store.get("race") in wanted
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == []


def test_what_uploads_leave_behind_is_removed(serve, own_store):
    catalog = serve().state.catalog
    root = catalog.blobs.path("sha256:" + "0" * 64).parent
    root.mkdir(parents=True, exist_ok=True)
    catalog.names.put(Record("tidy", base="demo", adapters=("sha256:" + "a" * 64,)))
    day = 24 * 3600
    files = {  # name: (seconds since it was written to, whether it stays)
        f"sha256-{'a' * 64}": (9 * day, True),
        f"sha256-{'b' * 64}": (day + 60, False),
        f"sha256-{'c' * 64}": (day - 3600, True),
        f"sha256-{'f' * 64}": (30 * 365 * day, True),  # a clock was set: its time begins now
        f"sha256-{'9' * 64}": (-30 * 365 * day, True),
        f".{'d' * 64}.0123abcd": (3700, False),
        f".{'e' * 64}.0123abcd": (-3000, False),  # nobody holds it, whatever its age
        "notes.txt": (9 * day, True),
    }

    def write() -> None:
        for name, (age, _) in files.items():
            (root / name).write_bytes(b"x")
            os.utime(root / name, (time.time() - age,) * 2)

    def left() -> set[str]:
        return {name for name in files if (root / name).exists()}

    stays = {name for name, (_, stay) in files.items() if stay}
    try:
        write()
        serve()  # as any server does when it starts
        assert left() == stays
        for digit in "f9":
            assert abs((root / f"sha256-{digit * 64}").stat().st_mtime - time.time()) < 600
        write()
        unread = root.parent / "names" / "other.json"
        unread.write_text('{"format": 99}')  # of a later version: it may need any file
        catalog.tidy()
        unread.unlink()
        assert left() == stays | {f"sha256-{'b' * 64}"}
    finally:
        catalog.names.remove("tidy")
        for name in files:
            (root / name).unlink(missing_ok=True)
