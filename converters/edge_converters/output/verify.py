"""Re-reads the written file: every planned tensor is there, with the planned type and shape and the right values.

This guards against the worst failure, because it is silent: wrong weights that load and generate nonsense. Values are
compared on a spread of rows, since dequantising 17 GB again would take longer than converting it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from edge_converters.plan.planned_tensor import PlannedTensor
from edge_runtime.errors import CheckpointError, ModelFileError
from edge_runtime.weights.gguf_file import GGUFFile

SAMPLED_ROWS = 8
# Largest error of a set of sampled rows, as RMS error over RMS value. Rounding uniformly to n bits per block costs
# about 2^-n; normally distributed weights measure 0.9 % (8 bits), 5 % (5 to 6), 8 % (4); two to three times that
# means wrong rows.
TOLERANCE = {
    GGMLQuantizationType.F32: 1e-7,
    GGMLQuantizationType.F16: 1e-3,
    GGMLQuantizationType.BF16: 1e-2,
    GGMLQuantizationType.Q8_0: 3e-2,
}
TOLERANCE_BELOW_8_BITS = 0.25


def verify_gguf(path: Path, tensors: list[PlannedTensor], final_name: str, *, types_may_differ: bool) -> None:
    """Re-read `path` and check it against the plan.

    Parameters
    ----------
    types_may_differ : true after llama.cpp's quantizer, which chooses the types.

    Raises
    ------
    CheckpointError
        Naming the first tensor that is missing, or whose shape, type or values are wrong.
    """
    try:
        file = GGUFFile(path)
    except ModelFileError as broken:
        raise CheckpointError(f"{final_name} cannot be read back after writing: {broken}") from None
    wanted = {tensor.name for tensor in tensors}
    if wanted != set(file.tensors):
        odd = sorted(wanted ^ set(file.tensors))
        raise CheckpointError(
            f"{final_name} was not written completely: {odd[0]} is missing or unexpected; this is a bug, please "
            "report it."
        )
    for tensor in tensors:
        info = file.tensors[tensor.name]
        if info.shape != tensor.shape or (info.type != tensor.type and not types_may_differ):
            raise CheckpointError(
                f"{final_name}: {tensor.name} was written as {info.type.name} {info.shape}, expected "
                f"{tensor.type.name} {tensor.shape}; this is a bug, please report it."
            )
        error = sampled_error(file, tensor)
        if not error <= TOLERANCE.get(info.type, TOLERANCE_BELOW_8_BITS):  # NaN is an error too
            raise CheckpointError(
                f"{final_name}: {tensor.name} differs from the checkpoint by {error:.1%} after {info.type.name}; "
                "the disk or the memory may be faulty: convert again."
            )


def sampled_error(
    file: GGUFFile, tensor: PlannedTensor, n_sampled: int = SAMPLED_ROWS, *, weighted: bool = True
) -> float:
    """Relative RMS error of a spread of rows of one tensor against its source.

    Parameters
    ----------
    weighted : weight the columns as encoding does.
    """
    n_rows = tensor.n_rows
    index = np.unique(np.linspace(0, n_rows - 1, min(n_sampled, n_rows)).astype(np.int64))
    source = np.concatenate([tensor.rows(int(i), int(i) + 1) for i in index])
    flat = np.asarray(file.array(tensor.name)) if len(tensor.shape) > 2 else file.rows(tensor.name, index)
    written = flat.reshape(n_rows, -1)[index] if len(tensor.shape) > 2 else flat
    importance = tensor.importance() if weighted and tensor.importance is not None else 1.0
    scale = float(np.sqrt(np.mean(importance * np.square(source, dtype=np.float64))))
    difference = float(np.sqrt(np.mean(importance * np.square(written - source, dtype=np.float64))))
    return difference / scale if scale > 0 else difference
