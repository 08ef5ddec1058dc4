"""Matrix products and layer norms of the vision part, in one of two arithmetics with the same interface.

`FloatArithmetic` is the official one: float32 weights and activations (on AMX as three bfloat16 each, which loses
nothing). `Int8Arithmetic` stores weights as int8 (one scale per output, or rounded in fours) and quantises
activations row by row, with int32 sums, and attends in bfloat16 or int16 where that is faster; layer norm, softmax
and the residual stream stay float32. A layer norm's gain and bias are folded into the products after it before those
are quantised: otherwise channels that a gain makes fifty times larger than the rest would use up their row's range.
For products without a norm before them, calibration finds factors to the same end (see `calibration`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import BackendUnavailable
from edge_runtime.vision.calibration import Calibration
from edge_runtime.weights.gguf_file import Float32

if TYPE_CHECKING:
    from edge_kernels.linear.dispatch import PackedFloatWeight
    from edge_kernels.linear.int8_rows import QuantizedRows
    from edge_kernels.linear.int8_weights import PackedInt8Weight

    Rows = Float32 | QuantizedRows
    Int64 = npt.NDArray[np.int64]


def check_instruction_set() -> None:
    """Report early, and in our words, that EDGE_RUNTIME_ISA asks for what this machine does not have.

    Raises
    ------
    BackendUnavailable
        Listing what is possible.
    """
    from edge_kernels.machine import isa

    try:
        isa()
    except ValueError as error:
        raise BackendUnavailable(str(error)) from None


def bytes_per_weight(*, exact: bool) -> float:
    """Maximum bytes per packed weight."""
    if not exact:
        return 1.25  # with multipliers; without asking the kernels, whose import takes time
    from edge_kernels.linear.dispatch import BYTES_PER_WEIGHT

    return BYTES_PER_WEIGHT


@dataclass(frozen=True)
class Affine:
    """Gain and bias of a layer norm: ndarrays [shape=(E,), float32]."""

    gain: Float32
    bias: Float32


Norm = Callable[[Float32], "Rows"]
"""Layer norm: rows [M, E] → rows for a product of the same arithmetic."""


@dataclass(frozen=True)
class Weights:
    """Everything a file has for one product."""

    weight: Float32
    """ndarray [shape=(N, K), float32]"""
    bias: Float32 | None = None
    """ndarray [shape=(N,), float32]"""
    name: str = ""
    """Name of the tensors, which is also the key to calibration findings."""


class Product(Protocol):
    """y = x Wᵀ + b: rows [M, K] → ndarray [shape=(M, N), float32]; then tanh-GELU or a residual, if requested."""

    def __call__(
        self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None, out: Float32 | None = None
    ) -> Float32:
        """Multiply, into `out` if given; it may be the residual."""
        ...


SelfAttention = Callable[["Rows", "Int64"], Float32]
"""Rows [M, E] and first rows of sequences [S+1] → attended values of all heads, ndarray [shape=(M, E), float32]."""

Mlp = Callable[["Rows", Float32], Float32]
"""residual + W2 gelu(W1 x + b1) + b2: rows [M, K] and residual [M, K], which is overwritten with the result."""


class Arithmetic(Protocol):
    """Builds products and norms."""

    def product(self, weights: Weights, after: Affine | None = None) -> Product:
        """Pack a product; `after` is the layer norm whose `norm` computes its input."""
        ...

    def mlp(self, first: Weights, second: Weights, after: Affine) -> Mlp:
        """Pack the two products of an MLP; `after` is the layer norm whose `norm` computes its input."""
        ...

    def self_attention(self, qkv: Weights, heads: int, scale: float, after: Affine) -> SelfAttention:
        """Pack the product for queries, keys and values; rows attend to the rows of their own sequence."""
        ...

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Build the layer norm for products packed with `after=affine`."""
        ...

    def attention(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        heads: int,
        scale: float,
        q_offsets: Int64,
        kv_offsets: Int64,
        *,
        fine_scores: bool = False,
    ) -> Float32:
        """Attend within each of several sequences; see `edge_kernels.attention.float32`.

        Parameters
        ----------
        fine_scores : whether the last digits of the scores matter.
        """
        ...


class FloatArithmetic:
    """float32 throughout."""

    _space: Float32 | None = None

    def product(self, weights: Weights, after: Affine | None = None) -> Product:
        """Pack a product; the norm before it applies its own gain and bias, and nothing is rounded."""
        from edge_kernels.linear.dispatch import pack_float_weight

        return _FloatProduct(pack_float_weight(weights.weight), weights.bias)

    def mlp(self, first: Weights, second: Weights, after: Affine) -> Mlp:
        """Pack two products."""
        fc1, fc2 = self.product(first, after), self.product(second)
        return lambda x, residual: fc2(fc1(x, gelu=True), residual=residual, out=residual)

    def self_attention(self, qkv: Weights, heads: int, scale: float, after: Affine) -> SelfAttention:
        """Pack the product; attention comes after it."""
        product, width = self.product(qkv, after), len(qkv.weight)

        def run(x: Rows, offsets: Int64) -> Float32:
            q, k, v = np.split(product(x, out=self._workspace((int(offsets[-1]), width))), 3, axis=1)
            return self.attention(q, k, v, heads, scale, offsets, offsets)

        return run

    def _workspace(self, shape: tuple[int, int]) -> Float32:
        """Memory that the next call overwrites: fresh memory costs more than filling it."""
        if self._space is None or self._space.shape != shape:
            self._space = np.empty(shape, np.float32)
        return self._space

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Build a layer norm."""
        from edge_kernels.rows.norm import layer_norm

        return lambda x: layer_norm(x, affine.gain, affine.bias, epsilon)

    def attention(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        heads: int,
        scale: float,
        q_offsets: Int64,
        kv_offsets: Int64,
        *,
        fine_scores: bool = False,
    ) -> Float32:
        """Attend in float32."""
        from edge_kernels.attention.float32 import attention

        return attention(q, k, v, heads, scale, q_offsets, kv_offsets)


class Int8Arithmetic(FloatArithmetic):
    """int8 products with int32 sums."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self._calibration = calibration or Calibration()

    def product(self, weights: Weights, after: Affine | None = None) -> Product:
        """Quantise and pack a product, with the norm's gain and bias folded in: W(g·n + b) = (W g) n + W b."""
        from edge_kernels.linear.int8_weights import pack_weight_int8

        weight, bias, name = weights.weight, weights.bias, weights.name
        if after is not None:
            return _Int8Product(pack_weight_int8(weight, factor=after.gain), _folded_bias(weights, after))
        if name in self._calibration.in_float:
            return super().product(weights)
        smooth = self._calibration.smooth.get(name)
        factor = None if smooth is None else np.float32(1) / smooth
        return _Int8Product(pack_weight_int8(weight, factor=smooth), bias, factor)

    def mlp(self, first: Weights, second: Weights, after: Affine) -> Mlp:
        """Pack two products; values between them are quantised where they are computed, never stored in float32."""
        from edge_kernels.linear.int8 import linear_int8, linear_int8_quantized
        from edge_kernels.linear.int8_weights import pack_weight_int8

        if second.name in self._calibration.in_float:
            return super().mlp(first, second, after)
        fc1 = self.product(first, after)
        assert isinstance(fc1, _Int8Product)
        smooth = self._calibration.smooth.get(second.name)
        factor = None if smooth is None else np.float32(1) / smooth
        weight2, bias2 = pack_weight_int8(second.weight, factor=smooth, in_groups=True), second.bias

        def run(x: Rows, residual: Float32) -> Float32:  # must not hold on to `second`: its weight is float32
            grown = linear_int8_quantized(x, fc1.weight, fc1.bias, gelu=True, factor=factor)
            return linear_int8(grown, weight2, bias2, residual=residual, out=residual)

        return run

    def self_attention(self, qkv: Weights, heads: int, scale: float, after: Affine) -> SelfAttention:
        """Pack the product; on AMX it is fused with the attention, and values between them stay in the cache."""
        from edge_kernels.attention import bf16 as attention_bf16

        if not attention_bf16.IS_POSSIBLE:
            return super().self_attention(qkv, heads, scale, after)
        from edge_kernels.attention.qkv_fused import pack_heads, self_attention

        packed = pack_heads(qkv.weight, _folded_bias(qkv, after), heads, scale, factor=after.gain)

        def run(x: Rows, offsets: Int64) -> Float32:
            assert not isinstance(x, np.ndarray)
            return self_attention(x, packed, offsets)

        return run

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Build a layer norm without gain and bias, quantised in the same pass; once for all products after it."""
        from edge_kernels.linear.int8_rows import layer_norm_quantized

        return lambda x: layer_norm_quantized(x, epsilon)

    def attention(
        self,
        q: Float32,
        k: Float32,
        v: Float32,
        heads: int,
        scale: float,
        q_offsets: Int64,
        kv_offsets: Int64,
        *,
        fine_scores: bool = False,
    ) -> Float32:
        """Attend in bfloat16 on AMX, in int16 with int32 sums, or in float32 where that is as fast."""
        from edge_kernels.attention import bf16 as attention_bf16
        from edge_kernels.attention import int16 as attention_int16

        arguments = q, k, v, heads, scale, q_offsets, kv_offsets
        if attention_bf16.IS_POSSIBLE:
            return attention_bf16.attention_bf16(*arguments, fine_scores=fine_scores)
        attend = attention_int16.attention_int16 if attention_int16.GAINS else super().attention
        return attend(*arguments)


def _folded_bias(weights: Weights, after: Affine) -> Float32:
    """Bias of the product plus what the norm's bias adds to its result."""
    # Not BLAS: its threads would keep spinning beside ours.
    moved: Float32 = np.einsum("nk,k->n", weights.weight, after.bias)
    return moved if weights.bias is None else weights.bias + moved


@dataclass(frozen=True)
class _FloatProduct:
    weight: PackedFloatWeight
    bias: Float32 | None

    def __call__(
        self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None, out: Float32 | None = None
    ) -> Float32:
        from edge_kernels.linear.dispatch import linear_float

        assert isinstance(x, np.ndarray)
        return linear_float(x, self.weight, self.bias, gelu=gelu, residual=residual, out=out)


@dataclass(frozen=True)
class _Int8Product:
    weight: PackedInt8Weight
    bias: Float32 | None
    factor: Float32 | None = None
    """Applied to the columns of the input."""

    def __call__(
        self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None, out: Float32 | None = None
    ) -> Float32:
        from edge_kernels.linear.int8 import linear_int8
        from edge_kernels.linear.int8_rows import quantize_rows

        if self.factor is not None:
            assert isinstance(x, np.ndarray)
            x = quantize_rows(x, self.factor)
        return linear_int8(x, self.weight, self.bias, gelu=gelu, residual=residual, out=out)
