"""A model's name → where it comes from. Pure text: nothing here reads a disk or a network.

    minicpm-v-4.5[:TYPE]       an alias for one of the following; TYPE is a quantisation such as Q5_K_M
    hf:ORG/REPO[:FILE]         Hugging Face hub; FILE is a decoder, or a part of its name such as Q8_0
    ms:ORG/REPO[:FILE]         ModelScope
    ollama:NAME[:TAG]          the Ollama store of this machine
    https://HOST/FILE.gguf     any server; `#sha256=HEX` at the end is compared with what arrives

Every name and path that reaches a file system or an address is checked here first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from edge_runtime.errors import ModelFileError

OFFICIAL = "openbmb/MiniCPM-V-4_5-gguf"
ALIASES = {"minicpm-v-4.5": f"hf:{OFFICIAL}:ggml-model-Q4_K_M.gguf"}
DEMO = "demo"
"""The model that is part of the package."""
LATEST = ":latest"
"""Tag that Ollama's clients write behind names without one."""

HUBS = {"hf": "the Hugging Face hub", "ms": "ModelScope"}
MAX_NAME, MAX_PATH = 1024, 512  # characters
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PART = re.compile(r"[^\x00-\x1f\x7f-\x9f\\/:*?\"<>|]{1,200}")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names of devices on Windows
# The official files have had two names; their contents are the same.
_OFFICIAL_FILE = re.compile(r"(?:ggml-model|minicpm-v-4_5)-(?P<type>[A-Za-z0-9_]+)\.gguf", re.IGNORECASE)
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_TYPE = re.compile(r"(?<![a-z0-9])(i?q\d[a-z0-9_]*|bf16|f16|f32)(?![a-z0-9])")
_SPELLING = re.compile(
    r"(?:openbmb/)?minicpm[-_]?v(?:[-_:]?4[._]?5)?(?P<type>:(?:latest|i?q\d[a-z0-9_]*|bf16|f16|f32))?", re.IGNORECASE
)
_SHA256 = re.compile(r"[0-9a-f]{64}")

# [HOST/][NAMESPACE/]MODEL[:TAG], the characters Ollama allows; no part can begin with a dot.
_OLLAMA = re.compile(
    r"(?:(?:(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})/)?(?P<namespace>[A-Za-z0-9_][A-Za-z0-9_-]{0,79})/)?"
    r"(?P<model>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}))?"
)
OLLAMA_DEFAULTS = {"host": "registry.ollama.ai", "namespace": "library", "tag": "latest"}


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    kind: Literal["hf", "ms", "ollama", "url"]
    place: str
    """ORG/REPO, a name in the Ollama store, or an address without query and fragment."""
    file: str = ""
    """Decoder in a repository, or a part of its name; empty: the usual one."""
    address: str = ""
    """The address as given, with its query. That may hold a signature, so it is neither stored nor shown."""
    sha256: str = ""
    """Expected checksum of the file at the address, 64 hexadecimal digits."""

    @property
    def name(self) -> str:
        """The canonical spelling of this source."""
        if self.kind == "url":
            return self.place
        return f"{self.kind}:{self.place}" + (f":{self.file}" if self.file else "")


def parse_source(name: str) -> Source | None:
    """Read a model's name.

    Returns
    -------
    source : None when the name has none of the forms above; it may be a path.

    Raises
    ------
    ModelFileError
        When the name has one of the forms, but is malformed.
    """
    name = _of_alias(name)
    kind, colon, rest = name.partition(":")
    if (colon and kind in ("hf", "ms", "ollama")) or name.startswith(("https://", "http://")):
        if len(name) > MAX_NAME:
            raise ModelFileError(
                f"The name {visible(name)[:60]!r}... has {len(name)} characters, expected at most {MAX_NAME}; check "
                "it."
            )
        if kind == "ollama":
            ollama_parts(rest)
            return Source("ollama", rest)
        return _address(name) if name.startswith("http") else _repository(kind, rest, name)
    return None


def _of_alias(name: str) -> str:
    """What an alias stands for, with the type after its colon, if any; any other name is returned unchanged."""
    alias, colon, wanted = name.partition(":")
    if alias not in ALIASES or not colon or wanted == "latest":
        return ALIASES.get(alias, name) if alias in ALIASES else name
    return f"{ALIASES[alias].rpartition(':')[0]}:{wanted}"


def alias_meant(name: str) -> str:
    """The alias that another common spelling of its name means, type included; any other name unchanged.

    People and other programs write `minicpm-v`, `MiniCPM-V4.5`, `minicpm-v:4.5`. A folder may have such a name, so
    this is for names that cannot be one.
    """
    match = _SPELLING.fullmatch(name)
    return next(iter(ALIASES)) + (match["type"] or "") if match else name


def plain_name(name: str) -> str:
    """The canonical spelling of a client's name for a model, except for its case."""
    name = name.strip()
    if name.lower().endswith(LATEST):
        name = name[: -len(LATEST)]
    name = _without_prefix(_without_prefix(name, "registry.ollama.ai/"), "library/")
    for hub in ("hf.co/", "huggingface.co/"):
        if name.lower().startswith(hub):
            return "hf:" + name[len(hub) :]
    return name


def _without_prefix(name: str, prefix: str) -> str:
    return name[len(prefix) :] if name.lower().startswith(prefix) else name


def fits(path: str, wanted: str) -> bool:
    """Whether a file is the one asked for: by its whole name, or by a part between other characters."""
    if path == wanted:
        return True
    return re.search(rf"(?<![a-z0-9]){re.escape(wanted.lower())}(?![a-z0-9])", path.lower()) is not None


def type_of(path: str) -> str:
    """The type in a file's name, in lower case: `q4_k_m`; empty if there is none."""
    found = _TYPE.findall(path.lower())
    return found[-1] if found else ""


def is_meant(path: str, source: Source) -> bool:
    """Whether a decoder is the one a source names; those of the official repository match under either name."""
    if fits(path, source.file):
        return True
    match = _OFFICIAL_FILE.fullmatch(source.file)
    return source.place.lower() == OFFICIAL.lower() and match is not None and fits(path, match["type"])


def split_stem(path: str) -> str | None:
    """Name of the model that a file is one of several parts of; None if the file is not split."""
    match = _SPLIT.fullmatch(path)
    return match["stem"] if match and int(match["count"]) > 1 else None


def _repository(kind: str, rest: str, name: str) -> Source:
    repository, colon, file = rest.partition(":")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or repository.endswith((".git", ".")):
        raise ModelFileError(
            f"{visible(name)!r} is no repository name of {HUBS[kind]}; expected {kind}:ORG/REPO or "
            f"{kind}:ORG/REPO:FILE."
        )
    if colon:
        checked_path(file)
    return Source("hf" if kind == "hf" else "ms", repository, file)


def _address(name: str) -> Source:
    try:
        parts = urlsplit(name)
        host, has_login = parts.hostname or "", "@" in parts.netloc
        parts.port  # noqa: B018 - raises when it is no number
    except ValueError:
        raise ModelFileError(f"{visible(name)!r} is not a web address; expected https://HOST/FILE.gguf.") from None
    if has_login:  # never show it: it is a password
        raise ModelFileError(
            f"The address at {visible(host)} holds a user name or password, which would end up in lists and logs; "
            "expected https://HOST/FILE.gguf."
        )
    if not host or (parts.scheme != "https" and host not in LOOPBACK) or not visible(name) == name:
        raise ModelFileError(
            f"{visible(name.split('?')[0])!r} is not a secure web address; expected https://HOST/FILE.gguf."
        )
    sha256 = ""
    if parts.fragment:
        key, _, sha256 = parts.fragment.partition("=")
        if key != "sha256" or not is_sha256(sha256):
            raise ModelFileError(
                f"The address ends in #{visible(parts.fragment)[:80]}; expected #sha256= and 64 hexadecimal digits, "
                "or nothing."
            )
    file_of_address(parts.path)
    place = f"{parts.scheme}://{parts.netloc}{parts.path}"
    address = place + (f"?{parts.query}" if parts.query else "")
    return Source("url", place, address=address, sha256=sha256)


def file_of_address(path: str) -> str:
    """Name of the file at the end of an address; it must be a .gguf file."""
    name = unquote(path.rsplit("/", 1)[-1])
    if not name.lower().endswith(".gguf"):
        raise ModelFileError(
            f"The address ends in {visible(name)!r}, expected a .gguf file; give the address of the file itself."
        )
    return checked_path(name)


def checked_path(path: str) -> str:
    """Return a path inside a repository if it cannot lead anywhere else, on any system.

    Raises
    ------
    ModelFileError
        For absolute paths, `..`, hidden files, and characters or names that are special to a file system.
    """
    parts = path.split("/") if len(path) <= MAX_PATH else []
    if not parts or not all(_is_plain(part) for part in parts):
        raise ModelFileError(
            f"The file name {visible(path)[:120]!r} is not allowed; expected a plain path inside the repository, "
            "such as ggml-model-Q4_K_M.gguf."
        )
    return str(PurePosixPath(*parts))


def _is_plain(part: str) -> bool:
    return (
        _PART.fullmatch(part) is not None
        and not part.startswith(".")
        and not part.endswith((".", " "))
        and not _DEVICES.fullmatch(part)
        and part.isprintable()
        and len(part.encode("utf-8", "surrogatepass")) <= 240  # most file systems take 255 bytes
    )


def ollama_parts(name: str) -> tuple[str, str, str, str]:
    """Host, namespace, model and tag of a name in an Ollama store, each a plain folder or file name.

    Raises
    ------
    ModelFileError
        When Ollama would not accept the name.
    """
    match = _OLLAMA.fullmatch(name)
    if match is None or ".." in name:
        raise ModelFileError(
            f"{visible(name)[:120]!r} is not a model name of Ollama; expected ollama:NAME or ollama:NAME:TAG, as "
            "'ollama list' shows it."
        )
    given = {key: value for key, value in match.groupdict().items() if value}
    parts = {**OLLAMA_DEFAULTS, **given}
    return parts["host"], parts["namespace"], parts["model"], parts["tag"]


def is_sha256(text: object) -> bool:
    """Whether this is a SHA-256 in 64 lower-case hexadecimal digits."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def visible(text: str) -> str:
    """Replace what a terminal would obey instead of showing: names come from strangers."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
