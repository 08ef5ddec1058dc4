"""Products with weights in ggml's blocks for ARM: compiled wherever the tests run, and read."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edge_kernels.simd.gguf_layout import BLOCK_TILES

COMPILE = """
import sys

from llvmlite import ir

from assembly import ARM, assemble
from edge_kernels.simd.gguf_int8 import TILE_ROWS, _Block, _block_values
from edge_kernels.simd.gguf_layout import KINDS, WIDTH, byte_at
from edge_kernels.simd.ir import store

for kind in ("Q4_K", "Q6_K", "Q8_0"):
    for n_rows in TILE_ROWS:
        module, pointer = ir.Module(), ir.IntType(8).as_pointer()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer] * 3), "tile")
        builder = ir.IRBuilder(function.append_basic_block())
        values = _block_values(builder, _Block(KINDS[kind], *function.args[:2], n_rows))
        for i, (value, scale) in enumerate(values):
            store(builder, builder.fmul(value, scale), byte_at(builder, function.args[2], 4 * WIDTH * i))
        builder.ret_void()
        names = [line.split()[0] for line in assemble(module, ARM, sys.argv[1])]
        print(kind, n_rows, *(names.count(name) for name in ("smmla", "sdot")))
"""
FEATURES = {"neon-i8mm": "+neon,+dotprod,+i8mm", "neon-dot": "+neon,+dotprod", "neon": "+neon"}
STEPS = {"Q4_K": 8, "Q6_K": 4, "Q8_0": 8}
"""Steps of four k in a group, which is what the loop's body computes."""


@pytest.mark.parametrize("isa", FEATURES)
def test_every_tile_for_arm_is_made_of_its_instruction(isa):
    """Two rows at a time by smmla, eight k of two outputs; by sdot four k of four outputs."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, FEATURES[isa]],
        env={**os.environ, "EDGE_RUNTIME_ISA": isa, "NUMBA_CPU_FEATURES": FEATURES[isa],
             "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    vectors = BLOCK_TILES[isa].vectors
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 * 4
    for kind, rows, smmla, sdot in lines:
        products = int(rows) * vectors * STEPS[kind]
        by_pairs = isa == "neon-i8mm" and int(rows) % 2 == 0
        assert int(smmla) == (products // 2 if by_pairs else 0)
        assert int(sdot) == (products if isa != "neon" and not by_pairs else 0)
