"""The tower in OpenVINO: int8 by NNCF's post-training quantisation, or float32. Without the resampler.

Quantising runs the float32 tower over some pictures, which takes minutes; the result is kept beside the other files.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.child import require, serve, timed
from benchmarks.peers.tower import GRID, Affine, Float32, TowerFile, TowerSide

CALIBRATION = (434, 420, 406, 392)
"""Sides of the pictures that ranges are taken from: not those that are measured, each one slice."""


class OpenVinoTower(TowerSide):
    """Options: mmproj, precision ("int8" or "f32"), threads, folder for the quantised model."""

    def __init__(self, options: dict[str, Any]) -> None:
        require("openvino", *(["nncf"] if options["precision"] == "int8" else []))
        super().__init__(options)

    def _path(self) -> Path:
        """Path of the quantised model; each version of either library has its own."""
        from importlib import metadata

        versions = f"openvino-{metadata.version('openvino')}-nncf-{metadata.version('nncf')}"
        return Path(self.options["folder"]) / f"tower-int8-{versions}.xml"

    def make(self) -> None:
        """Quantise the tower, unless that has been done already."""
        import openvino

        if self.options["precision"] == "int8" and not self._path().exists():
            quantised = _quantise(TowerFile(self.options["mmproj"]))
            openvino.save_model(quantised, self._path(), compress_to_fp16=False)

    def load(self) -> dict[str, Any]:
        """Compile the tower for this CPU."""
        import openvino

        self.file = TowerFile(self.options["mmproj"])
        core = openvino.Core()
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.options["threads"]}
        model = core.read_model(self._path()) if self.options["precision"] == "int8" else _build(self.file)
        self._tower, load_s = timed(lambda: core.compile_model(model, "CPU", settings))
        products: Counter[str] = Counter()
        for node in self._tower.get_runtime_model().get_ordered_ops():
            note = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            if note["layerType"] in ("FullyConnected", "MatMul"):
                products[f"{note['layerType']} {note['primitiveType']}"] += 1
        return {"load_s": load_s, "products": dict(products)}

    def run(self, pixels: Float32) -> Float32:
        """Features of one slice."""
        (features,) = self._tower([pixels]).values()
        return np.asarray(features)


def _build(file: TowerFile) -> Any:
    """The tower as an OpenVINO graph of one slice: pixels [P, 588] → features [P, width]."""
    import openvino
    from openvino import opset13 as op

    heads, width, n_patches = file.config.heads, file.config.width, GRID[0] * GRID[1]

    def linear(x: Any, affine: Affine) -> Any:
        return op.add(op.matmul(x, affine.weight, False, True), affine.bias[None])

    def norm(x: Any, affine: Affine) -> Any:
        normal = op.mvn(x, np.array([1], np.int64), True, file.config.epsilon, "inside_sqrt")
        return op.add(op.multiply(normal, affine.weight[None]), affine.bias[None])

    def split(x: Any) -> Any:
        shape = np.array([1, n_patches, heads, width // heads], np.int64)
        return op.transpose(op.reshape(x, shape, False), np.array([0, 2, 1, 3], np.int64))

    pixels = op.parameter([n_patches, file.patches().weight.shape[1]], np.float32, name="pixels")
    x = op.add(linear(pixels, file.patches()), file.positions())
    for n in range(file.config.layers):
        layer = file.layer(n)
        h = norm(x, layer.norm1)
        q, k, v = (split(linear(h, product)) for product in (layer.query, layer.key, layer.value))
        attended = op.transpose(op.scaled_dot_product_attention(q, k, v), np.array([0, 2, 1, 3], np.int64))
        joined = op.reshape(attended, np.array([n_patches, width], np.int64), False)
        x = op.add(x, linear(joined, layer.out))
        grown = op.gelu(linear(norm(x, layer.norm2), layer.fc1), "tanh")
        x = op.add(x, linear(grown, layer.fc2))
    return openvino.Model([norm(x, file.affine("v.post_ln"))], [pixels], "siglip")


def _quantise(file: TowerFile) -> Any:
    import nncf

    pixels = [file.pixels(side, side, 1)[0] for side in CALIBRATION]
    return nncf.quantize(
        _build(file), nncf.Dataset(pixels), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels)
    )


if __name__ == "__main__":
    serve(OpenVinoTower)
