"""Slices → visual tokens: tower and resampler of one mmproj file, in batches of bounded size.

The numba kernels run parallel code, which only one Python thread at a time may enter; that is the engine's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from edge_runtime.inputs.slice_groups import Group, LazyGroup, n_patches
from edge_runtime.inputs.slicing import Slice
from edge_runtime.vision.arithmetic import Arithmetic, FloatArithmetic, Int8Arithmetic
from edge_runtime.vision.calibration import read_calibration
from edge_runtime.vision.known_features import KnownFeatures, slice_digest
from edge_runtime.vision.resampler import GroupItem, Resampler
from edge_runtime.vision.tower import OnLayer, VisionTower, no_report
from edge_runtime.weights.config import check_mmproj, resampler_config, slicing_config, vision_config
from edge_runtime.weights.gguf_file import Float32, GGUFFile

BATCH_PATCHES = 1100
"""Patches encoded together: one slice of ordinary size, or several small ones.

Enough for efficient products, and few enough that what a layer writes stays in the caches: two slices at once take a
tenth longer than one after the other."""


class ImageEncoder:
    """Vision tower and resampler of one mmproj file.

    Parameters
    ----------
    exact : compute in float32, as the official code does, not in int8.

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
        self.slicing = slicing_config(self.file)
        vision = vision_config(self.file)
        arithmetic: Arithmetic = FloatArithmetic() if exact else Int8Arithmetic(read_calibration(self.file))
        self.tower = VisionTower(self.file, vision, self.slicing, arithmetic)
        self.resampler = Resampler(self.file, resampler_config(self.file), vision.width, arithmetic)
        self._known = KnownFeatures()

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
        """Memory of the features of slices that were encoded before."""
        return self._known.n_bytes

    def unload(self) -> None:
        """Drop all weights; the next picture loads them again."""
        self.tower.unload()
        self.resampler.unload()
        self.forget_slices()

    def forget_slices(self) -> None:
        """Encode slices again that were encoded before."""
        self._known.clear()

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
        for found in _batches(groups):
            batch = [group.load() if isinstance(group, LazyGroup) else group for group in found]
            slices = [item for group in batch for item, _ in group]
            features = iter(self._features(slices, on_layer))
            tokens += self.resampler.resample(
                [[GroupItem(next(features), item.tgt_size, time) for item, time in group] for group in batch]
            )
        self.file.release_pages()  # the resampler's, too: packed weights would count twice while the decoder works
        return tokens

    def _features(self, slices: Sequence[Slice], on_layer: OnLayer) -> list[Float32]:
        """Patch features of each slice, equal ones encoded once; a large group of frames takes several runs."""
        digests = [slice_digest(item) for item in slices]
        known = {digest: self._known.get(digest) for digest in digests}
        missing = {d: item for d, item in zip(digests, slices, strict=True) if known[d] is None}
        runs = [*_runs([*missing.values()])]
        found: list[Float32] = []
        for i, run in enumerate(runs):
            found += self.tower.encode(run, partial(_report_run, on_layer, i, len(runs)))
        for digest, features in zip(missing, found, strict=True):
            known[digest] = features
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


def _batches(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Consecutive groups of at most `BATCH_PATCHES` patches together (a larger group goes alone)."""
    batch: list[Group] = []
    patches = 0
    for group in groups:
        size = n_patches(group)
        if batch and patches + size > BATCH_PATCHES:
            yield batch
            batch, patches = [], 0
        batch.append(group)
        patches += size
    if batch:
        yield batch
