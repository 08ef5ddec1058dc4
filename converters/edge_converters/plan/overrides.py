"""`--tensor-type PATTERN=TYPE`: which tensors get another type than the recipe's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from edge_converters.plan.planned_tensor import PlannedTensor
from edge_runtime.errors import CheckpointError

FLOAT_KERNELS = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)


def choose_types(
    given: Sequence[str], plan: Sequence[PlannedTensor], types: Mapping[str, GGMLQuantizationType], option: str
) -> dict[str, GGMLQuantizationType]:
    """Resolve overrides to tensors; if several match a tensor, the first counts, as in llama-quantize.

    Parameters
    ----------
    given : `PATTERN=TYPE` each; the regular expression is searched for in the names of the file's matrices.
    types : those that the file may have, by name.
    option : name of the option, for messages.

    Raises
    ------
    CheckpointError
        When a pattern is invalid or matches nothing, or when a type is unknown or does not fit the rows.
    """
    matrices = [tensor for tensor in plan if len(tensor.shape) > 1 and tensor.name.endswith(".weight")]
    chosen: dict[str, GGMLQuantizationType] = {}
    for text in given:
        pattern, _, name = text.rpartition("=")
        kind = types.get(name.lower())
        if not pattern or kind is None:
            raise CheckpointError(f"{option} is {text!r}; expected PATTERN=TYPE with one of {', '.join(types)}.")
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{option} {text!r} holds no regular expression ({error}); quote special signs."
            ) from None
        matched = [tensor for tensor in matrices if expression.search(tensor.name)]
        if not matched:
            raise CheckpointError(
                f"{option} {text!r} matches no matrix of the file; names are such as {matrices[-1].name}."
            )
        for tensor in matched:
            _check_fit(tensor, kind, f"{option} {text!r}")
            chosen.setdefault(tensor.name, kind)
    return chosen


def _check_fit(tensor: PlannedTensor, kind: GGMLQuantizationType, what: str) -> None:
    block = GGML_QUANT_SIZES[kind][0]
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"{what}: rows of {tensor.name} have {tensor.shape[-1]} values, which {kind.name} cannot hold in blocks "
            f"of {block}; choose another type for it."
        )
    if len(tensor.shape) > 2 and kind not in FLOAT_KERNELS:
        raise CheckpointError(f"{what}: {tensor.name} is a convolution kernel, which can be f32 or f16 alone.")
