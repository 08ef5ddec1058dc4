"""Settings of a server, chosen by its owner; immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

from edge_runtime.errors import MessageError

MEGABYTE = 1 << 20
TOOLS = ("auto", "off")


@dataclass(frozen=True)
class Settings:
    """Options of `edge-runtime serve`; sizes in bytes, times in seconds."""

    host: str = "127.0.0.1"
    port: int = 11434
    """0 takes a free one."""
    models: tuple[str, ...] = ()
    """Loaded at the start: names as for `Model.load`, folders and files of the owner included. The first one answers
    requests that name no model; without any, the demo model does."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as a bearer token; None asks for nothing."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages, besides the server's own, that may use it, with wildcards (`origins`); `*` for all."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names in the Host header by which the server is reached."""
    allow_url: tuple[str, ...] = ()
    """Hosts from which pictures and models may be fetched because a request says so; none by default."""
    upstream: str | None = None
    """Server that answers requests for which there is no place here; None: they are turned away."""
    tools: str = "auto"
    """Whether models take tools: `auto` where their vocabulary can call them, `off` never."""

    max_body_bytes: int = 64 * MEGABYTE
    """Of one request; uploads of model files (blobs) have their own."""
    max_bodies_bytes: int | None = None
    """Of all requests together; None: four times that of one, and at most a part of the free memory."""
    max_values: int = 100_000
    """JSON values in one body, nested ones included; a conversation of a thousand messages has ten
    thousand."""
    max_depth: int = 200
    """Nested lists and objects; no API here needs more."""
    max_messages: int = 10_000
    """Of a conversation."""
    max_parts: int = 1000
    """Of one message."""
    max_tokenize_bytes: int = MEGABYTE
    """Of a text for /tokenize, which may be longer than any prompt."""
    max_blob_bytes: int = 64 << 30
    max_stored_bytes: int = 256 << 30
    """Size of the model store, whoever filled it, at which clients can no longer pull or upload."""
    max_files_bytes: int = 8 << 30
    """Of all files that clients upload for batches, and of those with answers."""
    max_file_bytes: int = 200 * MEGABYTE
    """Of one of them, as in OpenAI's batches."""
    max_names: int = 1000
    """Of models that clients made."""
    max_images: int = 64
    """Pictures in one request."""
    max_image_bytes: int = 64 * MEGABYTE
    max_pixels: int = 64_000_000
    """Of one picture."""
    max_video_bytes: int = 128 * MEGABYTE
    """Of a document, too."""
    max_video_frames: int = 180
    max_pages: int = 100
    """Pages of a document that may be looked at."""
    max_queue: int = 64
    """Running and waiting requests; further ones are asked to try again later."""
    max_queue_per_client: int | None = None
    """Of one client address; None: seven eighths of all."""
    max_connections: int = 512
    """Each costs a file descriptor, of which processes usually have 1024."""
    max_connections_per_client: int | None = None
    """Of one client address; None: three quarters of all."""
    max_tokens: int = 32_768
    """Most tokens of one answer, whatever a request asks for."""
    max_answers: int = 8
    """Most answers to one request (OpenAI's n)."""
    header_timeout_s: float = 20.0
    """For the head of a request to arrive."""
    body_timeout_s: float = 30.0
    """Allowance for clients that send or read more slowly than `min_bytes_per_s`, or not at all."""
    min_bytes_per_s: int = 1024
    """Minimum rate of bodies and answers, over any time longer than `body_timeout_s`; phones are faster."""
    request_timeout_s: float = 1800.0
    """From a request's arrival to the end of its answer."""
    fetch_timeout_s: float = 20.0
    decode_timeout_s: float = 30.0
    """For one picture, page or video frame to be decoded."""
    heartbeat_s: float = 1.0
    """Between heartbeats while there is nothing else to send."""
    grace_s: float = 30.0
    """For running answers after a signal."""
    keep_alive_s: float = 300.0
    """How long a model stays loaded after its last request; below 0: forever."""
    max_loaded_bytes: int | None = None
    """Most memory of all loaded models together; None: what the machine has free."""
    load: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `Model.load`, such as n_ctx and n_threads."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def queue_of_one(self) -> int:
        """Requests that one client may have open."""
        usual = self.max_queue - self.max_queue // 8
        return min(self.max_queue, self.max_queue_per_client or usual)

    @property
    def connections_of_one(self) -> int:
        """Connections that one client may have."""
        usual = self.max_connections - self.max_connections // 4
        return min(self.max_connections, self.max_connections_per_client or usual)

    def checked(self) -> Settings:
        """Return these settings if every number is in range.

        Raises
        ------
        MessageError
            Names the one that is not.
        """
        for name, value in vars(self).items():
            if name.startswith(("max_", "min_")) and value is not None and value < 1:
                raise MessageError(f"{name} is {value}; expected a positive whole number.")
            if name.endswith("_s") and name != "keep_alive_s" and not 0 < value < 1e9:
                raise MessageError(f"{name} is {value}; expected a positive number of seconds.")
        if self.tools not in TOOLS:
            raise MessageError(f"tools is {self.tools!r}; expected one of {', '.join(TOOLS)}.")
        if not 0 <= self.port <= 65535:
            raise MessageError(f"port is {self.port}; expected a number from 0 to 65535.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise MessageError("The API key is empty or holds odd characters; expected printable ASCII.")
        return self


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
