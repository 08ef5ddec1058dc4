"""Every decoder type in llama.cpp, against the float32 file, and against what llama-quantize makes of it.

That the float32 file gives the goldens' logits is `test_answers_equal_the_goldens` in the runtime's tests.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_converters import DECODER_TYPES
from edge_converters.convert import Converted
from edge_runtime import Model
from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.weights.gguf_file import GGUFFile

QUESTIONS = ("What is this?", "Describe the picture in one sentence.", "1 + 1 =", "the the the the")
N_MATRICES = 23  # 7 in each of 3 layers, embedding and head
# Relative RMS error of one product: of its weights, and of its activations where llama.cpp rounds those too.
# Rounding to n bits of mantissa errs by up to 2^-n, by half of that in the mean square. For blocks, see `WEIGHTS`;
# q8_0 also multiplies activations rounded like its weights, with the K-quants and q4_0 that part vanishes.
PRODUCT_ERROR = {
    "f16": 2**-12,
    "bf16": 2**-9,
    "q8_0": 0.0054 * math.sqrt(2),
    "q6_k": 0.018,
    "q5_k_m": 0.036,
    "q4_k_m": 0.072,
    "q4_k_s": 0.072,
    "q4_1": 0.078,
    "q4_0": 0.087,
    "iq4_nl": 0.078,
    "iq4_xs": 0.078,
    "q3_k_m": 0.12,
    "iq3_m": 0.14,
}
# The errors of products in series are independent, so their squares add up over the matrices; measured between 0.7
# and 1.2 times the result. Outside these factors a type is not what its name says.
LOGITS_FACTORS = (0.35, 2.0)

# Relative RMS error of normally distributed weights (a block of 32 spans ± 2.2 sigma on average): q8_0 has steps of
# 2.2 / 127 sigma, over sqrt(12): 0.5 %; q4_0 of 2.2 / 8: 8 %; Q4_1, of 4.2 / 15, a little less, IQ4_NL, whose steps
# are finer in the middle, as well; Q4_K, with a minimum per block, 7 %, Q5_K half of that; Q6_K 1.8 %; with 3 bits,
# Q3_K and IQ3_S, twice that of 4 bits.
# float16 holds bfloat16 values exactly, but for those below 6e-5, which lose digits.
WEIGHTS = {
    "F16": (0.0, 1e-8),
    "Q8_0": (0.004, 0.007),
    "Q4_0": (0.07, 0.10),
    "Q4_1": (0.07, 0.09),
    "IQ4_NL": (0.065, 0.085),
    "IQ4_XS": (0.065, 0.085),
    "Q3_K": (0.12, 0.18),
    "IQ3_S": (0.12, 0.18),
    "Q5_K": (0.03, 0.042),
    "Q4_K": (0.06, 0.08),
    "Q6_K": (0.012, 0.024),
}


def logits(folder: Path) -> npt.NDArray[np.float64]:
    """Logits after each question [shape=(questions, vocabulary)]."""
    with Model.load(folder, exact=True) as model:
        return np.stack([model.trace(question, 0).logits for question in QUESTIONS]).astype(np.float64)


@pytest.fixture(scope="module")
def reference(exact_folder: Path) -> npt.NDArray[np.float64]:
    return logits(exact_folder)


@pytest.mark.parametrize("kind", [kind for kind in DECODER_TYPES if kind != "f32"])
def test_logits_are_as_far_from_float32_as_the_type_says(
    converted: Callable[[str, str], Converted], reference: npt.NDArray[np.float64], kind: str
) -> None:
    ours = logits(converted(kind, "f32").decoder.parent)
    norms = np.linalg.norm(reference, axis=1) * np.linalg.norm(ours, axis=1)
    cosine = (reference * ours).sum(axis=1) / norms
    angle = np.sqrt(2 * (1 - cosine))  # relative error, for small ones
    low, high = (factor * PRODUCT_ERROR[kind] * math.sqrt(N_MATRICES) for factor in LOGITS_FACTORS)
    assert low <= angle.max() <= high, f"cosine {cosine.min():.6f}, relative error {angle.max():.4f}"


@pytest.mark.parametrize("kind", DECODER_TYPES)
def test_weights_are_as_exact_as_the_type_says(converted: Callable[[str, str], Converted], kind: str) -> None:
    reference, file = (GGUFFile(converted(name, "f32").decoder) for name in ("f32", kind))
    for name, info in file.tensors.items():
        expected, values = reference.array(name), file.array(name)
        error = math.sqrt(np.mean((values - expected) ** 2) / np.mean(expected**2))
        low, high = WEIGHTS.get(info.type.name, (0.0, 0.0))  # the checkpoint is bfloat16
        assert low <= error <= high, f"{name} as {info.type.name}: {error:.5f}"


def test_the_types_of_a_mix_are_those_of_the_recipe(converted: Callable[[str, str], Converted]) -> None:
    """Q4_K_M keeps the head and some values and down projections in 6 bits; vectors stay float32 everywhere."""
    file = GGUFFile(converted("q4_k_m", "f32").decoder)
    assert {info.type.name for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}
    assert {info.type.name for info in file.tensors.values() if len(info.shape) == 2} == {"Q4_K", "Q6_K"}
    assert file.tensors["output.weight"].type.name == "Q6_K"
    assert file.tensors["token_embd.weight"].type.name == "Q4_K"
    for kind in ("f32", "f16", "bf16", "q8_0", "q6_k"):
        infos = GGUFFile(converted(kind, "f32").decoder).tensors.values()
        assert {info.type.name for info in infos if len(info.shape) == 2} == {kind.upper()}
        assert {info.type.name for info in infos if len(info.shape) == 1} == {"F32"}


FILE_TYPES = {
    "q6_k": 18,
    "q5_k_m": 17,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "q3_k_m": 12,
    "iq3_m": 27,
}  # LLAMA_FTYPE_*


@pytest.mark.parametrize(("kind", "file_type"), FILE_TYPES.items())
@pytest.mark.parametrize("source", ["bf16", "f32"])
def test_quantized_files_equal_those_of_llama_quantize(
    converted: Callable[[str, str], Converted], tmp_path: Path, source: str, kind: str, file_type: int
) -> None:
    """Byte for byte, metadata included, whichever lossless file llama.cpp starts from."""
    library = llama.library()
    params = library.llama_model_quantize_default_params()
    params.ftype = file_type
    target = tmp_path / "theirs.gguf"
    plain = converted(source, "f32").decoder
    with llama.watch_log(lambda line: None):
        status = library.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0
    ours, theirs = GGUFFile(converted(kind, "f32").decoder), GGUFFile(target)
    assert {n: i.type for n, i in ours.tensors.items()} == {n: i.type for n, i in theirs.tensors.items()}
    different = [name for name in ours.tensors if not np.array_equal(ours.blocks(name), theirs.blocks(name))]
    assert different == []
    assert ours.path.read_bytes() == target.read_bytes()
