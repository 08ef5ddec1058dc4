"""Downloads from a server that fails: afterwards the file is right or absent, and asking again completes it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.errors import DownloadError
from edge_runtime.store import download as module
from edge_runtime.store.download import RemoteFile, download, part_of
from store.conftest import KEY
from support.hub_server import Fault, Hub, git_id

DATA = np.random.default_rng(5).bytes(300_000)
NAME = "org/data/weights.bin"


@pytest.fixture
def file(hub: Hub) -> RemoteFile:
    hub.files[NAME] = DATA
    url = f"{hub.url}/org/data/resolve/main/weights.bin"
    headers = {"authorization": f"Bearer {KEY}"}
    return RemoteFile("weights.bin", url, len(DATA), f"sha256:{hashlib.sha256(DATA).hexdigest()}", headers=headers)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "weights.bin"


def whole(target: Path) -> bool:
    """Right, and nothing beside it."""
    return target.read_bytes() == DATA and [path.name for path in target.parent.iterdir()] == [target.name]


BUSY = [Fault(status=status, headers={"Retry_After": "0"}) for status in (429, 503, 500, 408)]

OVERCOME = {
    "nothing wrong": [],
    "cut in the middle": [Fault(cut_after=100_000)],
    "cut before the first byte": [Fault(cut_after=0)],
    "cut again and again": [Fault(cut_after=n) for n in (1000, 2000, 0, 3000, 70_000, 0, 1, 1)],
    "busy for a while": BUSY,
    "busy until some date": [Fault(status=503, headers={"Retry_After": "Wed, 21 Oct 2015 07:28:00 GMT"})],
    "busy, and Retry-After is nonsense": [Fault(status=429, headers={"Retry_After": "soon"})],
    "cut, then the rest in one piece from the start": [Fault(cut_after=100_000), Fault(ignore_range=True)],
    "cut, then the rest from another place": [Fault(cut_after=100_000), Fault(shift_range=True)],
    "cut, then another length": [Fault(cut_after=100_000), Fault(announce=-5)],
    "a page of a proxy, then the file": [Fault(announce=-299_000)],
    "packed": [Fault(headers={"Content_Encoding": "gzip"})],
}


@pytest.mark.parametrize("faults", OVERCOME.values(), ids=OVERCOME.keys())
def test_troubles_that_end(hub, file, target, faults):
    hub.faults.extend(faults)
    seen = []
    download(file, target, seen.append)
    assert whole(target)
    assert not hub.faults, "every fault must have happened"
    assert seen[-1] == len(DATA)


REFUSED = {
    "always cut before the first byte": ([Fault(cut_after=0)] * 9, "connection failed .*5 attempts"),
    "always busy": ([Fault(status=503)] * 9, "answered 503, after 5 attempts"),
    "always too many requests": ([Fault(status=429, headers={"Retry_After": "9999"})] * 9, "answered 429"),
    "longer than announced": ([Fault(announce=7)] * 9, "sends 300007 bytes, expected 300000"),
    "shorter than announced": ([Fault(announce=-7)] * 9, "sends 299993 bytes, expected 300000"),
    "other bytes": ([Fault(corrupt=True)], "arrived with the checksum sha256:.*, expected sha256:"),
    "cut, and other bytes behind it": ([Fault(cut_after=9), Fault(corrupt=True)], "arrived with the checksum"),
    "gone": ([Fault(status=404)], "does not have this model or file .404."),
    "no access": ([Fault(status=403)], "refuses access .403..*HF_TOKEN"),
    "a teapot": ([Fault(status=418)], "answered 418"),
}


@pytest.mark.parametrize(("faults", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_troubles_that_do_not_end(hub, file, target, faults, reason):
    hub.faults.extend(faults)
    with pytest.raises(DownloadError, match=reason) as error:
        download(file, target)
    assert not target.exists()
    assert KEY not in str(error.value)
    assert len(hub.bytes_requests()) <= module.ATTEMPTS + 1
    hub.faults.clear()
    download(file, target)
    assert whole(target)


NONSENSE = st.sampled_from(
    ["", "bytes 0-9/10", "bytes */*", "bytes 5-2/1", "bytes 99999999999999999999-1/1", "x", "-1"]
)
FAULTS = st.builds(
    Fault,
    status=st.sampled_from([0] * 12 + [200, 204, 206, 404, 408, 416, 429, 500, 503]),
    headers=st.dictionaries(st.sampled_from(["Content_Range", "Retry_After", "ETag", "Content_Encoding"]), NONSENSE),
    cut_after=st.sampled_from([-1, 0, 1, 1000, 150_000, 299_999, 300_000]),
    announce=st.sampled_from([0] * 6 + [-300_000, -1, 1, 70_000]),
    corrupt=st.integers(0, 9).map(lambda n: n == 0),
    ignore_range=st.booleans(),
    shift_range=st.integers(0, 4).map(lambda n: n == 0),
)


@given(st.lists(FAULTS, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_goes_wrong_the_file_is_right_or_absent(hub, file, target, faults):
    shutil.rmtree(target.parent, ignore_errors=True)
    hub.faults = deque(faults)
    with contextlib.suppress(DownloadError):
        download(file, target)
        assert whole(target)
    if target.exists():
        assert whole(target)
    hub.faults.clear()
    with contextlib.suppress(DownloadError):  # a wrong byte among those that were kept is found out at the end
        download(file, target)
    download(file, target)
    assert whole(target)


def test_what_has_arrived_is_not_fetched_again(hub, file, target):
    hub.faults.extend([Fault(cut_after=200_000), *[Fault(status=500)] * 9])
    with pytest.raises(DownloadError):
        download(file, target)
    arrived = part_of(target, file).stat().st_size
    assert 0 < arrived <= 200_000
    hub.faults.clear()
    download(file, target)
    assert hub.bytes_requests()[-1]["range"] == f"bytes={arrived}-"
    assert whole(target)


def test_a_killed_process_leaves_what_the_next_one_needs(hub, file, target):
    hub.faults.append(Fault(stall_after=150_000))
    code = (
        "from pathlib import Path; from edge_runtime.store.download import RemoteFile, download\n"
        f"download(RemoteFile('weights.bin', {file.url!r}, {file.size}, {file.digest!r}), Path({str(target)!r}))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "HF_ENDPOINT": hub.url})
    assert hub.stalled.wait(30)
    part = part_of(target, file)
    for _ in range(500):
        if part.exists() and part.stat().st_size == 150_000:
            break
        module.time.sleep(0.01)
    child.kill()
    child.wait()
    assert not target.exists()
    download(file, target)
    assert whole(target)
    assert hub.bytes_requests()[-1]["range"] == "bytes=150000-"


@pytest.mark.parametrize("left", [b"x" * 400_000, b"x" * 300_000, b"x" * 1000], ids=["longer", "as long", "other"])
def test_a_part_with_other_bytes_is_found_out(hub, file, target, left):
    target.parent.mkdir()
    part_of(target, file).write_bytes(left)
    if len(left) <= len(DATA):
        with pytest.raises(DownloadError, match="arrived with the checksum"):
            download(file, target)
        assert not target.exists()
    download(file, target)
    assert whole(target)


def test_keys_stay_with_the_hub(hub, file, target):
    download(file, target)
    asked = [(path, headers.get("authorization")) for _, path, headers in hub.requests]
    assert asked[0] == ("/org/data/resolve/main/weights.bin", f"Bearer {KEY}")
    assert asked[1] == ("/cdn/org/data/weights.bin", None), "the storage is another host and must not get the key"
    assert KEY not in repr(file)


def test_a_file_of_git_is_checked_too(hub, target):
    hub.files["org/data/config.json"] = b"{}"
    url = f"{hub.url}/org/data/resolve/main/config.json"
    good = RemoteFile("config.json", url, 2, f"git:{git_id(b'{}')}")
    download(good, target)
    assert target.read_bytes() == b"{}"
    with pytest.raises(DownloadError, match="checksum git:"):
        download(RemoteFile("config.json", url, 2, f"git:{git_id(b'[]')}"), target)
    assert target.read_bytes() == b"{}", "a file that is there stays as it is"


def test_without_size_and_checksum_the_version_counts(hub, target):
    """As from any server: a part is continued only while the server has the same version of the file."""
    hub.files[NAME] = DATA
    size, version = module.probe(f"{hub.url}/cdn/{NAME}", {})
    assert size == len(DATA)
    plain = RemoteFile("weights.bin", f"{hub.url}/cdn/{NAME}", None, "", version)
    hub.faults.extend([Fault(cut_after=1000), *[Fault(status=500)] * 9])
    with pytest.raises(DownloadError):
        download(plain, target)
    hub.faults.clear()
    hub.files[NAME] = DATA[::-1]
    download(plain, target)
    assert hub.bytes_requests()[-1]["if-range"] == version
    assert target.read_bytes() == DATA[::-1], "the new version, not half of each"


def test_an_empty_file(hub, target):
    hub.files["org/data/empty"] = b""
    digest = f"sha256:{hashlib.sha256().hexdigest()}"
    download(RemoteFile("empty", f"{hub.url}/cdn/org/data/empty", 0, digest), target)
    assert target.read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_is_one_sentence(file, target):
    target.parent.mkdir()
    part_of(target, file).symlink_to("/dev/full")
    with pytest.raises(
        DownloadError,
        match=r"weights.bin cannot be written: the disk is full \(.* MB are free\); free some space and pull again",
    ):
        download(file, target)
    assert not target.exists()


def test_nobody_there(tmp_path, hub, target):
    with pytest.raises(DownloadError, match=r"connection failed \(connect error\), after 2 attempts"):
        download(RemoteFile("a.gguf", "http://127.0.0.1:9/a.gguf"), target)


def test_a_network_that_goes_away_is_waited_for_longer(hub, file, target):
    part = part_of(target, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b"begun")
    away = replace(file, url="http://127.0.0.1:9/a.gguf")
    with pytest.raises(DownloadError, match=r"connection failed \(connect error\), after 5 attempts"):
        download(away, target)


def test_offline(hub, file, target, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download(file, target)
    assert not hub.requests


@pytest.mark.parametrize(
    ("asked", "led_to", "fine"),
    [
        ("https://host/a", "http://host/a", False),
        ("https://host/a", "http://127.0.0.1/a", True),
        ("https://host/a", "https://other/a", True),
        ("http://mirror/a", "http://mirror/b", True),
    ],
)
def test_no_redirect_from_a_secure_address_to_an_open_one(monkeypatch, asked, led_to, fine):
    """The only stub of these tests: a server with a certificate would need one that this machine trusts."""
    answer = SimpleNamespace(url=httpx2.URL(led_to), status_code=200, headers={"Content-Length": "5"})
    session = SimpleNamespace(stream=lambda *args, **kwargs: contextlib.nullcontext(answer))
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    if fine:
        assert module.probe(asked, {}) == (5, "")
    else:
        with pytest.raises(DownloadError, match="redirects to an address that is not secure"):
            module.probe(asked, {})
