"""Our side: tower and resampler of one mmproj file, in int8 or float32, without a decoder."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.harness.child import require, serve, timed
from benchmarks.harness.pictures import cut, picture, shapes

STARTED = time.perf_counter()


class Ours:
    """The image encoder as the engine uses it.

    Options: mmproj, exact, threads; plant, and calibrated: with the result of `convert --calibrate` on some pictures.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        from edge_kernels.threads import set_threads

        self._options = options
        set_threads(options["threads"])
        self._groups: dict[tuple[int, int], Any] = {}
        self._tower_s = 0.0
        self._features: list[Any] = []

    def load(self) -> dict[str, Any]:
        """Open the file, then read and pack all weights."""
        from benchmarks.harness.planted import planted
        from edge_kernels.machine import isa
        from edge_kernels.threads import thread_count
        from edge_runtime.vision import encoder
        from edge_runtime.weights.gguf_file import GGUFFile

        plant = self._options.get("plant", "none")
        file_class = GGUFFile if plant == "none" else planted(plant)
        found: Any
        if self._options.get("calibrated"):
            calibration = self._calibrate(file_class)
            found = mock.patch.object(encoder, "read_calibration", return_value=calibration)
        else:
            found = contextlib.nullcontext()
        with mock.patch.object(encoder, "GGUFFile", file_class), found:
            self.encoder, open_s = timed(
                lambda: encoder.ImageEncoder(self._options["mmproj"], exact=self._options["exact"])
            )
        _, pack_s = timed(lambda: (self.encoder.tower.load(), self.encoder.resampler.load()))
        if unread := getattr(self.encoder.file, "unread", None):
            raise RuntimeError(f"{min(unread)} was not read through GGUFFile.array: nothing was planted in it")
        run_tower = self.encoder.tower.encode

        def tower(slices: Any, *more: Any) -> Any:
            self._features, seconds = timed(lambda: run_tower(slices, *more))
            self._tower_s += seconds
            return self._features

        self.encoder.tower.encode = tower
        return {"open_s": open_s, "load_and_repack_s": pack_s, "isa": isa(), "threads": thread_count()}

    def _calibrate(self, file_class: type) -> Any:
        """Calibrate the file as the converter does, on other pictures than those that are encoded."""
        require("edge_converters.calibration.smoothing")
        from edge_converters.calibration import smoothing as calibrate

        with tempfile.TemporaryDirectory() as folder, mock.patch.object(calibrate, "GGUFFile", file_class):
            for side in (434, 420):  # one slice each
                Image.fromarray(picture(side, side)).save(Path(folder) / f"{side}.png")
            return calibrate.calibrate(Path(self._options["mmproj"]), Path(folder), lambda what, done, total: None)

    def prepare(self, width: int, height: int, slices: int) -> int:
        """Make and cut a picture; not timed, as with the peers."""
        items = cut(self.encoder.slicing, width, height, slices)
        self._groups[width, height] = [[(item, -1)] for item in items]
        return len(items)

    def encode(self, width: int, height: int) -> dict[str, float]:
        """Time one picture: the whole, and the tower alone."""
        self._tower_s = 0.0
        self.encoder.forget_slices()
        _, seconds = timed(lambda: self.encoder.encode(self._groups[width, height]))
        return {"seconds": seconds, "tower_s": self._tower_s}

    def rest(self) -> None:
        """Do what the engine does after a moment without requests; requests and slices are gone."""
        from edge_runtime.system.memory import give_back

        self._features = []
        self._groups.clear()
        self.encoder.release_idle_memory()
        give_back()

    def output(self, width: int, height: int, path: str) -> None:
        """Write the features and the visual tokens of a picture's first slice."""
        self.encoder.forget_slices()
        (tokens,) = self.encoder.encode(self._groups[width, height][:1])
        np.savez(path, features=self._features[0], tokens=tokens)

    def many(self, count: int, first: int) -> None:
        """Encode one-slice pictures of many shapes."""
        for width, height in shapes(first + count)[first:]:
            self.encoder.forget_slices()
            self.encoder.encode([[(item, -1)] for item in cut(self.encoder.slicing, width, height)])

    def since_start(self) -> dict[str, Any]:
        """Seconds since the import of this module began, and the kernel cache's statistics."""
        from edge_kernels.compile import cache_statistics

        return {"seconds": time.perf_counter() - STARTED, **cache_statistics()._asdict()}

    def profile(self, width: int, height: int, repeats: int) -> dict[str, Any]:
        """Measure where the time of a picture goes; the peaks are measured before and after each picture."""
        from benchmarks.harness.peaks import float32_peak, int8_peak
        from benchmarks.harness.profiling import Profile, summarise

        groups = self._groups[width, height]
        self.encoder.forget_slices()
        self.encoder.encode(groups)
        peaks: dict[str, list[float]] = {"int8": [], "float32": []}
        runs = []
        with Profile() as profile:
            self.load()
            for _ in range(repeats):
                peaks["int8"].append(int8_peak())
                peaks["float32"].append(float32_peak())
                profile.clear()
                self.encoder.forget_slices()
                _, seconds = timed(lambda: self.encoder.encode(groups))
                runs.append((seconds, profile.rows()))
        peaks["int8"].append(int8_peak())
        peaks["float32"].append(float32_peak())
        best = {name: max(samples) for name, samples in peaks.items()}
        return {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "samples_s": [seconds for seconds, _ in runs],
            "peak_gops": best,
            "peak_samples_gops": peaks,
            "operations": summarise(runs),
        }


if __name__ == "__main__":
    serve(Ours)
