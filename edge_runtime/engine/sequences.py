"""Who holds what in the KV cache: taking, sharing, restoring and releasing sequences, and giving up what they hold.

An unused sequence keeps what it holds, so that the next request with the same prefix starts after it (prefix
caching). Cells are given up in this order: sequences idle for longest, then prefixes that chats share; preempting a
task, which frees its own, is up to the scheduler. Used only on the inference thread.
"""

from __future__ import annotations

import logging

from edge_runtime.cache.prefixes import PromptSaver, Recorded, Saved, SavedPrefixes
from edge_runtime.cache.shared_prefixes import HeldBeginnings
from edge_runtime.decoder.decoder import Decoder
from edge_runtime.decoder.kv_rows import UnknownState
from edge_runtime.decoder.llama_context import ROWS_AT_A_TIME, common_beginning
from edge_runtime.engine.task import Task
from edge_runtime.errors import CacheFull

WORTH_WAITING = 32
"""Positions that a prefix on disk or of another task must have beyond what the KV cache holds."""

logger = logging.getLogger("edge_runtime")


class Sequences:
    """The sequences of one decoder and the tasks that hold them.

    Parameters
    ----------
    prefixes : prompts on disk, if they are saved.
    """

    def __init__(self, decoder: Decoder, prefixes: SavedPrefixes | None) -> None:
        self._decoder, self._prefixes = decoder, prefixes
        self.idle = list(range(decoder.n_sequences))
        """Sequences without a task; least recently used first."""
        self._holders: dict[int, Task] = {}
        self._adapters: dict[int, str | None] = {}
        """Which adapter computed what a sequence holds."""
        self.shared = HeldBeginnings(decoder)
        self.saver = PromptSaver(decoder, prefixes)

    # --- what is held already ------------------------------------------------------------------------------------

    def remembered(self, task: Task) -> int:
        """Positions of a task's prefix that the KV cache holds now; from any thread, where it is only a hint."""
        return max((self._common(sequence, task) for sequence in self._sources), default=0)

    @property
    def _sources(self) -> list[int]:
        """Sequences whose prefix others may reuse."""
        return [*range(self._decoder.n_sequences), *self.shared]

    def _common(self, sequence: int, task: Task) -> int:
        """Positions that a task may take over from a sequence."""
        if self._adapters.get(sequence) != task.request.options.adapter or task.is_scoring:
            return 0  # positions computed before have no logits
        if not task.request.options.reuse:
            holder = self._holders.get(sequence)
            if holder is None or not task.may_take(holder):
                return 0
        return self._decoder.common(sequence, task.keys)

    def waits_for_prefix(self, task: Task) -> bool:
        """Whether another task is computing a prefix of this one; waiting for it saves the work."""
        owner = task.prefix_owner
        if owner is not None and owner.sequences and not owner.n_tokens:
            return True
        known = max(self.remembered(task), task.saved.n)
        for other in dict.fromkeys(self._holders.values()):
            if (
                other.n_tokens
                or (other.gives_way and not task.gives_way)  # it waits for this one
                or other.request.options.adapter != task.request.options.adapter
                or not task.may_take(other)
            ):
                continue
            common = common_beginning(task.keys, other.keys)
            # The same prompt, as with several answers to it, is worth waiting for, however short.
            worth = 1 if common == len(task.keys) else WORTH_WAITING
            if common > known + worth:
                task.prefix_owner = other
                return True
        task.prefix_owner = None
        return False

    # --- taking and releasing ------------------------------------------------------------------------------------

    def take(self, task: Task) -> int:
        """Give a task its sequences, the first one with as much of its prefix as is held.

        Returns
        -------
        n : positions that the first one holds.
        """
        decoder = self._decoder
        common = {sequence: self._common(sequence, task) for sequence in self._sources}
        best = max(self.idle, key=lambda sequence: common[sequence])
        source = max(common, key=lambda sequence: common[sequence])
        # Continuing in place destroys the rest of what the sequence holds, which may be most of another conversation.
        if common[source] > common[best] or 2 * common[best] < decoder.held(best):
            best = self.idle[0]
        n = common[source]
        if source == best or n == 0:
            decoder.rewind(best, n)
        else:
            decoder.share(source, best, n)
        others = [sequence for sequence in self.idle if sequence != best][: task.request.options.n_beams - 1]
        for sequence in others:
            decoder.rewind(sequence)
        task.sequences = [best, *others]
        self.idle = [sequence for sequence in self.idle if sequence not in task.sequences]
        self._holders |= dict.fromkeys(task.sequences, task)
        self._adapters |= dict.fromkeys(task.sequences, task.request.options.adapter)
        return n

    def restore(self, task: Task, n: int) -> int:
        """Append what is on disk to a sequence that holds `n` positions; returns how many it holds then."""
        decoder, saved = self._decoder, task.saved
        task.saved = Saved()
        if saved.n <= n + WORTH_WAITING:
            return n
        while n < saved.n and not task.is_cancelled():
            end = min(n + ROWS_AT_A_TIME, saved.n)
            try:
                decoder.append_rows(task.sequence, task.keys[n:end], saved.rows(n, end))
                n = end
            except CacheFull:
                if not self.give_up_one():
                    break
            except (MemoryError, UnknownState) as error:
                logger.warning("What was kept on disk of a prompt cannot be used (%r); it is computed again.", error)
                break
        return n

    def release(self, task: Task) -> None:
        """Take a task's sequences back; they keep what they hold, for later requests with the same prefix."""
        for sequence in task.sequences:
            del self._holders[sequence]
        self.idle += task.sequences
        task.sequences = []

    def can_give(self, n: int) -> bool:
        """Whether so many sequences are without a task."""
        return len(self.idle) >= n

    def preempt(self, task: Task) -> None:
        """Take a task's sequences back and empty them."""
        sequences = task.sequences
        self.release(task)
        for sequence in sequences:
            self._decoder.rewind(sequence)

    def give_up_one(self) -> bool:
        """Empty the sequence idle for longest, or give up a shared prefix; False if everything is in use."""
        for sequence in (self._decoder.n_sequences, *self.idle):
            if self._decoder.held(sequence):
                self._decoder.rewind(sequence)
                return True
        return self.shared.give_up([*self._holders])

    # --- what outlives a task ------------------------------------------------------------------------------------

    def hold_shared(self, task: Task) -> None:
        """Hold the prefix that a task with a computed prompt shares with other chats, and record that on disk."""
        held = self.shared.hold(task.sequence, task.request.shared, task.request.options.adapter)
        if held is not None:
            self._adapters[held] = task.request.options.adapter
        if self._prefixes is None or not task.request.shared:
            return
        if held is None:
            self._prefixes.touch_record()
            return
        identities = self._decoder.adapters.identities
        ids = [([key for key in keys if isinstance(key, int)], name) for keys, name in self.shared.by_worth()]
        self._prefixes.record([Recorded(found, identities[name]) for found, name in ids])

    def save_prompt(self, task: Task, sequence: int) -> None:
        """Write what a released sequence holds of a task's prompt to disk, in the background."""
        if self._prefixes is None:
            return
        n = min(self._decoder.held(sequence), len(task.request.prompt.ids))
        self.saver.save(sequence, task.keys[:n], self._decoder.adapters.identities[task.request.options.adapter])
