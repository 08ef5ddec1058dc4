"""Origins of web pages that may use the server: what the owner names, with wildcards, and what Ollama allows.

Each becomes one regular expression over the `Origin` header. An invalid origin is refused when the
server starts; so is `null`, which any page can send from a sandboxed frame.
"""

from __future__ import annotations

import re

from edge_runtime.errors import MessageError
from edge_runtime.server.settings import Settings

ANY = "*"
OLLAMA_DEFAULTS = (
    *(f"{scheme}://{host}:*" for host in ("localhost", "127.0.0.1", "0.0.0.0") for scheme in ("http", "https")),
    *(f"{scheme}://*" for scheme in ("app", "file", "tauri", "vscode-webview", "vscode-file")),
)
"""Pages on this machine at any port, and desktop programs built from pages (Ollama's envconfig.AllowedOrigins)."""

_FORM = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>\*|(?:\*\.)?[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\])"
    r"(?::(?P<port>\*|[0-9]{1,5}))?"
)
_USUAL_PORT = {"http": "80", "https": "443"}
_PORT, _NAMES = r"(?::[0-9]{1,5})?", r"(?:[a-z0-9_-]+\.)+"
_ANY_HOST = r"[^\s/?#@\\,]*"  # with a port; empty in file://


def origin_expression(origin: str) -> str:
    """The regular expression of an origin: SCHEME://HOST[:PORT]; host, its first label or port may be `*`.

    Raises
    ------
    MessageError
        When it is not an origin.
    """
    form = _FORM.fullmatch(origin.strip().lower().removesuffix("/"))
    if form is None:
        raise MessageError(
            f"--cors was given {origin[:80]!r}, which is not an origin; expected SCHEME://HOST or "
            "SCHEME://HOST:PORT without a path, such as https://app.example, http://*.app.example, "
            "http://192.168.0.7:*, app://*, or * for all pages."
        )
    scheme, host, port = form["scheme"], form["host"], form["port"]
    usual = _USUAL_PORT.get(scheme)
    if host == ANY:
        shown = _ANY_HOST if port in (None, ANY) else rf"[^\s/?#@\\,:]+:{port}"
    else:
        shown = _NAMES + re.escape(host[2:]) if host.startswith("*.") else re.escape(host)
        if port == ANY:
            shown += _PORT
        elif usual is not None and port in (None, usual):  # browsers leave it out
            shown += f"(?::{usual})?"
        elif port is not None:
            shown += f":{port}"
    return f"{re.escape(scheme)}://{shown}"


def allowed_origins(settings: Settings) -> re.Pattern[str] | None:
    """What an `Origin` must match completely, besides the server's own; None if no other page is allowed.

    `*` is not part of it, since it allows `null`, too. A server that only this machine can reach and that has no key
    allows Ollama's default origins, as Ollama does.

    Raises
    ------
    MessageError
        Names the invalid origin.
    """
    named = [origin for origin in settings.cors_origins if origin != ANY]
    defaults = OLLAMA_DEFAULTS if settings.is_loopback and settings.api_key is None else ()
    found = [origin_expression(origin) for origin in (*named, *defaults)]
    return re.compile("|".join(found)) if found else None
