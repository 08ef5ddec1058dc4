"""Which request computes what, and when: encoding, prefill and generation of many requests on one thread.

Every turn encodes at most one batch of slices and makes at most one call of llama.cpp, in which all running answers
get their next token and the prompts that wait share what is left of the chunk. So answers keep flowing while a long
prompt is worked on, and tokens of many answers cost one pass over the weights.

A sequence that nobody uses keeps what it holds: the next request with the same beginning goes on from there. When the
KV cache is full, what was unused for longest is forgotten, then what chats share (`beginnings`); after that the
youngest request steps back and is computed anew once there is room.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from edge_runtime.cache.caches import Keeping
from edge_runtime.cache.prefixes import PromptSaver, Recorded, Saved
from edge_runtime.cache.shared_prefixes import HeldBeginnings
from edge_runtime.cache.visual_tokens import VisualTokenCache
from edge_runtime.decoder.decoder import ROWS_AT_A_TIME, Decoder, common_beginning
from edge_runtime.decoder.kv_rows import UnknownState
from edge_runtime.decoder.sequence_chunk import CacheFull, Cancelled
from edge_runtime.engine.call_plan import CallPlanner
from edge_runtime.engine.events import Activity, FinishReason
from edge_runtime.engine.next_token import go_on, hand_over
from edge_runtime.engine.slice_batches import await_frames, next_batch, release
from edge_runtime.engine.task import Expected, Task, is_worth_leaving
from edge_runtime.errors import ModelFileError
from edge_runtime.inputs.slice_groups import LoadedGroup
from edge_runtime.prompt.tokenizer import Tokenizer
from edge_runtime.system.memory import give_back
from edge_runtime.vision.encoder import BATCH_PATCHES, ImageEncoder

WORTH_WAITING = 32  # tokens of a shared beginning that another request is just computing

logger = logging.getLogger("edge_runtime")


class Scheduler:
    """Tasks and what they share: encoder, decoder, visual tokens. Used by the inference thread alone."""

    def __init__(self, encoder: ImageEncoder, decoder: Decoder, tokenizer: Tokenizer, keeping: Keeping) -> None:
        self._encoder, self._decoder, self._tokenizer = encoder, decoder, tokenizer
        self._keeping = keeping
        self._visual_tokens = VisualTokenCache(saved=keeping.tokens)
        self._adapters: dict[int, str | None] = {}
        """Which adapter computed what a sequence holds."""
        self._waiting: deque[Task] = deque()
        self._active: list[Task] = []
        self._idle = list(range(decoder.n_sequences))
        """Sequences without a task; those unused for longest first."""
        self._is_crowded = False
        """Whether a task had to step back and nobody has ended since: nobody is let in then, or it would go on so."""
        self._has_seen_pictures = False
        self._planner = CallPlanner(decoder)
        self._beginnings = HeldBeginnings(decoder)
        self._expected: deque[Expected] = deque()
        """To be computed when nobody asks."""
        self._warming: tuple[Task, Expected] | None = None
        self.saver = PromptSaver(decoder, keeping.prefixes)

    @property
    def n_tasks(self) -> int:
        """Tasks waiting or at work."""
        return len(self._waiting) + len(self._active)

    @property
    def idle_sequences(self) -> list[int]:
        """Sequences of the KV cache that no request occupies."""
        return [*self._idle]

    @property
    def activity(self) -> Activity:
        """What goes on now; from any thread, where it is but a glance."""
        tokens = self._visual_tokens
        slots = self._decoder.n_sequences
        return Activity(len(self._waiting), len(self._active), slots, tokens.lookups, tokens.hits, tokens.n_bytes)

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return self.n_tasks > 0

    @property
    def waiting_s(self) -> float:
        """About how long the prompts of waiting tasks will take, but for what is remembered of them."""
        return self._planner.row_s * sum(len(task.keys) - self.remembered(task) for task in self._waiting)

    def add(self, task: Task) -> None:
        """Take in a new task; it is computed as soon as a sequence is free."""
        task.keys = task.keys or task.request.keys()
        self._has_seen_pictures |= bool(task.request.groups)
        self._waiting.append(task)

    def remembered(self, task: Task) -> int:
        """Positions of a task's beginning that the KV cache holds now; from any thread, where it is but a hint."""
        return max((self._common(s, task) for s in self._sources), default=0)

    @property
    def _sources(self) -> list[int]:
        """Sequences that others may begin like."""
        return [*range(self._decoder.n_sequences), *self._beginnings]

    def turn(self) -> None:
        """Do a bit of everything there is to do."""
        for task in [*self._waiting, *self._active]:
            if task.is_cancelled():
                self._end(task, "cancelled")
        for task in [*self._waiting]:
            if len(self._idle) < task.request.options.n_beams or (self._is_crowded and self._active):
                break
            if task.is_scoring or not self._follows(task):
                self._alone(self._admit, task)
        self._encode()
        self._decode()

    def rest(self) -> None:
        """Nobody asks for anything: let go of the memory that pictures have left behind, on all threads."""
        if self._has_seen_pictures:
            self._has_seen_pictures = False
            if self._keeping.low_memory:  # still there when the last request was cancelled or failed
                self._encoder.unload()
            self._encoder.rest()
            give_back()

    # --- when nobody asks ----------------------------------------------------------------------------------------

    def expect(self, beginnings: Sequence[Expected]) -> None:
        """Take in what is to be computed when nobody asks."""
        self._expected += beginnings

    def expected_task(self, is_asked: Callable[[], bool]) -> Task | None:
        """A task that reads what is expected, if there is something; it ends as soon as somebody asks."""
        if not self._expected:
            return None
        expected = self._expected.popleft()
        task = Task(
            expected.request,
            lambda: is_asked() or self.n_tasks > 1,
            keys=expected.request.keys(),
            saved=expected.saved,
        )
        self._warming = task, expected
        return task

    def _hold(self, task: Task) -> None:
        """Hold what a task whose prompt is computed shares with other chats, and write down that it is held."""
        held = self._beginnings.hold(task.sequence, task.request.shared, task.request.options.adapter)
        if held is not None:
            self._adapters[held] = task.request.options.adapter
        prefixes = self._keeping.prefixes
        if prefixes is None or not task.request.shared:
            return
        if held is None:
            prefixes.touch_record()
            return
        identities = self._decoder.adapters.identities
        ids = [([key for key in keys if isinstance(key, int)], name) for keys, name in self._beginnings.by_worth()]
        prefixes.record([Recorded(found, identities[name]) for found, name in ids])

    # --- admission -----------------------------------------------------------------------------------------------

    def _alone(self, step: Callable[..., None], task: Task, *more: Any) -> None:
        """Do something for one task; what goes wrong is its own affair, and nobody else's answer ends."""
        try:
            step(task, *more)
        except Exception as error:  # noqa: BLE001 - handed to the one who asked
            if task in self._waiting and task.sequence >= 0:
                self._idle += task.sequences
                task.sequence, task.more_sequences = -1, []
            if task in self._waiting or task in self._active:
                self._fail(task, error)

    def _admit(self, task: Task) -> None:
        """Give a task the sequence with the most of its beginning, and find out which pictures are missing."""
        task.lap = time.perf_counter()
        n = self._take_sequence(task)
        self._waiting.remove(task)  # only now: in one of the two lists at any time, so that no error loses it
        self._active.append(task)
        n = self._restore(task, n)
        if not task.n_tokens:
            task.n_cached = n
            task.prompt_scores.clear()  # of a task that had to step back in the middle of its prompt
        bounds = task.request.prompt.bounds
        behind = [i for i, (_, end) in enumerate(bounds) if end > n]
        known = {task.request.digests[i]: self._visual_tokens.get(task.request.digests[i]) for i in behind}
        task.tokens = {digest: tokens for digest, tokens in known.items() if tokens is not None}
        task.missing = {
            task.request.digests[i]: task.request.groups[i] for i in behind if known[task.request.digests[i]] is None
        }
        task.n_slices = sum(len(group) for group in task.missing.values())
        if task.missing and task.request.reads_ahead:
            self._end(task, "cancelled")  # what stood here was forgotten meanwhile
        elif task.missing:
            task.tell("encode", 0, task.n_slices)
        else:
            self._begin_prefill(task)

    def _follows(self, task: Task) -> bool:
        """Whether another task is computing a beginning that this one shares; waiting for it saves the work."""
        if task.leader is not None and task.leader in self._active and not task.leader.n_tokens:
            return True
        known = max(self.remembered(task), task.saved.n)
        for other in self._active:
            if (
                other.n_tokens
                or other.request.options.adapter != task.request.options.adapter
                or not task.may_take(other)
            ):
                continue
            common = common_beginning(task.keys, other.keys)
            # The same prompt, as with several answers to it, is worth waiting for however short it is.
            worth = 1 if common == len(task.keys) else WORTH_WAITING
            if common > known + worth:
                task.leader = other
                return True
        task.leader = None
        return False

    def _take_sequence(self, task: Task) -> int:
        """Choose a sequence; returns the number of positions that stay."""
        decoder = self._decoder
        common = {s: self._common(s, task) for s in self._sources}
        best = max(self._idle, key=lambda s: common[s])
        source = max(common, key=lambda s: common[s])
        # Going on in place destroys the rest of what the sequence holds: another conversation, if it is most of it.
        if common[source] > common[best] or 2 * common[best] < decoder.held(best):
            best = self._idle[0]
        n = common[source]
        if source == best or n == 0:
            decoder.rewind(best, n)
        else:
            decoder.share(source, best, n)
        self._idle.remove(best)
        task.sequence = best
        for _ in range(task.request.options.n_beams - 1):
            task.more_sequences.append(self._idle.pop(0))
            decoder.rewind(task.more_sequences[-1])
        self._adapters |= dict.fromkeys(task.sequences, task.request.options.adapter)
        return n

    def _common(self, sequence: int, task: Task) -> int:
        if self._adapters.get(sequence) != task.request.options.adapter or task.is_scoring:
            return 0  # what was computed before has no logits
        if not task.request.options.reuse and not any(
            sequence in other.sequences and task.may_take(other) for other in self._active
        ):
            return 0
        return self._decoder.common(sequence, task.keys)

    def _restore(self, task: Task, n: int) -> int:
        """Fill a sequence that holds `n` positions with what was found on disk; returns what it holds then."""
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
                if not self._forget_one():
                    break
            except (MemoryError, UnknownState) as error:
                logger.warning("What was kept on disk of a prompt cannot be used (%r); it is computed again.", error)
                break
        return n

    def _forget_one(self) -> bool:
        """Empty the sequence that was unused for longest, or forget what chats share; False if all is in use."""
        for sequence in (self._decoder.n_sequences, *self._idle):
            if self._decoder.held(sequence):
                self._decoder.rewind(sequence)
                return True
        return self._beginnings.give_up([s for task in self._active for s in task.sequences])

    def _release(self, task: Task) -> None:
        self._active.remove(task)
        self._idle += task.sequences
        task.sequence, task.more_sequences, task.beam_run = -1, [], None

    def _end(self, task: Task, reason: FinishReason) -> None:
        sequence = task.sequence
        self._drop(task)
        task.finish(reason)
        if self._warming is not None and task is self._warming[0]:
            if reason == "cancelled":  # somebody asked: go on when nobody does
                self._expected.appendleft(self._warming[1])
            self._warming = None
        if self._keeping.prefixes is not None and sequence >= 0:  # nobody waits for this
            n = min(self._decoder.held(sequence), len(task.request.prompt.ids))
            self.saver.save(sequence, task.keys[:n], self._decoder.adapters.identities[task.request.options.adapter])

    def _fail(self, task: Task, error: Exception) -> None:
        self._drop(task)
        task.fail(error)

    def _drop(self, task: Task) -> None:
        self._is_crowded = False
        if task in self._active:
            self._release(task)
        else:
            self._waiting.remove(task)
        if task.sampler is not None:
            task.sampler.close()
        release(task.missing.values())
        task.tokens, task.missing = {}, {}  # whoever keeps the answer need not keep these

    def fail_all(self, error: Exception) -> None:
        """Hand an error nobody expected to everybody who waits; the thread goes on."""
        for task in [*self._waiting, *self._active]:
            self._fail(task, error)

    def close(self) -> None:
        """End everything; the decoder may be closed after this."""
        for task in [*self._waiting, *self._active]:
            self._end(task, "cancelled")
        self.saver.save_all()

    # --- encoding ------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Encode one batch of slices, of as many tasks as fit; a single group while answers are running."""
        limit = 0 if any(task.n_tokens for task in self._active) else BATCH_PATCHES
        chosen = next_batch(self._active, limit)
        for task, error in chosen.failed.items():
            self._fail(task, error)
        batch = chosen.groups
        if not batch:
            await_frames(chosen.waiting, idle=len(chosen.waiting) == len(self._active))
            return
        wanting = [task for task in self._active if batch.keys() & task.missing.keys()]
        self._encoder.tower.on_layer = lambda done, total: self._on_layer(wanting, batch, done / total)
        try:
            found = dict(zip(batch, self._encoder.encode([*batch.values()]), strict=True))
        except Cancelled:
            return  # the next turn ends them
        except Exception as error:  # noqa: BLE001 - handed to those who asked for these pictures
            for task in wanting:
                self._fail(task, error)
            return
        finally:
            self._encoder.tower.on_layer = lambda done, total: None
        for digest, tokens in found.items():
            self._visual_tokens.put(digest, tokens)
        for task in [*self._active]:
            if task.missing.keys() & found.keys():
                task.tokens |= {digest: found[digest] for digest in task.missing.keys() & found.keys()}
                task.missing = {digest: group for digest, group in task.missing.items() if digest not in found}
                task.tell_encode()
                if not task.missing:
                    self._alone(self._begin_prefill, task)
        if not any(task.missing for task in self._active):
            if self._keeping.low_memory:
                self._encoder.unload()
            give_back()  # what pictures have left behind would stand beside what their prompts take

    def _on_layer(self, tasks: list[Task], batch: dict[bytes, LoadedGroup], share: float) -> None:
        """Between two layers of the vision tower: stop if nobody waits for this batch any more, or tell of it."""
        if all(task.is_cancelled() for task in tasks):
            raise Cancelled
        for task in tasks:
            task.tell_encode(share * sum(len(batch[name]) for name in batch.keys() & task.missing.keys()))

    def _begin_prefill(self, task: Task) -> None:
        task.take_lap("encode")
        self._report_prefill(task)

    def _report_prefill(self, task: Task) -> None:
        task.tell_prefill(self._decoder.held(task.sequence))

    # --- prefill and generation ----------------------------------------------------------------------------------

    def _decode(self) -> None:
        """One call of llama.cpp: the last token of every running answer, and parts of prompts."""
        tasks, parts = self._planner.plan(self._active)
        if not tasks:
            return
        started, n_rows = time.perf_counter(), sum(len(part.keys) for part in parts)
        try:
            rows = self._decoder.step(
                parts,
                lambda: is_worth_leaving(tasks, parts, started, self._planner.row_s),
                tasks[0].request.options.adapter,
            )
        except Cancelled:
            return  # the next turn ends those who were cancelled, and computes the others' parts again
        except CacheFull:
            if tasks[0].request.reads_ahead:
                self._warming = None  # there is no room for it: not tried again
                self._end(tasks[0], "cancelled")
            else:
                self._make_room()
            return
        except Exception as error:  # noqa: BLE001 - handed to those whose tokens were computed
            for task in dict.fromkeys(tasks):
                self._fail(task, error)
            return
        self._planner.note(n_rows, len(tasks), time.perf_counter() - started)
        rows_of: dict[Task, list[int]] = {}
        for task, part, row in zip(tasks, parts, rows, strict=True):
            if not task.n_tokens:
                self._alone(self._report_prefill, task)
            if part.wants_all_logits and task in self._active:
                self._alone(Task.score_prompt, task, self._decoder, len(part.keys), row)
            if task not in self._active:
                continue  # it failed in this loop
            if task.request.reads_ahead and self._decoder.held(task.sequence) == len(task.keys):
                self._hold(task)
                self._end(task, "stop")
            elif not task.request.options.max_tokens and self._decoder.held(task.sequence) == len(task.keys):
                task.take_lap("prefill")
                self._end(task, "length")  # the prompt was all that was wanted
            elif part.wants_logits and not task.is_cancelled():
                if not task.n_tokens:
                    self._hold(task)
                rows_of.setdefault(task, []).append(row)
        for task, own in rows_of.items():
            try:
                if (reason := go_on(task, own, self._decoder, self._tokenizer)) is not None:
                    self._end(task, reason)
            except Exception as error:  # noqa: BLE001 - handed to the one whose token it is
                self._fail(task, error)

    def _make_room(self) -> None:
        """Forget what was unused for longest; when everything is in use, the youngest task steps back."""
        if self._forget_one():
            return
        if len(self._active) == 1 and (run := self._active[0].beam_run) is not None:
            run.search.stop()  # beams that have drifted apart take more room than the context has tokens
            self._end(self._active[0], hand_over(self._active[0], self._tokenizer))
            return
        if len(self._active) == 1:
            self._fail(self._active[0], ModelFileError("The KV cache is full; load the model with a larger --ctx."))
            return
        youngest = max(self._active, key=lambda task: task.started)
        sequences = youngest.sequences
        if youngest.beam_run is not None:
            youngest.n_tokens = 0  # nothing of it was handed over: the search begins anew
        self._release(youngest)
        for sequence in sequences:
            self._decoder.rewind(sequence)
        self._waiting.appendleft(youngest)
        self._is_crowded = True
