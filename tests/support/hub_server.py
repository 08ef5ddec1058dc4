"""A hub on the loopback: it speaks the Hugging Face hub's protocol (and ModelScope's), and fails on request.

Large files are redirected to `localhost`, another host than the `127.0.0.1` of the hub, as the real one does with its
storage. Each fault is used up by one request for a file's bytes.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What goes wrong with one response."""

    status: int = 0
    """Answer this instead."""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int = -1
    """Close the connection after so many bytes of the body."""
    announce: int = 0
    """Add this to Content-Length, and send that much more or less."""
    corrupt: bool = False
    """Change a byte."""
    ignore_range: bool = False
    shift_range: bool = False
    """Start elsewhere than asked, and say so."""
    stall_after: int = -1
    """Send so many bytes, then wait until `Hub.released`."""


@dataclass
class Hub:
    """What the server holds and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """`ORG/REPO/PATH` → contents."""
    large: int = 10_000
    """Files from this size are in large-file storage."""
    tags: list[str] = field(default_factory=lambda: ["license:apache-2.0"])
    faults: deque[Fault] = field(default_factory=deque)
    list_faults: deque[Fault] = field(default_factory=deque)
    listing: Any = None
    """Answer this to every request for a list, instead of the truth."""
    bare: bool = False
    """List only names, as some mirrors do."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """(method, path, headers), headers in lower case."""
    released: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Hub()")  # hypothesis would print every byte of every file

    @property
    def url(self) -> str:
        """Address of the hub."""
        return f"http://127.0.0.1:{self.port}"

    def bytes_requests(self, name: str = "") -> list[dict[str, str]]:
        """Headers of the requests for the bytes of a file, after redirects."""
        return [h for method, path, h in self.requests if method == "GET" and "/cdn/" in path and name in path]


class _QuietServer(ThreadingHTTPServer):
    """Says nothing when a client hangs up: it would stand in what a command printed meanwhile in this process."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave it at that."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server while the block runs."""
    server = _QuietServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        path = unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if path.startswith("api/models/"):
            self._list("/".join(parts[2:4]))
        elif path.startswith("api/v1/models/"):
            self._modelscope("/".join(parts[3:5]), parts[5:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        elif parts[0] == "cdn":
            self._bytes("/".join(parts[1:]))
        else:
            self._answer(404, b"")

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _files(self, repository: str) -> dict[str, bytes]:
        start = repository + "/"
        return {name[len(start) :]: data for name, data in self.hub.files.items() if name.startswith(start)}

    def _list(self, repository: str) -> None:
        if self.hub.list_faults:
            fault = self.hub.list_faults.popleft()
            self._answer(fault.status, b"busy", **fault.headers)
            return
        if self.hub.listing is not None:
            self._json(self.hub.listing)
            return
        files = self._files(repository)
        if not files:
            self._answer(404, b"", X_Error_Code="RepoNotFound")
            return
        siblings = [
            {"rfilename": name} if self.hub.bare else self._sibling(name, data) for name, data in files.items()
        ]
        self._json({"id": repository, "sha": REVISION, "tags": self.hub.tags, "siblings": siblings})

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_id(data)}
        if len(data) >= self.hub.large:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
        return entry

    def _resolve(self, repository: str, path: str) -> None:
        data = self.hub.files.get(f"{repository}/{path}")
        if data is None:
            self._answer(404, b"", X_Error_Code="EntryNotFound")
            return
        facts = {"X_Repo_Commit": REVISION}
        host = "127.0.0.1"
        if len(data) >= self.hub.large:
            host = "localhost"
            facts |= {"X_Linked_Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Linked_Size": str(len(data))}
        elif self.command == "HEAD":
            self._answer(200, data, ETag=f'"{git_id(data)}"', **facts)
            return
        self._answer(302, b"", Location=f"http://{host}:{self.hub.port}/cdn/{repository}/{path}", **facts)

    def _modelscope(self, repository: str, rest: list[str]) -> None:
        files = self._files(repository)
        if not files:
            self._answer(404, b'{"Code": 10010205001, "Message": "no such model"}')
        elif rest == ["repo", "files"]:
            listed = [
                {"Path": name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}
                for name, data in files.items()
            ]
            self._json({"Code": 200, "Success": True, "Data": {"Files": listed}})
        elif rest == ["repo"]:
            path = parse_qs(urlsplit(self.path).query)["FilePath"][0]
            self._answer(302, b"", Location=f"http://localhost:{self.hub.port}/cdn/{repository}/{path}")
        else:
            self._answer(404, b"{}")

    def _bytes(self, name: str) -> None:
        data = self.hub.files.get(name)
        fault = self.hub.faults.popleft() if self.hub.faults else Fault()
        if data is None or fault.status:
            self._answer(fault.status or 404, b"trouble", **fault.headers)
            return
        start, asked, status = 0, self.headers.get("Range"), 200
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:16]}"', **fault.headers}
        if asked and not fault.ignore_range and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            if start >= len(data):
                self._answer(416, b"", Content_Range=f"bytes */{len(data)}")
                return
            end = min(int(last) + 1, len(data)) if last else len(data)
            start += 1 if fault.shift_range else 0
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{len(data) + fault.announce}"
            data = data[:end]
        body = data[start:]
        if fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault.announce > 0:
            body += bytes(fault.announce)
        elif fault.announce < 0:
            body = body[: fault.announce]
        self._send(status, body, headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault) -> None:
        if fault.cut_after < 0 and fault.stall_after < 0:
            self._answer(status, body, **headers)
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[: max(fault.cut_after, fault.stall_after)])
        self.wfile.flush()
        if fault.stall_after >= 0:
            self.hub.stalled.set()
            self.hub.released.wait(60)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def git_id(data: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
