"""One file from a server to the disk: resumed after an interruption, verified, and moved into place only then.

What has arrived lies in a hidden `.part` file beside the target, named after the version it belongs to, so that a
later call, from this process or another, resumes it. The file gets its name once size and checksum match. Two
processes must not fetch the same file at once: the caller holds a lock.

Requests go through huggingface_hub's session for every server, and through the fetch policy of `system.addresses`
when a client of the server asked for them: its proxies, certificates, timeouts and offline switch then work the same
everywhere. It follows redirects and drops keys when they lead to another host.
The library's own download is not used because it starts over after a process has ended, and accepts a file of the
right size without checking its checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from edge_runtime.errors import DownloadError, StoreError
from edge_runtime.store.names import LOOPBACK, visible
from edge_runtime.system.atomic_files import FILE_MODE, FULL, make_folder, open_for_owner, why_not_written

ATTEMPTS = 5
"""Failures in a row, without a byte gained in between, before the download is given up."""
OFFLINE_ATTEMPTS = 2
"""The same where no server was ever reached: most likely there is no network, which is said within seconds."""
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 60.0
CHUNK_BYTES = 1 << 20
MAX_BYTES = 1 << 50
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server describes it."""

    path: str
    """Its path in the repository, checked by `names.checked_path`."""
    url: str
    size: int | None = None
    """In bytes; None when the server does not say."""
    digest: str = ""
    """`sha256:HEX`, or `git:HEX` for files that git itself stores; empty: unknown."""
    version: str = ""
    """Strong ETag; shows whether an unfinished part still belongs to the file when there is no digest."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Sent along; may hold a key, so it is never shown."""


class _Trouble(Exception):  # noqa: N818 - not an error yet
    """A failure that may not happen again."""

    def __init__(self, what: str, wait_s: float | None = None, *, unreachable: bool = False) -> None:
        super().__init__(what)
        self.wait_s, self.unreachable = wait_s, unreachable


def download(file: RemoteFile, target: Path, on_bytes: Callable[[int], None] = lambda done: None) -> None:
    """Fetch a file, resuming an interrupted download.

    Parameters
    ----------
    target : where it goes; its folder is created if needed, an existing file is replaced.
    on_bytes : called with the number of bytes downloaded so far.

    Raises
    ------
    DownloadError
        When the server refuses or does not answer, when size or checksum differ from what was announced, or when the
        disk refuses it. `target` is then unchanged.
    """
    part = part_of(target, file)
    with storing(target):
        make_folder(target.parent)
        _persist(file.path, lambda: _continue(file, part, on_bytes), lambda: _size(part))
        found = digest_of(part, file.digest)
        if found != file.digest:
            part.unlink()
            raise DownloadError(
                f"{visible(file.path)} arrived with the checksum {found[:23]}..., expected {file.digest[:23]}...; "
                "it was removed. Pull again; if that does not help, the server or a proxy on the way is at fault."
            )
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        part.replace(target)


def part_of(target: Path, file: RemoteFile) -> Path:
    """Path of the unfinished file; each version of a file has its own."""
    version = hashlib.sha256((file.digest or file.version or file.url).encode()).hexdigest()[:12]
    return target.with_name(f".{target.name}.{version}.part")


def ask(what: str, call: Callable[[], T]) -> T:
    """Ask a server for something small, retrying while it is busy.

    Parameters
    ----------
    what : named in the error.
    call : the request; the exceptions of httpx and huggingface_hub are understood.

    Raises
    ------
    DownloadError
    """

    def once() -> T:
        try:
            with _troubles(what):
                session()  # so that the hub's own requests follow the policy, too
                return call()
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or of another shape
            raise DownloadError(
                f"The server's answer about {visible(what)} cannot be read ({type(error).__name__}); if "
                "HF_ENDPOINT or a proxy is set, check that it points to a hub."
            ) from None

    return _persist(what, once, lambda: 0)


def probe(url: str, headers: Mapping[str, str]) -> tuple[int | None, str]:
    """Size and strong ETag of a file on any server; both may be unknown.

    Asks for the first byte: servers whose addresses are signed for GET refuse HEAD.
    """

    def call() -> tuple[int | None, str]:
        with _request(url, {**headers, "Range": "bytes=0-0"}) as response:
            _check_status(response)
            return _total(response), _strong_etag(response)

    return ask(url.split("?")[0], call)


def refuse_offline(what: str) -> None:
    """Raise `DownloadError` when the hub's offline switch is set."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise _offline(what)


def _offline(what: str) -> DownloadError:
    return DownloadError(
        f"{visible(what)} was not fetched: HF_HUB_OFFLINE is set. Unset it to pull; models on this machine run "
        "without a connection."
    )


def digest_of(path: Path, like: str) -> str:
    """Checksum of a file, of the same kind as `like`; empty if `like` is."""
    kind = like.partition(":")[0]
    if not kind:
        return ""
    with path.open("rb") as stream:
        if kind == "git":
            header = f"blob {path.stat().st_size}\0".encode()
            found = hashlib.sha1(header, usedforsecurity=False)
            while chunk := stream.read(CHUNK_BYTES):
                found.update(chunk)
            return f"git:{found.hexdigest()}"
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


@contextlib.contextmanager
def storing(path: Path, again: str = "pull again to resume") -> Iterator[None]:
    """Report in one sentence what the disk refused.

    Parameters
    ----------
    path : the file or folder that is written.
    again : what to do once there is space.

    Raises
    ------
    StoreError
    """
    try:
        yield
    except OSError as error:
        advice = f"free some space and {again}" if error.errno in FULL else "check its permissions"
        raise StoreError(
            f"{why_not_written(error, path)}; {advice}, or point EDGE_RUNTIME_MODELS to a folder on another disk."
        ) from None


def _persist(what: str, once: Callable[[], T], gained: Callable[[], int]) -> T:
    """Retry until it works, waiting longer each time; an attempt that made progress does not count."""
    failures, was_reached = 0, False
    while True:
        before = gained()
        try:
            return once()
        except _Trouble as trouble:
            failures = 1 if gained() > before else failures + 1
            was_reached = was_reached or not trouble.unreachable
            if failures >= (ATTEMPTS if was_reached or before else OFFLINE_ATTEMPTS):
                raise DownloadError(
                    f"{visible(what)} could not be fetched: {trouble}, after {failures} attempts; check the "
                    "connection and pull again to resume."
                ) from None
            wait = FIRST_WAIT_S * 2 ** (failures - 1) if trouble.wait_s is None else trouble.wait_s
            time.sleep(min(wait, MAX_WAIT_S))


def _continue(file: RemoteFile, part: Path, on_bytes: Callable[[int], None]) -> None:
    """Append what is missing. Returns when the file is complete, judged by its length."""
    have = _size(part)
    if file.size is not None and have > file.size:
        part.unlink()
        have = 0
    if have == file.size:
        part.touch(FILE_MODE)  # creates an empty file, too
        on_bytes(have)
        return
    headers = {**file.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if not file.digest and file.version:
            headers["If-Range"] = file.version
    with _troubles(file.path), _request(file.url, headers) as response:
        if response.status_code == 416:  # the part is longer than the file: another version
            part.unlink(missing_ok=True)
            raise _Trouble("the server has no bytes after those already here", 0)
        _check_status(response)
        resumed = response.status_code == 206
        if resumed and _first_byte(response) != have:
            part.unlink(missing_ok=True)
            raise _Trouble("the server resumed at another position than asked for", 0)
        total = file.size if file.size is not None else _total(response)
        _check_announced(file, response, total)
        done = have if resumed else 0
        with open(part, "ab" if resumed else "wb", opener=open_for_owner) as out:
            for chunk in response.iter_raw():  # as it arrives: buffered bytes would be lost if the connection breaks
                done += len(chunk)
                if total is not None and done > total:
                    break
                out.write(chunk)
                on_bytes(done)
        if total is not None and done > total:
            part.unlink()
            raise _Trouble(f"more than the announced {total} bytes arrived")
        if total is not None and done < total:
            raise _Trouble(f"the connection closed after {done} of {total} bytes")


def _check_announced(file: RemoteFile, response: Any, total: int | None) -> None:
    """Refuse a response of another length before a byte is written: it is an error page, or another file."""
    announced = _total(response)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise _Trouble("the server compresses the file, which was not asked for")
    if announced is not None and announced != total:
        raise _Trouble(f"the server sends {announced} bytes, expected {total}")
    if announced is not None and announced > MAX_BYTES:
        raise DownloadError(
            f"{visible(file.path)} is announced with {announced} bytes; expected the size of a model. Check the name."
        )


def session() -> Any:
    """huggingface_hub's client, whose requests follow the current context's policy."""
    from huggingface_hub import get_session

    from edge_runtime.system.addresses import checked

    return checked(get_session())


@contextlib.contextmanager
def _request(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """Stream a response; a redirect may not lead from a secure address to an insecure one."""
    from huggingface_hub import constants

    with session().stream("GET", url, headers=dict(headers), timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        if response.url.scheme != "https" and urlsplit(url).scheme == "https" and response.url.host not in LOOPBACK:
            raise DownloadError(
                f"{urlsplit(url).hostname} redirects to an address that is not secure ({response.url.host}); "
                "expected https. Nothing was fetched."
            )
        yield response


@contextlib.contextmanager
def _troubles(what: str) -> Iterator[None]:
    """Exceptions of httpx and of the hub become `_Trouble` when waiting may help, else `DownloadError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise _offline(what) from None
    except HfHubHTTPError as error:
        _check_status(error.response, what)
        raise _Trouble(f"the server answered {error.response.status_code}") from None
    except (httpx2.UnsupportedProtocol, httpx2.InvalidURL):
        raise DownloadError(
            f"{visible(what)} leads to an address that is neither http nor https; check HF_ENDPOINT and the name."
        ) from None
    except httpx2.HTTPError as error:
        # Their texts may hold a redirect's address with a signature in it: report only their kind.
        raise _Trouble(_kind(error), unreachable=isinstance(error, httpx2.ConnectError)) from None


def _kind(error: Exception) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"the connection failed ({words})"


def _check_status(response: Any, what: str = "") -> None:
    status = response.status_code
    if status < 300:
        return
    subject = visible(what) or f"{response.url.host}"
    if status in BUSY:
        raise _Trouble(f"the server answered {status}", _retry_after(response))
    if status in (401, 403):
        raise DownloadError(
            f"{subject} refuses access ({status}). It may not exist, be private, or need its licence accepted on its "
            "page first; set a token in HF_TOKEN or with 'hf auth login'."
        )
    if status in (404, 410):
        raise DownloadError(f"{subject} does not have this model or file ({status}); check the spelling of the name.")
    raise DownloadError(f"{subject} answered {status}, expected the file; check the name.")


def _retry_after(response: Any) -> float | None:
    """Seconds a busy server asks clients to wait; the header's second form, a date, is read too."""
    text = response.headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _total(response: Any) -> int | None:
    """Length of the whole file, as the response states it."""
    headers = response.headers
    text = headers.get("Content-Range", "").rpartition("/")[2] if response.status_code == 206 else None
    text = headers.get("Content-Length", "") if text is None else text
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _first_byte(response: Any) -> int | None:
    match = re.fullmatch(r"bytes (\d{1,19})-\d{1,19}/(?:\d{1,19}|\*)", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _strong_etag(response: Any) -> str:
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') else ""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
