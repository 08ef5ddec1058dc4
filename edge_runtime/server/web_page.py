"""The web page, and what Ollama's clients expect at `/`.

Static files of the package, read once and sent with headers under which the page can only run its own scripts and
only contact this server. A client's name is looked up in a table of the files; it is never opened as a path. The
page holds no secret, so it needs no key; its API requests do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from edge_runtime.server.errors import ServerError

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).with_name("static")
PAGE, WORKER = "index.html", "sw.js"
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
"""Spelled out: `mimetypes` reads tables of the machine, which may hold anything."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",  # pictures that the user attached
        "media-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",  # no foreign page can overlay ours
        "require-trusted-types-for 'script'",  # innerHTML and the like throw, so no text can become markup
        "trusted-types page",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # cached but revalidated: an old page must not talk to an updated server
}


class NoSuchFile(ServerError):  # noqa: N818 - says what is the matter
    """A name that is not a file of the page."""

    status = 404


@dataclass(frozen=True)
class StaticFile:
    """A file of the page as it is sent."""

    body: bytes
    media_type: str
    etag: str


@cache
def static_files() -> dict[str, StaticFile]:
    """Every file of the page by its name, such as `vendor/temml/temml.js`.

    The service worker carries a digest of all others, so a browser notices any change of the page by the one file
    that it checks on its own.
    """
    paths = sorted(path for path in FOLDER.rglob("*") if path.suffix in TYPES)
    bodies = {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in paths}
    version = _digest(b"".join(name.encode() + body for name, body in bodies.items()))
    bodies[WORKER] = bodies[WORKER].replace(b"VERSION", version.encode())
    return {name: StaticFile(body, TYPES[Path(name).suffix], f'"{_digest(body)}"') for name, body in bodies.items()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


@router.api_route("/", methods=["GET", "HEAD"])
async def root(request: Request) -> Response:
    """Show the page to browsers, and say to everybody else what Ollama's clients look for."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})
    return _sent(request, PAGE)


@router.api_route("/sw.js", methods=["GET", "HEAD"])
async def worker(request: Request) -> Response:
    """Send the service worker; it controls the folder it comes from, so it is not in `/static`."""
    return _sent(request, WORKER)


@router.api_route("/static/{name:path}", methods=["GET", "HEAD"])
async def static(request: Request, name: str) -> Response:
    """Send a file of the page."""
    return _sent(request, name)


def _sent(request: Request, name: str) -> Response:
    found = static_files().get(name)
    if found is None:
        raise NoSuchFile("The page has no such file.")
    headers = {**HEADERS, "ETag": found.etag, "Vary": "Accept"}
    if found.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(found.body, media_type=found.media_type, headers=headers)
