"""What strangers may send to files and batches: refused in one sentence, and nothing of it is left."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from edge_runtime.server.batches import at_hand, kept
from edge_runtime.server.batches import files as files_module
from server.attacking import connected, head, rest_of, wait_until
from server.conftest import Served
from server.test_batches import CHAT, jsonl, own_folder, request

__all__ = ["own_folder"]
BOUNDARY = "----b"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, data: bytes, extra: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
GOOD = part("purpose", b"batch") + part("file", jsonl(request("a")), '; filename="a.jsonl"') + END


@pytest.fixture
def served(own_folder: Path, serve: Callable[..., Served]) -> Served:
    return serve(max_file_bytes=50_000, max_files_bytes=200_000)


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60, trust_env=False) as client:
        yield client


def is_clean(folder: Path) -> bool:
    """Whether no file is there, not even in part."""
    return not (folder / "files").exists() or [*(folder / "files").iterdir()] == []


def refused(reply: httpx.Response, status: int, reason: str) -> None:
    error = reply.json()["error"]
    assert reply.status_code == status, reply.text
    assert reason in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "headers, body, reason",
    [
        ({}, GOOD, "no form"),
        ({"Content-Type": "application/json"}, b"{}", "no form"),
        ({"Content-Type": "multipart/form-data"}, GOOD, "no form"),
        ({"Content-Type": f"multipart/form-data; boundary={'x' * 300}"}, GOOD, "no form"),
        (FORM, b"", "ends in the middle"),
        (FORM, b"nonsense", "damaged"),
        (FORM, GOOD[:-10], "ends in the middle"),
        (FORM, GOOD[:60], "ends in the middle"),
        (FORM, END, "no file"),
        (FORM, part("purpose", b"batch") + END, "no file"),
        (FORM, part("file", b"x") + END, "purpose is missing"),
        (FORM, part("file", b"x") * 2 + END, "several files"),
        (FORM, part("purpose", b"batch") * 2 + END, "twice"),
        (FORM, part("purpose", b"\xff" * 20) + part("file", b"x") + END, "no such purpose"),
        (FORM, b"".join(part(f"{i}", b"") for i in range(50)) + END, "more than 32 parts"),
        (FORM, part("purpose", b"x" * 5000) + END, "4096 bytes"),
        (FORM, part("a", b"", "x" * 100_000) + END, "damaged"),
        (FORM, part("a", b"", "\r\nX: y" * 1000) + END, "damaged"),
        (FORM, part("purpose", b"batch") + part("expires_after", b"[]") + part("file", b"x") + END, "one field"),
    ],
    ids=range(19),
)
def test_forms_that_are_none(client, own_folder, headers, body, reason):
    refused(client.post("/v1/files", content=body, headers=headers), 400, reason)
    assert is_clean(own_folder)
    assert client.post("/v1/files", content=GOOD, headers=FORM).status_code == 200


def test_damaged_forms_are_files_or_refused(client, own_folder):
    draw = random.Random(11)
    seen = set()
    for _ in range(300):
        body = bytearray(GOOD)
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(body))
            match draw.randrange(3):
                case 0:
                    body[place] = draw.randrange(256)
                case 1:
                    del body[place : place + draw.randint(1, 30)]
                case _:
                    body[place:place] = body[draw.randrange(len(body)) :][: draw.randint(1, 30)]
        reply = client.post("/v1/files", content=bytes(body), headers=FORM)
        seen.add(reply.status_code)
        if reply.status_code == 200:
            client.delete(f"/v1/files/{reply.json()['id']}").raise_for_status()
        else:
            assert reply.json()["error"]["message"]
    assert seen == {200, 400}
    assert is_clean(own_folder)


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_that_is_too_large(client, own_folder, announced):
    body = part("purpose", b"batch") + part("file", b"x" * 200_000) + END
    pieces = (body[i : i + 10_000] for i in range(0, len(body), 10_000))
    reply = client.post("/v1/files", content=body if announced else pieces, headers=FORM)
    refused(reply, 413, "more than")
    assert is_clean(own_folder)


def test_all_files_together_have_a_limit(client, served):
    body = part("purpose", b"batch") + part("file", b"x" * 40_000) + END
    for _ in range(5):
        client.post("/v1/files", content=body, headers=FORM).raise_for_status()
    reply = client.post("/v1/files", content=body, headers=FORM)
    refused(reply, 507, "another 0.0 MB")
    assert served.state.batches.files.n_bytes == 200_000
    first = client.get("/v1/files", params={"limit": 1}).json()["data"][0]["id"]
    client.delete(f"/v1/files/{first}").raise_for_status()
    client.post("/v1/files", content=body, headers=FORM).raise_for_status()


def test_so_has_their_number(client, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_FILES", 3)
    found = [client.post("/v1/files", content=GOOD, headers=FORM) for _ in range(4)]
    assert [reply.status_code for reply in found] == [200, 200, 200, 507]
    refused(found[-1], 507, "3 files are kept here")


def test_so_has_that_of_batches(client, served, monkeypatch):
    monkeypatch.setattr(served.state.batches, "_is_asked", lambda: True)
    monkeypatch.setattr(kept, "MAX_UNFINISHED", 2)
    replies = []
    for _ in range(3):
        file = client.post("/v1/files", content=GOOD, headers=FORM).json()["id"]
        body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        replies.append(client.post("/v1/batches", json=body))
    assert [reply.status_code for reply in replies] == [200, 200, 507]
    refused(replies[-1], 507, "2 batches have not ended")


def test_records_of_batches_that_have_ended_do_not_pile_up(client, own_folder, monkeypatch):
    monkeypatch.setattr(kept, "MAX_BATCHES", 3)
    made = []
    for _ in range(5):
        file = client.post("/v1/files", content=GOOD[:-60] + END, headers=FORM)
        file = client.post("/v1/files", content=part("purpose", b"batch") + part("file", b"") + END, headers=FORM)
        body = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
        made.append(client.post("/v1/batches", json=body).json()["id"])
        wait_until(lambda: client.get(f"/v1/batches/{made[-1]}").json()["status"] == "failed", 30)
    assert [batch["id"] for batch in client.get("/v1/batches").json()["data"]] == made[:1:-1]
    assert len([*(own_folder / "batches").iterdir()]) == 3


def test_many_uploads_at_once_are_refused(served, client):
    begun = head("/v1/files", f"Content-Type: {FORM['Content-Type']}", "Content-Length: 1000") + GOOD[:80]
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connected(served, begun)) for _ in range(12)]
        wait_until(lambda: served.state.uploads.n == 12)
        refused(client.post("/v1/files", content=GOOD, headers=FORM), 429, "12 files are being uploaded")
        assert len(held) == 12
    wait_until(lambda: served.state.uploads.n == 0)
    assert client.post("/v1/files", content=GOOD, headers=FORM).status_code == 200


def test_an_upload_that_never_ends_is_ended(own_folder, serve):
    served = serve(body_timeout_s=0.5)
    begun = head("/v1/files", f"Content-Type: {FORM['Content-Type']}", "Content-Length: 100000") + GOOD[:120]
    with connected(served, begun) as slow:
        assert b"408" in rest_of(slow).split(b"\r\n")[0]
    wait_until(lambda: served.state.uploads.n == 0)
    assert is_clean(own_folder)


def test_a_client_that_leaves_leaves_nothing(own_folder, served):
    begun = head("/v1/files", f"Content-Type: {FORM['Content-Type']}", "Content-Length: 40000")
    begun += GOOD[: GOOD.index(b"custom_id")]
    for _ in range(5):
        with connected(served, begun + b"x" * 20_000):
            wait_until(lambda: served.state.uploads.n == 1)
        wait_until(lambda: served.state.uploads.n == 0)
    wait_until(lambda: is_clean(own_folder))
    assert served.state.batches.files.n_bytes == 0


def test_an_upload_is_not_held_in_memory(own_folder, serve, monkeypatch):
    monkeypatch.setattr(files_module, "WRITE_BYTES", 100_000)
    held, count = [], files_module.Files.count
    monkeypatch.setattr(files_module.Files, "count", lambda self, n: held.append(n) or count(self, n))
    served = serve()
    data = b"x" * 5_000_000
    body = part("purpose", b"batch") + part("file", data) + END
    pieces = (body[i : i + 50_000] for i in range(0, len(body), 50_000))
    reply = httpx.post(f"{served.url}/v1/files", content=pieces, headers=FORM, timeout=60, trust_env=False)
    assert reply.json()["bytes"] == len(data)
    written = [n for n in held if n > 0]
    assert sum(written) == len(data)
    assert max(written) < 500_000
    assert served.state.batches.files.n_bytes == len(data), "counted once, not as an upload, too"


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a\0b", "x" * 10_000, "\x1b[31m", "C:\\evil", "é"])
def test_names_of_files_are_shown_and_nothing_else(client, own_folder, name):
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    body = part("purpose", b"batch") + part("file", b"{}", f'; filename="{quoted}"') + END
    reply = client.post("/v1/files", content=body, headers=FORM)
    if len(name) > 4000:
        refused(reply, 400, "damaged")
        return
    if reply.status_code != 200:
        refused(reply, 400, "damaged")
        return
    found = reply.json()
    assert found["filename"].isprintable()
    kept = {path.name for path in (own_folder / "files").iterdir()}
    assert kept == {f"{found['id']}.json", f"{found['id']}.data"}
    shown = client.get(f"/v1/files/{found['id']}/content").headers["content-disposition"]
    assert shown == f'attachment; filename="{found["id"]}.jsonl"'


def test_ids_are_looked_up_and_never_opened(client):
    zeros = "0" * 32
    names = ["..%2f..%2flock", "..", f"file-{zeros}", f"batch_{zeros}", "%00", "file-*", "x" * 4000, "a.json"]
    for name in names:
        for kind, rest in (("files", ""), ("files", "/content"), ("batches", ""), ("batches", "/cancel")):
            reply = client.request("POST" if rest == "/cancel" else "GET", f"/v1/{kind}/{name}{rest}")
            assert reply.status_code in (404, 405), reply.text
            assert len(reply.text) < 500


def test_ids_cannot_be_guessed(client):
    ids = [client.post("/v1/files", content=GOOD, headers=FORM).json()["id"] for _ in range(5)]
    assert all(len(name) == len("file-") + 32 for name in ids)
    assert all(sum(a != b for a, b in zip(ids[0], other, strict=True)) > 15 for other in ids[1:])


def test_a_disk_that_cannot_be_written_to(own_folder, serve):
    own_folder.parent.mkdir(parents=True)
    own_folder.write_text("in the way")
    served = serve()
    reply = httpx.post(f"{served.url}/v1/files", content=GOOD, headers=FORM, timeout=60, trust_env=False)
    refused(reply, 507, "cannot be written")
    assert str(own_folder.parent) not in reply.text
    assert httpx.get(f"{served.url}/health", trust_env=False).status_code == 200


def test_a_full_disk_costs_no_answer(client, served, monkeypatch):
    """An answer waits until there is room for it; the batch then goes on."""
    from edge_runtime.server.batches.work import Appended

    monkeypatch.setattr(at_hand, "FULL_S", 0.05)
    append, calls = Appended.append, []

    def full(self: Appended, data: bytes) -> None:
        calls.append(data)
        if len(calls) < 4:
            raise OSError(28, "No space left on device")
        append(self, data)

    monkeypatch.setattr(Appended, "append", full)
    file = client.post("/v1/files", content=GOOD, headers=FORM).json()["id"]
    body = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    batch = client.post("/v1/batches", json=body).json()["id"]
    wait_until(lambda: client.get(f"/v1/batches/{batch}").json()["status"] == "completed", 60)
    assert client.get(f"/v1/batches/{batch}").json()["request_counts"]["completed"] == 1
    assert len({*calls}) == 1, "the answer was computed again"


def test_odd_values(client):
    values = [None, 1, True, [], {}, "x" * 100_000, "\ud800", "\0", 1e308, "../.."]
    for field in ("input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"):
        for value in values:
            body = {"input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h", field: value}
            reply = client.post("/v1/batches", content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert reply.status_code in (400, 404), (field, value, reply.text)
            assert len(reply.json()["error"]["message"]) < 1000


def test_a_key_is_needed(own_folder, serve):
    served = serve(api_key="a secret that is long")
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/batches"),
        ("POST", "/v1/batches"),
    ):
        assert httpx.request(method, served.url + path, trust_env=False).status_code == 401
    key = {"Authorization": "Bearer a secret that is long"}
    assert httpx.post(f"{served.url}/v1/files", content=GOOD, headers=FORM | key, trust_env=False).status_code == 200
    assert httpx.get(
        f"{served.url}/v1/files", headers={"x-api-key": "a secret that is long"}, trust_env=False
    ).json()["data"], "the key is the owner, however it is sent"
