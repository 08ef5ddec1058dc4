"""A name in the Ollama store of this machine → the two files of the model, used in place.

Nothing is copied, and nothing in the store is changed. Digests and names come from files that others wrote: a digest
is `sha256:` and 64 hexadecimal digits, or it is refused before it becomes part of a path (CVE-2024-37032).

Source of the layout: Ollama's server; manifests/HOST/NAMESPACE/MODEL/TAG in JSON, blobs/sha256-HEX.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ModelFileError
from edge_runtime.store.download import digest_of
from edge_runtime.store.names import is_sha256, ollama_parts, visible
from edge_runtime.system.user_folders import user_folder

MAX_MANIFEST_BYTES = 1 << 20
SERVICE = Path("/usr/share/ollama/.ollama/models")
"""Where the service keeps its models when Ollama's installer for Linux set it up."""
LAYER = "application/vnd.ollama.image."


@dataclass(frozen=True)
class Blob:
    """One file of the store."""

    path: Path
    size: int
    digest: str


@dataclass(frozen=True)
class OllamaModel:
    """The files of a model that this runtime uses."""

    decoder: Blob
    mmproj: Blob


def folders() -> list[Path]:
    """Stores that may exist on this machine; new models go into the first."""
    if given := os.environ.get("OLLAMA_MODELS"):
        return [Path(given)]
    return [user_folder(Path.home) / ".ollama" / "models", SERVICE]


def find(name: str) -> OllamaModel:
    """Find a model in the Ollama store.

    Parameters
    ----------
    name : as Ollama shows it, without `ollama:`.

    Raises
    ------
    ModelFileError
        When it does not exist, has no projector, or its files do not match its manifest.
    """
    store, manifest = _manifest(name)
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    if not isinstance(layers, list):
        raise ModelFileError(f"Ollama's manifest of {name} has no list of layers; pull the model with Ollama again.")
    return OllamaModel(_only(name, store, layers, "model"), _only(name, store, layers, "projector"))


def verify(name: str, progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> OllamaModel:
    """Find a model and verify the digests of its files; takes a few seconds per gigabyte.

    Raises
    ------
    ModelFileError
        When a file does not match its digest.
    """
    model = find(name)
    blobs = (model.decoder, model.mmproj)
    total, done = sum(blob.size for blob in blobs), 0
    for blob in blobs:
        progress("checking", done, total)
        try:
            found = digest_of(blob.path, blob.digest)
        except OSError as error:
            raise _unreadable(blob.path, error) from None
        if found != blob.digest:
            raise ModelFileError(
                f"{blob.path} has the checksum {found[:23]}..., which is not the one in its name; pull "
                f"{name} with Ollama again."
            )
        done += blob.size
    progress("checking", done, total)
    return model


def _manifest(name: str) -> tuple[Path, Any]:
    parts = ollama_parts(name)
    for store in folders():
        path = store.joinpath("manifests", *parts)
        try:
            with path.open("rb") as file:
                raw = file.read(MAX_MANIFEST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _unreadable(path, error) from None
        try:
            return store, json.loads(raw) if len(raw) <= MAX_MANIFEST_BYTES else None
        except (ValueError, RecursionError):
            return store, None
    looked = " and ".join(str(store) for store in folders())
    raise ModelFileError(
        f"The Ollama store of this machine has no model {name} (looked in {looked}); run 'ollama pull {name}', check "
        "the name with 'ollama list', or set OLLAMA_MODELS."
    )


def _only(name: str, store: Path, layers: list[Any], what: str) -> Blob:
    found = [layer for layer in layers if isinstance(layer, dict) and layer.get("mediaType") == LAYER + what]
    if len(found) != 1:
        why = "cannot read pictures, or has its vision part in Ollama's own format" if not found else "has too many"
        raise ModelFileError(
            f"{name} has {len(found)} layers of type {what!r} in the Ollama store, expected one: it {why}; use a "
            "model that consists of a decoder and an mmproj file."
        )
    digest, size = str(found[0].get("digest")), found[0].get("size")
    kind, _, number = digest.partition(":")
    if kind != "sha256" or not is_sha256(number) or type(size) is not int:
        raise ModelFileError(
            f"Ollama's manifest of {name} has the digest {visible(digest)[:80]!r} and size {str(size)[:20]} "
            f"for its {what}; expected sha256: with 64 hexadecimal digits, and bytes. Pull the model with Ollama "
            "again."
        )
    path = store / "blobs" / f"sha256-{number}"
    try:
        length = path.stat().st_size
    except FileNotFoundError:
        length = -1
    except OSError as error:
        raise _unreadable(path, error) from None
    if length != size:
        there = f"has {length} bytes" if length >= 0 else "is missing"
        raise ModelFileError(f"{path} {there}, expected {size} bytes; run 'ollama pull {name}' again.")
    return Blob(path, size, digest)


def _unreadable(path: Path, error: OSError) -> ModelFileError:
    return ModelFileError(
        f"{path} cannot be read: {error.strerror or error}; the files belong to Ollama's service, so you may "
        "have to join its group."
    )
