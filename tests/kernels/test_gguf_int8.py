"""Products with weights in ggml's blocks and rows in 8 bits, held against their NumPy definition and against gguf."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_kernels.linear.gguf_int8 import FEW_BLOCKS, FEW_ROWS, MANY_BLOCKS, ROW_BLOCK, SERIAL_NUMBERS, linear_gguf
from edge_kernels.reference import gguf_blocks as reference
from edge_kernels.simd.gguf_layout import BLOCK_MR, BLOCK_NR, KINDS, LANES
from edge_kernels.threads import set_threads

pytestmark = pytest.mark.every_core

FACTORS = {
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "Q4_0": [18 * i for i in range(8)],
    "Q4_1": [20 * i + at for i in range(8) for at in (0, 2)],
    "Q8_0": [34 * i for i in range(8)],
    "IQ4_NL": [18 * i for i in range(8)],
}
"""Where the float16 factors of 256 weights lie."""


def blocks_of(kind: str, n: int, k: int, seed: int = 0) -> Any:
    """A weight of random bytes, whose factors are numbers of an ordinary size, some negative."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 256, (n * k // 256, KINDS[kind].block_bytes), np.uint8)
    for at in FACTORS[kind]:
        factors = (rng.uniform(1e-4, 1e-2, len(found)) * rng.choice([1, 1, 1, -1], len(found))).astype(np.float16)
        found[:, at : at + 2] = factors.view(np.uint8).reshape(-1, 2)
    return found.reshape(-1)


def random(m: int, k: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_unpacks_as_gguf_does(kind):
    blocks = blocks_of(kind, 5, 512)
    expected = dequantize(blocks.reshape(5, -1), GGMLQuantizationType[kind])
    np.testing.assert_allclose(reference.unpack_blocks(blocks, kind, 5, 512), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, BLOCK_NR, 256),
        (2, BLOCK_NR + 1, 512),
        (BLOCK_MR, 3 * BLOCK_NR - 1, 256 * FEW_BLOCKS),
        (BLOCK_MR + 1, 100, 256 * (FEW_BLOCKS + 1)),
        (FEW_ROWS + 13, 200, 256 * (MANY_BLOCKS + 1)),
        (ROW_BLOCK + 5, 2 * BLOCK_NR, 256),
        (2 * ROW_BLOCK + 3, BLOCK_NR, 256),
        (1, 70, 256 * LANES),
        (2, 70, 256 * LANES),
        (3, 70, 512 * LANES),
        (4, 70, 256 * LANES),
        (1, 70, 256 * (LANES + 1)),
    ],
)
def test_products_are_those_of_the_definition(kind, m, n, k):
    x, blocks = random(m, k), blocks_of(kind, n, k)
    expected = reference.linear_gguf(x, blocks, kind, n)
    size = np.abs(x).astype(np.float64) @ np.abs(reference.unpack_blocks(blocks, kind, n, k)).T
    found = linear_gguf(x, blocks, kind, n)
    assert found.shape == (m, n)
    # Integers are exact: what is left is the rounding of some float32 additions.
    assert (np.abs(found - expected) <= 2e-6 * size).all()


@pytest.mark.parametrize("kind", KINDS)
def test_largest_integers_do_not_overflow(kind):
    """All weights and all numbers at their largest, in every sign: what meets in 16 bits fits."""
    blocks = blocks_of(kind, BLOCK_NR, 512).reshape(-1, KINDS[kind].block_bytes)
    for byte in (0xFF, 0x00, 0x7F, 0x80, 0x0F, 0xF0):
        extreme = np.full_like(blocks, byte)
        for at in FACTORS[kind]:
            extreme[:, at : at + 2] = np.array([0.5], np.float16).view(np.uint8)
        for x in (np.ones((3, 512)), -np.ones((3, 512)), np.tile([1.0, -1.0], (3, 256))):
            x = x.astype(np.float32)
            expected = reference.linear_gguf(x, extreme.reshape(-1), kind, BLOCK_NR)
            found = linear_gguf(x, extreme.reshape(-1), kind, BLOCK_NR)
            size = np.abs(reference.unpack_blocks(extreme.reshape(-1), kind, BLOCK_NR, 512)).sum(1)
            assert (np.abs(found - expected) <= 2e-6 * size).all(), (byte, x[0, :2])


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from([*KINDS]), m=st.integers(1, FEW_ROWS + 8), data=st.data())
def test_a_row_is_the_same_in_any_company(kind, m, data):
    n, k = 3 * BLOCK_NR, 256 * LANES  # few rows take another way through these
    x, blocks = random(m, k), blocks_of(kind, n, k)
    whole = linear_gguf(x, blocks, kind, n)
    first = data.draw(st.integers(0, m - 1))
    last = data.draw(st.integers(first + 1, m))
    assert (linear_gguf(x[first:last], blocks, kind, n) == whole[first:last]).all()


@pytest.mark.parametrize("m", [1, 7, 2 * SERIAL_NUMBERS // 1024])
def test_the_number_of_threads_changes_no_bit(m):
    x, blocks = random(m, 1024), blocks_of("Q4_K", 200, 1024)
    found = linear_gguf(x, blocks, "Q4_K", 200)
    try:
        set_threads(1)
        assert (linear_gguf(x, blocks, "Q4_K", 200) == found).all()
    finally:
        set_threads(None)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_seen_in_its_row_alone(kind, bad):
    x, blocks = random(3, 512), blocks_of(kind, BLOCK_NR, 512)
    clean = linear_gguf(x, blocks, kind, BLOCK_NR)
    x[1, 300] = bad
    found = linear_gguf(x, blocks, kind, BLOCK_NR)
    assert np.isnan(found[1]).all()
    assert (found[[0, 2]] == clean[[0, 2]]).all()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e30])
def test_rows_of_any_size(scale):
    x, blocks = random(2, 256) * np.float32(scale), blocks_of("Q6_K", BLOCK_NR, 256)
    expected = reference.linear_gguf(x, blocks, "Q6_K", BLOCK_NR)
    found = linear_gguf(x, blocks, "Q6_K", BLOCK_NR)
    size = np.abs(x).astype(np.float64) @ np.abs(reference.unpack_blocks(blocks, "Q6_K", BLOCK_NR, 256)).T
    assert (np.abs(found - expected) <= 1e-5 * size + 1e-44).all()


def test_rows_and_weight_must_match():
    blocks = blocks_of("Q4_K", BLOCK_NR, 512)
    for x, n in ((random(1, 256), BLOCK_NR), (random(1, 512), BLOCK_NR + 1), (random(1, 500), BLOCK_NR)):
        with pytest.raises(ValueError, match="Rows of"):
            linear_gguf(x, blocks, "Q4_K", n)
    assert linear_gguf(random(0, 512), blocks, "Q4_K", BLOCK_NR).shape == (0, BLOCK_NR)


COMPILE = """
import numba
from edge_kernels.simd.gguf_dots import dots
from edge_kernels.simd.gguf_int8 import tiles
from edge_kernels.simd.gguf_panels import unpackers

def assembly(run, n):
    run = numba.njit(fastmath={"contract"}, error_model="numpy")(run)
    run.compile((numba.int64,) * n)
    return run.inspect_asm(run.signatures[0])

for kind in ("Q4_K", "Q6_K", "Q8_0", "IQ4_NL"):
    tile, unpack, dot = tiles[kind, 6], unpackers[kind], dots[kind, 2]
    print(assembly(lambda a, b, c, d, e: tile(a, b, c, d, e), 5))
    assembly(lambda a, b, c, d: unpack(a, b, c, d), 4)
    assembly(lambda a, b, c, d: dot(a, b, c, d, (numba.float32(0), numba.float32(0))), 4)
"""
SETS = {
    "avx512vnni": ("cascadelake", "+avx2,+fma,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512vnni", "vpdpbusd", "zmm"),
    "avxvnni": ("alderlake", "+avx2,+fma,+f16c,+avxvnni", "vpdpbusd", "ymm"),
    "avx512": ("skylake-avx512", "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512vl", "vpmaddubsw", "ymm"),
}


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="LLVM compiles for the machine's own family"
)
@pytest.mark.parametrize("isa", SETS)
def test_sets_that_are_not_there_are_compiled_and_read(isa):
    """The instruction is in the tile; every type can be unpacked and multiplied."""
    cpu, features, instruction, register = SETS[isa]
    environment = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "EDGE_RUNTIME_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if instruction in line]
    assert len(lines) >= 4 * 6 * 8
    assert all(register in line for line in lines)
