"""Slices → visual tokens: tower and resampler of one mmproj file, in batches of bounded size.

The numba kernels run parallel code, which only one Python thread at a time may enter; that is the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from edge_runtime.inputs.slice_groups import Group, LazyGroup, LoadedGroup, n_patches
from edge_runtime.inputs.slicing import Slice
from edge_runtime.vision.arithmetic import Arithmetic, FloatArithmetic, Int8Arithmetic
from edge_runtime.vision.calibration import read_calibration
from edge_runtime.vision.known_features import KnownFeatures, slice_digest
from edge_runtime.vision.layer_by_layer import LayerByLayer
from edge_runtime.vision.resampler import GroupItem, Resampler
from edge_runtime.vision.tower import OnLayer, VisionTower, no_report
from edge_runtime.weights.config import check_mmproj, resampler_config, slicing_config, vision_config
from edge_runtime.weights.gguf_file import Float32, GGUFFile

AnyGroup = TypeVar("AnyGroup", bound=Group)
BATCH_PATCHES = 1100
"""Patches encoded together: one slice of ordinary size, or several small ones.

Enough for efficient products, and few enough that what a layer writes stays in the caches: two slices at once take a
tenth longer than one after the other."""
LOW_MEMORY_PATCHES = 11 * BATCH_PATCHES
"""Patches for which a layer is packed in low memory: a picture of ten slices. They take 5 KB each at full size."""


class ImageEncoder:
    """Vision tower and resampler of one mmproj file.

    Parameters
    ----------
    exact : compute in float32, as the official code does, not in int8.

    Attributes
    ----------
    low_memory : keep one layer of the tower in memory at a time (`layer_by_layer`), and no features of slices.

    Raises
    ------
    ModelFileError
        When the file is damaged or belongs to another model.
    """

    def __init__(self, path: str | Path, *, exact: bool) -> None:
        self.file = GGUFFile(path)
        check_mmproj(self.file)
        for name in self.file.tensors:
            self.file.rows(name, slice(0, 1))  # an unreadable type is reported now, not at the first picture
        self.file.release_pages()
        self.slicing = slicing_config(self.file)
        vision = vision_config(self.file)
        arithmetic: Arithmetic = FloatArithmetic() if exact else Int8Arithmetic(read_calibration(self.file))
        self.tower = VisionTower(self.file, vision, self.slicing, arithmetic)
        self.resampler = Resampler(self.file, resampler_config(self.file), vision.width, arithmetic)
        self._known = KnownFeatures()
        self._layer_by_layer = LayerByLayer(self.tower, LOW_MEMORY_PATCHES)
        self.low_memory = False

    @property
    def batch_patches(self) -> int:
        """Patches to be handed over together."""
        return LOW_MEMORY_PATCHES if self.low_memory else BATCH_PATCHES

    @property
    def n_queries(self) -> int:
        """Visual tokens per slice, or per group."""
        return self.resampler.config.queries

    @property
    def hidden(self) -> int:
        """Width of a visual token, which must equal the decoder's."""
        return self.resampler.config.hidden

    @property
    def known_bytes(self) -> int:
        """Memory of what slices that were encoded before, or in part, have become."""
        return self._known.n_bytes + self._layer_by_layer.n_bytes

    def unload(self) -> None:
        """Drop all weights; the next picture loads them again."""
        self.tower.unload()
        self.resampler.unload()
        self.forget_slices()

    def forget_slices(self) -> None:
        """Encode slices again that were encoded before."""
        self._known.clear()
        self._layer_by_layer.clear()

    def release_idle_memory(self) -> None:
        """Drop what only pictures of the same size, or the same slices, would use again."""
        self.forget_slices()
        self.resampler.release_idle_memory()

    def encode(self, groups: Sequence[Group], on_layer: OnLayer = no_report) -> list[Float32]:
        """Compute the visual tokens of each group.

        Parameters
        ----------
        on_layer : called between the tower's layers with (done, total) of a batch, on this thread; an exception from
            it ends the encoding.

        Returns
        -------
        tokens : one ndarray [shape=(queries, hidden), float32] per group.
        """
        tokens: list[Float32] = []
        for found in _batches(groups, self.batch_patches):
            batch = [group.load() if isinstance(group, LazyGroup) else group for group in found]
            slices = [item for group in batch for item, _ in group]
            features = iter(self._features(slices, on_layer))
            items = [[GroupItem(next(features), item.tgt_size, time) for item, time in group] for group in batch]
            tokens += self._resample(batch, items)
        self.file.release_pages()  # the resampler's, too: packed weights would count twice while the decoder works
        return tokens

    def _resample(self, batch: Sequence[LoadedGroup], items: list[list[GroupItem]]) -> list[Float32]:
        """Visual tokens of a batch, which may be larger than what the resampler takes at once."""
        tokens: list[Float32] = []
        for part in _batches(batch):
            tokens += self.resampler.resample(items[len(tokens) : len(tokens) + len(part)])
        return tokens

    def _features(self, slices: Sequence[Slice], on_layer: OnLayer) -> list[Float32]:
        """Patch features of each slice, equal ones encoded once; a large group of frames takes several runs."""
        digests = [slice_digest(item) for item in slices]
        known = {digest: self._known.get(digest) for digest in digests}
        missing = {d: item for d, item in zip(digests, slices, strict=True) if known[d] is None}
        runs = [*_runs([*missing.values()])]
        found: list[Float32] = []
        if self.low_memory:
            left = iter(missing)
            names = [b"".join(next(left) for _ in run) for run in runs]
            found = self._layer_by_layer.encode(runs, names, on_layer) if runs else []
        else:
            for i, run in enumerate(runs):
                found += self.tower.encode(run, partial(_report_run, on_layer, i, len(runs)))
        for digest, features in zip(missing, found, strict=True):
            known[digest] = features
            if not self.low_memory:
                self._known.put(digest, features)
        return [rows for digest in digests if (rows := known[digest]) is not None]


def _report_run(on_layer: OnLayer, run: int, n_runs: int, done: int, total: int) -> None:
    """Report the layers of one of several runs."""
    on_layer(run * total + done, n_runs * total)


def _runs(slices: Sequence[Slice]) -> Iterator[list[Slice]]:
    """Consecutive slices of at most `BATCH_PATCHES` patches together."""
    run: list[Slice] = []
    patches = 0
    for item in slices:
        if run and patches + item.n_patches > BATCH_PATCHES:
            yield run
            run, patches = [], 0
        run.append(item)
        patches += item.n_patches
    if run:
        yield run


def _batches(groups: Sequence[AnyGroup], limit: int | None = None) -> Iterator[list[AnyGroup]]:
    """Consecutive groups of at most `limit` (or `BATCH_PATCHES`) patches together; a larger group goes alone."""
    batch: list[AnyGroup] = []
    patches = 0
    for group in groups:
        size = n_patches(group)
        if batch and patches + size > (BATCH_PATCHES if limit is None else limit):
            yield batch
            batch, patches = [], 0
        batch.append(group)
        patches += size
    if batch:
        yield batch
