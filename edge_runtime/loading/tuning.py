"""What `edge-runtime bench --tune` found, stored per model file and machine and read when that model is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

from edge_runtime.decoder.kv_types import KV_TYPES
from edge_runtime.decoder.options import CHUNK_TOKENS
from edge_runtime.errors import BackendUnavailable
from edge_runtime.system.atomic_files import why_not_written, write_whole
from edge_runtime.system.text_files import read_json
from edge_runtime.system.user_folders import user_folder
from edge_runtime.weights.gguf_file import GGUFFile
from edge_runtime.weights.identity import file_identity

MAX_THREADS = 1024


@dataclass(frozen=True)
class Tuning:
    """Settings of a decoder that change its speed and memory, not its answers."""

    n_threads: int | None = None
    """None: the physical cores."""
    n_ubatch: int = CHUNK_TOKENS
    repack: bool = False
    kv_type: str | None = None
    """None: the default of the arithmetic."""


def tuning_path(decoder: GGUFFile) -> Path:
    """Path of the file that holds the tuning of a decoder file."""
    return _folder() / f"{file_identity(decoder).hex()}.json"


def _folder() -> Path:
    return user_folder(lambda: platformdirs.user_data_dir("edge-runtime")) / "tuning"


def remembered_tuning(decoder: GGUFFile) -> Tuning | None:
    """The tuning found for a decoder file on this machine; None if there is none, or none that can be used."""
    if not _folder().is_dir():  # nothing was tuned: no need to hash the file
        return None
    try:
        known = read_json(tuning_path(decoder))
        return _tuning(known[machine_identity()])
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not in our format
        return None


def _tuning(facts: dict[str, Any]) -> Tuning:
    tuning = Tuning(**facts)
    sizes = (tuning.n_threads or 1, MAX_THREADS), (tuning.n_ubatch, CHUNK_TOKENS)
    if not all(type(value) is int and 1 <= value <= limit for value, limit in sizes):
        raise ValueError("a number is out of range")
    if tuning.kv_type not in (None, *KV_TYPES) or type(tuning.repack) is not bool:
        raise ValueError("a setting is unknown")
    return tuning


def remember_tuning(decoder: GGUFFile, tuning: Tuning) -> Path:
    """Store a tuning for this machine, beside those of other machines that share the folder; returns the file.

    Raises
    ------
    BackendUnavailable
        When the folder cannot be written to.
    """
    path = tuning_path(decoder)
    try:
        known = read_json(path)
        known = known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        known = {}
    known[machine_identity()] = asdict(tuning)
    try:
        write_whole(path, json.dumps(known, indent=1).encode())
    except OSError as error:
        raise BackendUnavailable(
            f"The tuning cannot be saved: {why_not_written(error, path)}; fix that, or give --threads and --kv-type "
            "each time."
        ) from None
    return path


def forget_tuning(decoder: GGUFFile) -> None:
    """Delete the stored tuning of a decoder file."""
    tuning_path(decoder).unlink(missing_ok=True)


def machine_identity() -> str:
    """What decides speed: the processor and its features, the cores this process may use, and llama.cpp's version."""
    from edge_kernels.machine import cpu_count, cpu_features, cpu_name

    features = hashlib.blake2b(" ".join(sorted(cpu_features())).encode(), digest_size=4).hexdigest()
    return f"{cpu_name()} {features} x{cpu_count()} llama-cpp-python {metadata.version('llama-cpp-python')}"
