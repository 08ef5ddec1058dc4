"""Types of other quantisations, told from a header, are those that llama.cpp's quantizer chooses."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, LlamaFileType

from edge_runtime.decoder import llama_cpp as llama
from edge_runtime.weights.gguf_file import GGUFFile
from edge_runtime.weights.mixes import MIXES, Shape, mixed_bytes, mixed_type
from support.gguf_maker import U32, Gguf, Type, mini_decoder

HEAD, HEADS, N_LAYERS = 64, 4, 17
"""Enough layers for the rules that count eighths and sixteenths of them."""


def decoder(hidden: int = 256, mlp: int = 256, kv_heads: int = 1, *, tied: bool = False) -> Gguf:
    """A float16 decoder of many small layers."""
    file = mini_decoder()
    file.tensors.clear()
    for name, value in {
        "block_count": N_LAYERS,
        "embedding_length": hidden,
        "feed_forward_length": mlp,
        "attention.head_count": HEADS,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_count": HEAD,
    }.items():
        file.key(f"qwen3.{name}", U32, value)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (64, hidden), "output_norm": (hidden,)}
    if not tied:
        shapes["output"] = (64, hidden)
    for n in range(N_LAYERS):
        of_layer = {"attn_norm": (hidden,), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,), "ffn_norm": (hidden,)}
        of_layer |= {"attn_q": (HEADS * HEAD, hidden), "attn_output": (hidden, HEADS * HEAD)}
        of_layer |= {"attn_k": (kv_heads * HEAD, hidden), "attn_v": (kv_heads * HEAD, hidden)}
        of_layer |= {"ffn_gate": (mlp, hidden), "ffn_up": (mlp, hidden), "ffn_down": (hidden, mlp)}
        shapes |= {f"blk.{n}.{name}": shape for name, shape in of_layer.items()}
    for name, shape in shapes.items():
        file.tensor(f"{name}.weight", shape, Type.F16 if len(shape) > 1 else Type.F32)
    return file


def chosen_by_llama_cpp(path: Path, mix: str) -> dict[str, str]:
    """Type of each tensor that the quantizer would change, from the log of a dry run."""
    library = llama.library()
    params = library.llama_model_quantize_default_params()
    params.ftype, params.dry_run = int(LlamaFileType[f"MOSTLY_{mix}"]), True
    lines: list[str] = []
    with llama.watch_log(lines.append):
        assert library.llama_model_quantize(str(path).encode(), b"unused", ctypes.byref(params)) == 0
    found = re.findall(r"\] +(\S+) +- \[[^]]*\], type = +\S+,[^\]]*?-> +[\d.]+ MiB \((\w+)\)", "\n".join(lines))
    return {name: kind.upper() for name, kind in found}


@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "F16"])
@pytest.mark.parametrize(
    "shape",
    [{}, {"kv_heads": 2}, {"tied": True}, {"mlp": 288}, {"hidden": 160}, {"mlp": 200}],
    ids=["grouped", "less grouped", "tied", "blocks of 32", "all of 32", "no blocks"],
)
def test_types_are_those_of_the_quantizer(tmp_path: Path, mix: str, shape: dict[str, int]) -> None:
    file = GGUFFile(decoder(**shape).write(tmp_path / "m.gguf"))
    theirs, facts = chosen_by_llama_cpp(file.path, mix), Shape.of(file)
    ours = {name: mixed_type(name, info.shape, mix, facts) for name, info in file.tensors.items()}
    matrices = [name for name, info in file.tensors.items() if len(info.shape) == 2]
    assert {name: ours[name].name for name in matrices} == {name: theirs.get(name, "F16") for name in matrices}
    assert {ours[name] for name in ours if name not in matrices} == {GGMLQuantizationType.F32}


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    file = GGUFFile(decoder().write(tmp_path / "m.gguf"))
    assert mixed_bytes(file, "F16") == sum(info.n_bytes for info in file.tensors.values())
    table = file.tensors["token_embd.weight"]
    assert mixed_bytes(file, "F16") - mixed_bytes(file, "F16", ["token_embd.weight"]) == table.n_bytes
    # 17 layers of five matrices of 256 x 256 and two of 64 x 256, and two tables of 64 x 256; norms stay in float32.
    norms, square, small = 17 * 4 * (2 * 256 + 2 * 64) + 4 * 256, 256, 64  # bytes, then blocks of 256 weights
    assert mixed_bytes(file, "Q8_0") == norms + 8 * 34 * (17 * (5 * square + 2 * small) + 2 * small)
    # IQ3_S has 110 bytes a block; values, attention's output and down of the first eighth have Q4_K's 144.
    better = 17 * (small + square) + 2 * square
    rest = 17 * (4 * square + small) - 2 * square + small
    assert mixed_bytes(file, "IQ3_M") == norms + 110 * rest + 144 * better + 210 * small
