"""Slices → patch features with one layer of the tower in memory at a time, for machines with little of it.

A layer is read, packed, applied to all slices of a call, and dropped. So it is packed once for a picture, however
many slices that has, and what is in memory is a layer and what the slices have become so far: 20 MB and 5 MB a slice
at full size, where all layers take 500 MB. The numbers are those of `VisionTower.encode`.

A call that is interrupted leaves its slices where they are, and the next one with the same slices continues:
otherwise a picture that gives way would start again each time.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.inputs.slicing import Slice
from edge_runtime.system.memory import give_back
from edge_runtime.vision.tower import OnLayer, Run, VisionTower, no_report
from edge_runtime.weights.gguf_file import Float32


class LayerByLayer:
    """The tower of one file, without its layers.

    Parameters
    ----------
    limit_patches : most patches that interrupted calls leave here.
    """

    def __init__(self, tower: VisionTower, limit_patches: int) -> None:
        self._tower, self._limit = tower, limit_patches
        self._interrupted: dict[bytes, Run] = {}

    @property
    def n_bytes(self) -> int:
        """Memory of what interrupted calls have left."""
        return sum(run.x.nbytes for run in self._interrupted.values())

    def clear(self) -> None:
        """Forget what interrupted calls have left."""
        self._interrupted.clear()

    def encode(
        self, runs: Sequence[Sequence[Slice]], names: Sequence[bytes], on_layer: OnLayer = no_report
    ) -> list[Float32]:
        """Patch features of each slice.

        Parameters
        ----------
        runs : slices that go through the tower together.
        names : a fingerprint of each run.
        on_layer : as in `VisionTower.encode`, but called for every run in each layer; an exception interrupts.

        Returns
        -------
        features : as in `VisionTower.encode`, of the slices of all runs in order.

        Raises
        ------
        ModelFileError
            As in `VisionTower.encode`.
        """
        n_layers = self._tower.config.layers
        begun = {name: self._begin(name, run) for name, run in zip(names, runs, strict=True)}
        try:
            for n in range(n_layers):
                waiting = [run for run in begun.values() if run.n_layers == n]
                layer = None
                for run in waiting:
                    on_layer(sum(other.n_layers for other in begun.values()), n_layers * len(begun))
                    layer = layer or self._tower.layer(n)
                    self._tower.advance(run, layer)
                del layer  # before the next one is packed
                give_back()  # its float32 weights are of sizes that the C library keeps
        except BaseException:
            self._keep(begun)
            raise
        on_layer(n_layers * len(begun), n_layers * len(begun))
        return [features for name in names for features in self._tower.finish(begun.pop(name))]

    def _begin(self, name: bytes, slices: Sequence[Slice]) -> Run:
        """The run that an interrupted call has left, or a new one."""
        kept = self._interrupted.pop(name, None)
        return self._tower.begin(slices) if kept is None else kept

    def _keep(self, begun: dict[bytes, Run]) -> None:
        """Keep runs, and of those kept before as many as there is room for, the latest first."""
        kept = {**self._interrupted, **begun}
        while len(kept) > len(begun) and sum(len(run.x) for run in kept.values()) > self._limit:
            del kept[next(iter(kept))]
        self._interrupted = kept
