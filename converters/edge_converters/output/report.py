"""What a file's types cost: size, bits per weight, and the error of every tensor against the checkpoint.

The error is the root mean square of (written - source) over that of the source, measured on at most `SAMPLED_ROWS`
evenly spread rows of each tensor: a million values give it to one per cent, and reading a full-size model takes
seconds instead of minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_converters.output.verify import sampled_error
from edge_converters.plan.planned_tensor import PlannedTensor
from edge_converters.plan.recipes import DECODER_TYPES, VISION_TYPES
from edge_converters.plan.tensors import plan_decoder, plan_vision
from edge_converters.sources.checkpoint import Checkpoint
from edge_runtime.errors import CheckpointError
from edge_runtime.weights.gguf_file import GGUFFile

SAMPLED_ROWS = 256


@dataclass(frozen=True)
class TensorReport:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int
    error: float
    """Relative error, see above."""


@dataclass(frozen=True)
class FileReport:
    """One file."""

    name: str
    n_bytes: int
    bits_per_weight: float
    tensors: tuple[TensorReport, ...]

    @property
    def error(self) -> float:
        """Root mean square of the matrices' errors, weighted by their number of values."""
        matrices = [tensor for tensor in self.tensors if len(tensor.shape) > 1]
        counts = [math.prod(tensor.shape) for tensor in matrices]
        squares = sum(n * tensor.error**2 for n, tensor in zip(counts, matrices, strict=True))
        return float((squares / max(1, sum(counts))) ** 0.5)

    def lines(self) -> list[str]:
        """The report as text: a heading, a line per tensor, and one for all matrices."""
        width = max(len(tensor.name) for tensor in self.tensors)
        lines = [f"{self.name}: {self.n_bytes / 1e6:.1f} MB, {self.bits_per_weight:.2f} bits per weight"]
        for tensor in self.tensors:
            size = " × ".join(map(str, tensor.shape))
            lines.append(f"  {tensor.name:<{width}}  {tensor.type:<7} {size:>15}  {tensor.error:9.4%}")
        return [*lines, f"  {'all matrices':<{width}}  {'':<7} {'':>15}  {self.error:9.4%}"]


def report_file(
    path: Path, plan: list[PlannedTensor], name: str, progress: Callable[[str, int, int], None]
) -> FileReport:
    """Measure a file against the tensors it was planned from.

    Parameters
    ----------
    name : the file's name in the report.
    progress : called with ("report", tensors done, tensors in all).
    """
    file, tensors = GGUFFile(path), []
    for done, planned in enumerate(plan):
        progress("report", done, len(plan))
        info = file.tensor(planned.name)
        error = sampled_error(file, planned, SAMPLED_ROWS, weighted=False)
        tensors.append(TensorReport(planned.name, planned.shape, info.type.name, info.n_bytes, error))
    progress("report", len(plan), len(plan))
    n_values = sum(math.prod(tensor.shape) for tensor in tensors)
    n_bytes = sum(tensor.n_bytes for tensor in tensors)
    return FileReport(name, file.size_bytes, 8 * n_bytes / max(1, n_values), tuple(tensors))


def report_against(file: str | Path, source: str | Path, progress: Callable[[str, int, int], None]) -> FileReport:
    """Measure a decoder or mmproj file against the checkpoint it was made from.

    Raises
    ------
    CheckpointError
        When the file does not have the checkpoint's tensors.
    """
    checkpoint, found = Checkpoint(source), GGUFFile(file)
    is_mmproj = found.metadata.get("general.architecture") == "clip"
    plan = (
        plan_vision(checkpoint, VISION_TYPES["f32"]) if is_mmproj else plan_decoder(checkpoint, DECODER_TYPES["f32"])
    )
    plan = [tensor for tensor in plan if tensor.name in found.tensors]
    odd = [tensor.name for tensor in plan if found.tensors[tensor.name].shape != tensor.shape]
    if odd or not plan:
        what = f"the tensor {odd[0]} of another shape" if odd else "none of the tensors"
        raise CheckpointError(f"{found.path.name} has {what}; name the checkpoint that the file was made from.")
    return report_file(found.path, plan, found.path.name, progress)
