"""The project as the conformance check sees it: every member calls the code users run, and adds nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from edge_converters import convert_checkpoint
from edge_runtime import Model
from edge_runtime.inputs.slicing import plan_slices
from edge_runtime.inputs.video.frame_choice import choose_frames
from edge_runtime.vision.resampler import pos2d_table, time_embedding
from edge_runtime.vision.tower import position_ids
from edge_runtime.weights.config import slicing_config, vision_config
from edge_runtime.weights.gguf_file import GGUFFile

TYPES = {"exact": ("f32", "f32"), "quant": ("q8_0", "q8_0")}


class Adapter:
    """Converts the checkpoint and loads what came out."""

    def __init__(self, checkpoint_dir: str, path: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        decoder, vision = TYPES[path]
        files = convert_checkpoint(checkpoint_dir, self._folder.name, decoder_type=decoder, vision_type=vision)
        self._model = Model.load(self._folder.name, exact=path == "exact")
        mmproj = GGUFFile(files.mmproj)
        self._slicing = slicing_config(mmproj)
        self.position_side = vision_config(mmproj).position_side

    def plan(self, width: int, height: int, max_slices: int) -> dict[str, tuple[int, int]]:
        plan = plan_slices(width, height, self._slicing, max_slices)
        return {"grid": plan.grid, "source": plan.source, "refine": plan.refine, "cell": plan.cell}

    def position_ids(self, rows: int, cols: int) -> np.ndarray:
        return position_ids(rows, cols, self.position_side)

    def pos2d(self, dim: int, row: int, col: int) -> np.ndarray:
        return pos2d_table(dim, row + 1, col + 1)[-1]

    def time(self, dim: int, t: int) -> np.ndarray:
        return time_embedding(dim, t)

    def video_frames(
        self, n_frames: int, fps: float, choose_fps: float, force_packing: int | None
    ) -> tuple[list, list]:
        choice = choose_frames(n_frames, fps, choose_fps, force_packing)
        return choice.indices, choice.temporal_ids

    def slices(self, image_path: str) -> tuple[list, list, list]:
        slices = self._model.slices(Path(image_path))
        return [s.pixels for s in slices], [s.pixel_values() for s in slices], [s.tgt_size for s in slices]

    def encode(self, image_path: str) -> tuple[list, list]:
        path = Path(image_path)
        return self._model.vision_features(path), self._model.encode_image(path)

    def encode_video(self, frame_paths: list[str], temporal_ids: list[list[int]], max_slices: int) -> list:
        return self._model.encode_video([Path(p) for p in frame_paths], temporal_ids, max_slices)

    def prompt(self, case: dict[str, Any]) -> tuple[str, list[int], list[tuple[int, int]]]:
        prompt = self._model.build_prompt(*_request(case)[:1], **_request(case)[1])
        return prompt.text, prompt.ids, prompt.bounds

    def answer(self, case: dict[str, Any], n: int) -> tuple[np.ndarray, list[int]]:
        messages, options = _request(case)
        trace = self._model.trace(messages, n, **options)
        return trace.logits, trace.greedy


def _request(case: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """A case under the names of our API."""
    messages = case["messages"]
    if case.get("system"):
        messages = [{"role": "system", "content": case["system"]}, *messages]
    names = {
        "thinking": "thinking",
        "max_slice_nums": "max_slices",
        "use_image_id": "use_image_id",
        "temporal_ids": "temporal_ids",
    }
    return messages, {ours: case[theirs] for theirs, ours in names.items() if case.get(theirs) is not None}
