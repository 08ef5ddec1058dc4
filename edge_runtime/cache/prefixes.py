"""Prefixes of conversations on disk: what a KV cache held of them, looked up by the key of each position.

A prefix is stored in blocks of 32 positions, each an entry of its own. The name of a block is a digest of the name
of the previous block and of the keys inside: token ids, and for visual tokens the fingerprint of their pixels. So
the longest known prefix is found by checking names until one is missing, without reading anything; and a
conversation that continues, or another question about the same picture, adds only its own blocks. The first name
stands for everything else that the numbers depend on: the model's files, the type of the KV cache, the arithmetic,
the adapter. A block is useless without its predecessors, so they count as used later.

One more entry, the record, holds the token ids of the prefixes that chats of the model share (system prompt and
tools, see `shared_prefixes`): they are computed again at the next start. No other text is stored as such.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from edge_runtime.cache.disk import DiskCache
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_rows import KVForm, KVRows, UnknownState
from edge_runtime.decoder.llama_context import common_beginning

BLOCK = 32
"""Positions per entry: 4.7 MB at full size, a second of prefill."""
PIECE = 512
"""Positions copied out of the KV cache at a time."""
MAX_RECORDED = 8
"""Maximum number of prefixes read from the record, whatever it says."""

logger = logging.getLogger("edge_runtime")


@dataclass(frozen=True)
class Saved:
    """A prefix that was found."""

    blocks: list[KVRows] = field(default_factory=list)
    """Mapped, not loaded yet."""

    @property
    def n(self) -> int:
        """Number of positions."""
        return BLOCK * len(self.blocks)

    def rows(self, first: int, end: int) -> KVRows:
        """Rows of positions `first` to `end` - 1."""
        joined = KVRows.join(self.blocks[first // BLOCK : -(-end // BLOCK)])
        start = first - first // BLOCK * BLOCK
        return joined[start : start + end - first]


@dataclass(frozen=True)
class Recorded:
    """A prefix that chats share."""

    ids: list[int]
    adapter: bytes = b""
    """Identity of the adapter that computed it; empty if there was none."""


class SavedPrefixes:
    """Saves and finds prefixes of conversations.

    Parameters
    ----------
    root : identifies everything that the rows depend on besides keys and adapter.
    """

    def __init__(self, cache: DiskCache, root: bytes) -> None:
        self._cache, self._root = cache, root
        self._is_usable = True

    def names(self, keys: Sequence[Hashable], adapter: bytes = b"") -> list[str]:
        """Names of all whole blocks of a prefix."""
        names, previous = [], hashlib.blake2b(self._root + b"adapter " + adapter, digest_size=16).digest()
        for start in range(0, len(keys) - BLOCK + 1, BLOCK):
            digest = hashlib.blake2b(previous, digest_size=16)
            for key in keys[start : start + BLOCK]:
                digest.update(_serialise(key))
            previous = digest.digest()
            names.append(previous.hex())
        return names

    def find(self, keys: Sequence[Hashable], adapter: bytes = b"", known: int = 0) -> Saved:
        """Find the longest saved prefix, checked; from any thread.

        Parameters
        ----------
        known : positions held already; nothing is read unless more are saved.
        """
        found = []
        for name in self.names(keys[:-1], adapter):  # the last key is always computed, for its logits
            if not self._cache.has(name):
                break
            found.append(name)
        if BLOCK * len(found) <= known:
            self._cache.touch(found)
            return Saved()
        blocks: list[KVRows] = []
        is_whole = True
        for name in found:  # after a damaged one, too: otherwise damaged blocks there would never be rewritten
            block = self._block(name)
            is_whole = is_whole and block is not None and (not blocks or block.form == blocks[0].form)
            if is_whole and block is not None:
                blocks.append(block)
        self._cache.touch(found[: len(blocks)])
        return Saved(blocks)

    def _block(self, name: str) -> KVRows | None:
        entry = self._cache.get(name)
        if entry is None:
            return None
        try:
            block = KVRows.from_bytes(KVForm(**entry.facts), entry.content)
        except (TypeError, UnknownState):
            block = None
        if block is None or len(block) != BLOCK:
            self._cache.forget(name)
            return None
        return block

    @property
    def is_usable(self) -> bool:
        """Whether anything is still saved."""
        return self._is_usable and not self._cache.is_broken

    def save(self, decoder: Decoder, sequence: int, keys: Sequence[Hashable], adapter: bytes = b"") -> bool:
        """Queue the missing blocks of a sequence for writing; on the inference thread.

        Parameters
        ----------
        keys : keys of a prefix that the sequence holds.

        Returns
        -------
        is_done : False if the writing thread is behind; the rest can be saved once it has caught up.
        """
        if not self.is_usable:
            return True
        names = self.names(keys, adapter)
        first = next((i for i, name in enumerate(names) if not self._cache.has(name)), len(names))
        for start in range(first, len(names), PIECE // BLOCK):
            if not self._cache.has_room:
                return not self.is_usable
            piece = names[start : start + PIECE // BLOCK]
            try:
                rows = decoder.read_rows(sequence, start * BLOCK, (start + len(piece)) * BLOCK)
            except UnknownState as error:
                self._is_usable = False
                logger.warning(
                    "This llama.cpp saves sequences in a form that is not known (%s); none is kept.", error
                )
                return True
            for i, name in enumerate(piece):
                block = rows[i * BLOCK : (i + 1) * BLOCK]
                self._cache.put(name, rows.form.facts(), block.to_bytes, BLOCK * rows.form.position_bytes)
        return True

    def flush(self) -> None:
        """Wait until everything saved is written."""
        self._cache.flush()

    # --- what chats share ----------------------------------------------------------------------------------------

    @property
    def record_name(self) -> str:
        """Name of the entry that `record` writes."""
        return hashlib.blake2b(self._root + b"shared beginnings", digest_size=16).hexdigest()

    def record(self, beginnings: Sequence[Recorded]) -> None:
        """Record what to compute at the next start, replacing the previous record."""
        facts = {"beginnings": [[len(each.ids), each.adapter.hex()] for each in beginnings]}
        content = np.array([i for each in beginnings for i in each.ids], "<i8").tobytes()
        self._cache.put(self.record_name, facts, lambda: content, len(content), replace=True)

    def touch_record(self) -> None:
        """Mark the record as still valid."""
        self._cache.touch([self.record_name])

    def recorded(self) -> list[Recorded]:
        """What was recorded last; empty if it cannot be read."""
        entry = self._cache.get(self.record_name)
        if entry is None:
            return []
        try:
            ids, found, at = entry.content.view("<i8"), [], 0
            for n, adapter in entry.facts["beginnings"][:MAX_RECORDED]:
                found.append(Recorded([int(i) for i in ids[at : at + n]], bytes.fromhex(adapter)))
                at += n
        except (KeyError, TypeError, ValueError):
            self._cache.forget(self.record_name)
            return []
        return found


def _serialise(key: Hashable) -> bytes:
    if isinstance(key, int):
        return struct.pack("<cq", b"t", key)
    digest, place = cast("tuple[bytes, int]", key)
    return struct.pack("<cq", b"v", place) + digest


class PromptSaver:
    """Queues computed prompts for writing; what the queue refuses waits. Used only on the inference thread."""

    def __init__(self, decoder: Decoder, prefixes: SavedPrefixes | None) -> None:
        self._decoder, self._prefixes = decoder, prefixes
        self.unsaved: dict[int, tuple[list[Hashable], bytes]] = {}
        """Keys and adapter of what to save while idle, by sequence."""

    def save(self, sequence: int, keys: list[Hashable], adapter: bytes) -> None:
        """Queue what a sequence holds of a prompt for writing; remember it if part of it has to wait."""
        self.unsaved.pop(sequence, None)
        if self._prefixes is None:
            return
        keys = keys[: common_beginning(keys, self._decoder.keys(sequence))]  # by now it may serve another prompt
        try:
            if not self._prefixes.save(self._decoder, sequence, keys, adapter):
                self.unsaved[sequence] = keys, adapter
        except Exception:
            logger.warning("A prompt could not be kept on disk; it will be computed again.", exc_info=True)

    def save_more(self) -> bool:
        """Save what the queue refused before; returns whether to call again."""
        for sequence in [*self.unsaved]:
            self.save(sequence, *self.unsaved[sequence])
        return bool(self.unsaved)

    def save_all(self) -> None:
        """Save everything, waiting for the disk."""
        while self.save_more() and self._prefixes is not None:
            self._prefixes.flush()
