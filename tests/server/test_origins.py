"""Which pages may ask: wildcards that the owner writes, Ollama's own defaults, and what is no origin of a page."""

from __future__ import annotations

import pytest

from edge_runtime.errors import MessageError
from edge_runtime.server.app import create_app
from edge_runtime.server.middleware.origins import OLLAMA_DEFAULTS, allowed_origins
from edge_runtime.server.settings import Settings
from server.test_limits import KEY, ask


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "http://*.app.example",
            ["http://a.app.example", "http://a.b.app.example", "http://a.app.example:80"],
            ["http://app.example", "https://a.app.example", "http://a.app.example:81", "http://evilapp.example"],
        ),
        (
            "http://localhost:*",
            ["http://localhost", "http://localhost:3000", "http://localhost:65535"],
            [
                "https://localhost:3000",
                "http://localhost.evil.example",
                "http://localhost:evil.example",
                "http://localhost:",
            ],
        ),
        (
            "http://192.168.0.7:*",
            ["http://192.168.0.7:8080"],
            ["http://192.168.0.70:8080", "http://192.168.0.7.evil.example"],
        ),
        ("https://*.app.example:*", ["https://a.app.example:8443"], ["https://app.example:8443"]),
        (
            "app://*",
            ["app://obsidian.md", "app://-", "app://"],
            ["app://obsidian.md/x", "xapp://obsidian.md", "null"],
        ),
        ("file://*", ["file://"], ["file", "null", "filex://"]),
        ("chrome-extension://abcdefghijklmnop", ["chrome-extension://abcdefghijklmnop"], ["chrome-extension://abc"]),
        ("moz-extension://*", ["moz-extension://2c127fa4-62c7-7e4f-90e5-472b45eecfdc"], ["moz-extension://a b"]),
        ("http://*", ["http://any.example", "http://any.example:81"], ["https://any.example", "http://a@b"]),
        ("HTTPS://App.Example/", ["https://app.example", "https://app.example:443"], ["https://app.example:80"]),
        ("http://[::1]:*", ["http://[::1]:5173", "http://[::1]"], ["http://[::2]:5173"]),
        ("http://app.example:80", ["http://app.example"], ["http://app.example:8080", "http://appxexample"]),
        ("http://*:3000", ["http://a.example:3000"], ["http://a.example:3001", "http://a.example"]),
    ],
)
def test_patterns(pattern, yes, no):
    settings = Settings(cors_origins=(pattern,), api_key=KEY)  # with a key, nobody else is let in
    for origin in yes:
        reply = ask(settings, "GET", "/api/size", headers={"Origin": origin, "x-api-key": KEY})
        assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (200, origin), origin
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        assert ask(settings, "OPTIONS", "/api/size", headers=preflight).status_code == 200
    for origin in no:
        reply = ask(settings, "GET", "/api/size", headers={"Origin": origin, "x-api-key": KEY})
        assert reply.status_code == 403, origin
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "null",
            "",
            "app.example",
            "*.app.example",
            "http://",
            "://x",
            "http://a.example/path",
            "http://a.example?x",
        ),
        *("http://a*.example", "http://a.*.example", "http://*.*.example", "http://a.example:*0", "http://192.168.*"),
        *("http://a.example:123456", "http://a.example http://b.example", "http://a.example,http://b.example"),
        *("http://user@a.example", "http://bücher.example", "http*://a.example", "**", "http://*a.example", "*://*"),
    ],
)
def test_what_is_no_origin_is_refused_at_the_start(pattern, own_store):
    with pytest.raises(MessageError, match="--cors was given"):
        create_app(Settings(cors_origins=("http://a.example", pattern)))


PAGES = [
    *(
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:8443",
        "http://127.0.0.1:5173",
        "http://0.0.0.0:80",
    ),
    *(
        "https://127.0.0.1",
        "app://obsidian.md",
        "file://",
        "tauri://localhost",
        "vscode-webview://1a2b",
        "vscode-file://x",
    ),
]


@pytest.mark.parametrize("origin", PAGES)
def test_ollamas_defaults_on_this_machine_without_a_key(origin):
    reply = ask(Settings(), "GET", "/api/size", headers={"Origin": origin})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, origin)
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-y"}
    assert ask(Settings(), "OPTIONS", "/api/size", headers=preflight).status_code == 200
    also = Settings(cors_origins=("http://app.example",))
    assert ask(also, "GET", "/api/size", headers={"Origin": origin}).status_code == 200


@pytest.mark.parametrize("settings", [{"api_key": KEY}, {"host": "0.0.0.0"}, {"host": "192.168.0.7", "api_key": KEY}])
def test_no_defaults_where_others_can_reach_the_server_or_a_key_is_asked_for(settings):
    assert allowed_origins(Settings(**settings)) is None
    for origin in PAGES:
        headers = {"Origin": origin, "x-api-key": KEY}
        reply = ask(Settings(**settings), "GET", "/api/size", headers=headers)
        assert reply.status_code == 403, origin
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "null",
            "",
            "http://localhost.evil.example",
            "http://localhost:80.evil.example",
            "http://evil.example:11434",
        ),
        *("http://127.0.0.1.evil.example", "http://127.0.0.1@evil.example", "http://[::1]:3000", "ftp://localhost"),
        *("http://localhost:3000, http://evil.example", "http://evil.example/app://x", "http://evil.example#app://x"),
        *("evil-app://x", "http://127.0.0.2:80", "http://sub.localhost.evil.example", "http://Localhost"),
    ],
)
def test_never_by_default(origin):
    reply = ask(Settings(), "POST", "/api/size", headers={"Origin": origin}, content=b"x")
    assert reply.status_code == 403
    assert "access-control-allow-origin" not in reply.headers


def test_the_defaults_are_ollamas():
    """As envconfig.AllowedOrigins lists them, two entries (with and without port) being one here."""
    hosts = ("localhost", "127.0.0.1", "0.0.0.0")
    assert set(OLLAMA_DEFAULTS) == {f"{scheme}://{host}:*" for scheme in ("http", "https") for host in hosts} | {
        "app://*",
        "file://*",
        "tauri://*",
        "vscode-webview://*",
        "vscode-file://*",
    }
