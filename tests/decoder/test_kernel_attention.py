"""Attention inside llama.cpp: nodes of ggml's computed by the kernels, held against float64 and ggml itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof, c_float, c_int, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from edge_kernels import machine
from edge_kernels.attention.kv_cache import COLUMNS, KEY_BLOCK
from edge_kernels.ggml_backend import compiled, proof, register
from edge_kernels.ggml_backend.library import function
from edge_kernels.ggml_backend.structures import CPU, FLOAT16, FLOAT32
from edge_runtime.decoder import llama_cpp as llama

TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}


class Sizes(NamedTuple):
    rows: int
    keys: int
    heads: int = 8
    kv_heads: int = 2
    dims: int = 64
    streams: int = 1


class Case(NamedTuple):
    """Shapes: q [streams, rows, heads, dims]; k, v [streams, keys, kv_heads, dims]; mask [streams, rows, keys]."""

    q: Any
    k: Any
    v: Any
    mask: Any


def causal(rows: int, keys: int, streams: int = 1) -> Any:
    """The last rows of a sequence that fills the cache."""
    seen = np.arange(keys) <= keys - rows + np.arange(rows)[:, None]
    return np.broadcast_to(np.where(seen, 0.0, -np.inf), (streams, rows, keys))


def random_case(sizes: Sizes, mask: Any = None, seed: int = 0) -> Case:
    """Random numbers; keys are those that float16 holds."""
    rng = np.random.default_rng(seed)
    q = 1.5 * rng.standard_normal((sizes.streams, sizes.rows, sizes.heads, sizes.dims))
    k, v = (
        rng.standard_normal((sizes.streams, sizes.keys, sizes.kv_heads, sizes.dims)).astype(np.float16).astype(float)
        for _ in range(2)
    )
    return Case(q, k, v, causal(sizes.rows, sizes.keys, sizes.streams) if mask is None else mask)


class Node(NamedTuple):
    graph: proof.Graph
    address: int
    shape: tuple[int, ...]

    def is_ours(self) -> bool:
        """Whether the kernels would compute it."""
        device = addressof(register._registered().device)
        return bool(compiled.supports_op.ctypes(device, self.address))

    def computed(self, backend: int) -> Any:
        """The result by a backend, which is freed."""
        graph = self.graph.make("ggml_new_graph")
        function("ggml_build_forward_expand")(c_void_p(graph), c_void_p(self.address))
        return proof.computed(backend, graph, proof.tensor_at(self.address)).reshape(self.shape)


@contextmanager
def node_of(
    case: Case,
    kv_type: int = FLOAT16,
    *,
    bias: float = 0.0,
    cap: float = 0.0,
    sinks: bool = False,
    mask_heads: int = 1,
) -> Iterator[Node]:
    """Attention as llama.cpp builds it: heads side by side in rows, permuted."""
    streams, rows, heads, dims = case.q.shape
    keys, kv_heads = case.k.shape[1:3]
    graph = proof.Graph((1 << 20) + 16 * case.q.size + 8 * case.k.size + 4 * mask_heads * case.mask.size)
    try:
        tensors = [
            graph.tensor(FLOAT32, dims, heads, rows, streams),
            graph.tensor(kv_type, dims, kv_heads, keys, streams),
            graph.tensor(kv_type, dims, kv_heads, keys, streams),
            graph.tensor(FLOAT16, keys, rows, mask_heads, streams),
        ]
        numbers = (*case[:3], np.repeat(case.mask[:, None], mask_heads, 1))
        for address, values in zip(tensors, numbers, strict=True):
            graph.fill(proof.tensor_at(address), values)
        turned = [graph.make("ggml_permute", c_void_p(t), *map(c_int, (0, 2, 1, 3))) for t in tensors[:3]]
        node = graph.make(
            "ggml_flash_attn_ext",
            *map(c_void_p, (*turned, tensors[3])),
            c_float(dims**-0.5),
            c_float(bias),
            c_float(cap),
        )
        if sinks:
            function("ggml_flash_attn_ext_add_sinks")(c_void_p(node), c_void_p(graph.tensor(FLOAT32, heads)))
        yield Node(graph, node, case.q.shape)
    finally:
        graph.free()


def ours(case: Case, kv_type: str = "f16", threads: int = 2) -> Any:
    backend = register._registered().new_backend()
    compiled.set_n_threads.ctypes(backend, threads)
    with node_of(case, TYPES[kv_type]) as node:
        assert node.is_ours()
        return node.computed(backend)


def theirs(case: Case, kv_type: str = "f16") -> Any:
    with node_of(case, TYPES[kv_type]) as node:
        return node.computed(function("ggml_backend_init_by_type")(c_int(CPU), None))


def exact(case: Case) -> Any:
    """In float64; rows that see nothing are 0."""
    streams, _, heads, dims = case.q.shape
    group, out = heads // case.k.shape[2], np.zeros(case.q.shape)
    for stream in range(streams):
        for head in range(heads):
            scores = case.q[stream, :, head] @ case.k[stream, :, head // group].T / np.sqrt(dims) + case.mask[stream]
            powers = np.exp(scores - np.maximum(scores.max(1, keepdims=True), -1e300))
            powers /= np.maximum(powers.sum(1, keepdims=True), 1e-300)
            out[stream, :, head] = powers @ case.v[stream, :, head // group]
    return out


def rms(x: Any) -> float:
    return float(np.sqrt((x**2).mean()))


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    llama.library()
    register.register(claims_weights=False)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 1),
        Sizes(1, KEY_BLOCK + 5, heads=32, kv_heads=8, dims=128),
        Sizes(3, 2 * KEY_BLOCK, heads=3, kv_heads=1, dims=96),
        Sizes(9, 200, heads=14, kv_heads=2),
        Sizes(33, 65, heads=6, kv_heads=6, dims=32),
        Sizes(COLUMNS + 7, 256, heads=8, kv_heads=4, dims=256),
        Sizes(70, 1000, heads=4, kv_heads=1),
        Sizes(20, 100, streams=3),
    ],
)
def test_the_error_is_no_larger_than_ggmls(sizes):
    """With float16, in which ggml sums below 64 rows; from there on both sum in float32 and round alike."""
    case = random_case(sizes)
    expected = exact(case)
    error = rms(ours(case) - expected)
    assert error <= 2e-6 * rms(expected)
    assert error <= 1.1 * rms(theirs(case) - expected) + 1e-7 * rms(
        expected
    )  # one rounding: with one key ggml has none


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
@pytest.mark.parametrize("sizes", [Sizes(1, 150), Sizes(70, 300, heads=32, kv_heads=8, dims=128)])
def test_quantised_caches(kv_type, sizes):
    """Numbers that the type holds exactly: whole multiples of a scale. ggml rounds the queries besides."""
    rng = np.random.default_rng(1)
    case = random_case(sizes)
    low, high = {"q8_0": (-127, 127), "q4_0": (-8, 7)}[kv_type]
    k, v = (rng.integers(low, high + 1, case.k.shape) / -low for _ in range(2))
    for values in (k, v):
        values[..., ::32] = 1.0 if kv_type == "q8_0" else -1.0  # the largest of each group sets its scale
    if kv_type == "q8_0":  # 1 / 127, as float16 holds it
        k, v = (np.round(values * 127) * float(np.float16(1 / 127)) for values in (k, v))
    case = case._replace(k=k, v=v)
    expected = exact(case)
    error = rms(ours(case, kv_type) - expected)
    assert error <= 1e-6 * rms(expected)
    assert error <= rms(theirs(case, kv_type) - expected)


@pytest.mark.parametrize("kv_type", TYPES)
@pytest.mark.parametrize(("first", "n"), [(0, 1), (37, 1), (5, 2), (10, 7), (0, 64), (3, 97)])
def test_a_row_has_the_same_bits_in_any_company(kv_type, first, n):
    case = random_case(Sizes(100, 300, heads=6, kv_heads=2))
    whole, rows = ours(case, kv_type), slice(first, first + n)
    part = case._replace(q=case.q[:, rows], mask=case.mask[:, rows])
    assert (ours(part, kv_type) == whole[:, rows]).all()


@pytest.mark.parametrize("rows", [1, 50, 300])
def test_the_number_of_threads_changes_no_bit(rows):
    case = random_case(Sizes(rows, 400))
    assert (ours(case, threads=1) == ours(case, threads=2)).all()


@pytest.mark.parametrize("seed", range(4))
def test_where_keys_lie_in_the_cache_changes_no_bit(seed):
    """Cells of other sequences before, between and behind them, in whole blocks and in parts of them."""
    rng = np.random.default_rng(seed)
    case = random_case(Sizes(12, 250), seed=seed)
    cells = np.sort(rng.choice(900, 250, replace=False)) + (seed % 2) * 3 * KEY_BLOCK
    spread = random_case(Sizes(12, 900 + 3 * KEY_BLOCK), seed=seed + 9)
    mask = np.full(spread.mask.shape, -np.inf)
    mask[:, :, cells] = case.mask
    spread.k[:, cells], spread.v[:, cells] = case.k, case.v
    assert (ours(spread._replace(q=case.q, mask=mask)) == ours(case)).all()


def test_masks_of_any_kind():
    """Several sequences at once, numbers that are neither 0 nor -infinity, rows that see nothing."""
    rng, sizes = np.random.default_rng(0), Sizes(40, 333, streams=2)
    owner, row_owner = rng.integers(0, 3, sizes.keys), rng.integers(0, 3, sizes.rows)
    mask = np.where(owner == row_owner[:, None], 0.0, -np.inf)
    mask = np.stack([mask, mask + rng.integers(-4, 5, mask.shape)])
    mask[:, ::7] = -np.inf
    case = random_case(sizes, mask)
    found = ours(case)
    assert (found[:, ::7] == 0).all()
    np.testing.assert_allclose(found, exact(case), atol=2e-6)


def test_large_scores_and_numbers_that_are_none():
    """One key takes all; what is not a number is seen in its own rows alone."""
    case = random_case(Sizes(8, 200))
    large = case._replace(q=case.q * 300)
    np.testing.assert_allclose(ours(large), exact(large), atol=2e-3)
    case.q[0, 3, 2, 5] = np.nan
    found = ours(case)
    assert np.isnan(found[0, 3, 2]).all()
    assert np.isnan(found).sum() == found.shape[-1]


@pytest.mark.parametrize(
    "options",
    [{"bias": 8.0}, {"cap": 30.0}, {"sinks": True}, {"mask_heads": 8}, {"kv_type": FLOAT32}, {"kv_type": 3}],
    ids=["ALiBi", "soft cap", "sinks", "a mask per head", "float32", "q4_1"],
)
def test_what_the_kernels_cannot_do_is_left_to_ggml(options):
    with node_of(random_case(Sizes(4, 32)), **options) as node:
        assert not node.is_ours()


@pytest.mark.parametrize("dims", [40, 544])
def test_odd_heads_are_left_to_ggml(dims):
    with node_of(random_case(Sizes(4, 32, dims=dims))) as node:
        assert not node.is_ours()


OTHERS = [n for n, f in machine.ISAS.items() if f <= machine.cpu_features() and n != machine.isa()]


@pytest.mark.slow
@pytest.mark.parametrize("isa", OTHERS)
def test_the_other_instruction_sets_of_this_machine_pass_too(isa):
    """Run this file once more on each."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not other_instruction_sets"]
    result = subprocess.run(
        [*command, str(Path(__file__))],
        env=os.environ | {"EDGE_RUNTIME_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
