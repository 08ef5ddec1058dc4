"""What an engine caches beyond its KV cache, on disk and across processes; and what it frees between pictures."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import platformdirs

from edge_runtime.cache.disk import DiskCache, usable_folder
from edge_runtime.cache.prefixes import SavedPrefixes
from edge_runtime.cache.visual_tokens import SavedTokens
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.errors import MessageError
from edge_runtime.system.user_folders import user_folder
from edge_runtime.version import __version__
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.identity import file_identity

logger = logging.getLogger("edge_runtime")
ROUNDING = 2
"""How the default arithmetic rounds; another number when that changes, so that tokens do not mix."""


def usual_folder() -> Path | None:
    """Folder where a server caches prompts, inside the current user's cache folder; None if it cannot be used.

    It is created so that nobody else can read it. If that fails, a warning says so.
    """
    folder = user_folder(lambda: platformdirs.user_cache_dir("edge-runtime")) / "prompts"
    try:
        usable_folder(folder)
    except MessageError as error:
        logger.warning("%s Prompts that were read are not kept.", error)
        return None
    with contextlib.suppress(OSError):  # it existed already, with other permissions
        folder.chmod(0o700)
    return folder


@dataclass(frozen=True)
class Caches:
    """Where results go that outlive a request; no answer depends on them."""

    disk: DiskCache | None = None
    tokens: SavedTokens | None = None
    prefixes: SavedPrefixes | None = None
    low_memory: bool = False
    """Free the vision weights whenever no picture is waiting; the next one loads them again."""

    @classmethod
    def in_folder(
        cls,
        folder: str | Path,
        limit_bytes: int,
        encoder: ImageEncoder,
        decoder: Decoder,
        *,
        exact: bool,
        isa: str,
        low_memory: bool = False,
    ) -> Caches:
        """Store visual tokens and prefixes of conversations in a folder.

        Entries are named by the files and the arithmetic that computed them, so models can share a folder.

        Parameters
        ----------
        isa : the kernels' instruction set.

        Raises
        ------
        MessageError
            When the folder cannot be written to.
        """
        disk = DiskCache(folder, limit_bytes)
        arithmetic = f"{__version__} exact={exact} {isa} {ROUNDING} ".encode()
        vision = hashlib.blake2b(arithmetic + file_identity(encoder.file), digest_size=16).digest()
        products = "kernels" if decoder.uses_kernels else "llama.cpp"
        version = metadata.version("llama-cpp-python")
        context = f"llama.cpp {version} kv={decoder.kv_type} exact={exact} products={products} ".encode()
        root = hashlib.blake2b(context + vision + file_identity(decoder.file), digest_size=16).digest()
        tokens = SavedTokens(disk, vision, (encoder.n_queries, encoder.hidden))
        return cls(disk, tokens, SavedPrefixes(disk, root), low_memory)

    def close(self) -> None:
        """Write what is still queued."""
        if self.disk is not None:
            self.disk.close()
