"""What an engine caches beyond its KV cache: on disk, between processes; and what it drops between pictures."""

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
from edge_runtime.version import __version__
from edge_runtime.vision.encoder import ImageEncoder
from edge_runtime.weights.identity import file_identity

logger = logging.getLogger("edge_runtime")


def usual_folder() -> Path | None:
    """The folder where a server caches prompts, among the caches of whoever runs it; None if there is none.

    It is made, and nobody else can read it. Where that cannot be done, a warning says so.
    """
    folder = Path(platformdirs.user_cache_dir("edge-runtime")) / "prompts"
    try:
        usable_folder(folder)
    except MessageError as error:
        logger.warning("%s Prompts that were read are not kept.", error)
        return None
    with contextlib.suppress(OSError):  # it was there already, with other rights
        folder.chmod(0o700)
    return folder


@dataclass(frozen=True)
class Caches:
    """Where results go that outlive a request; no answer needs them."""

    disk: DiskCache | None = None
    tokens: SavedTokens | None = None
    prefixes: SavedPrefixes | None = None
    low_memory: bool = False
    """Drop the vision weights whenever no picture is waiting; the next one reads them again."""

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
        """Keep visual tokens and prefixes of conversations in a folder.

        Entries stand for the files and the arithmetic they were computed with, so models can share a folder.

        Parameters
        ----------
        isa : the kernels' instruction set.

        Raises
        ------
        MessageError
            When the folder cannot be written to.
        """
        disk = DiskCache(folder, limit_bytes)
        arithmetic = f"{__version__} exact={exact} {isa} ".encode()
        vision = hashlib.blake2b(arithmetic + file_identity(encoder.file), digest_size=16).digest()
        context = f"llama.cpp {metadata.version('llama-cpp-python')} kv={decoder.kv_type} exact={exact} ".encode()
        root = hashlib.blake2b(context + vision + file_identity(decoder.file), digest_size=16).digest()
        tokens = SavedTokens(disk, vision, (encoder.n_queries, encoder.hidden))
        return cls(disk, tokens, SavedPrefixes(disk, root), low_memory)

    def close(self) -> None:
        """Write what is still to be written."""
        if self.disk is not None:
            self.disk.close()
