"""Matrix products and layer norms of the vision part, in one of two arithmetics behind one interface.

`FloatArithmetic` is the official one: float32 weights and activations. `Int8Arithmetic` stores weights as int8 (one
scale per output) and quantises activations row by row, with int32 sums, and attends in int16 where that is faster;
layer norm, softmax and the residual stream stay float32. A layer norm's gain and bias are folded into the products
that follow it before those are quantised: channels that a gain makes fifty times larger than the rest would otherwise
take their row's whole range. For products that no norm precedes, calibration finds factors to the same end (see
`calibration`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from edge_runtime.calibration import Calibration
from edge_runtime.errors import BackendUnavailable
from edge_runtime.weights import Float32

if TYPE_CHECKING:
    from edge_kernels.linear import PackedWeight
    from edge_kernels.linear_int8 import PackedInt8Weight
    from edge_kernels.rows_int8 import QuantizedRows

    Rows = Float32 | QuantizedRows
    Int64 = npt.NDArray[np.int64]


def check_instruction_set() -> None:
    """Tell early, and in our words, that EDGE_RUNTIME_ISA asks for what this machine does not have.

    Raises
    ------
    BackendUnavailable
        Naming what is possible.
    """
    from edge_kernels.compile import isa

    try:
        isa()
    except ValueError as error:
        raise BackendUnavailable(str(error)) from None


@dataclass(frozen=True)
class Affine:
    """Gain and bias of a layer norm: ndarrays [shape=(E,), float32]."""

    gain: Float32
    bias: Float32


Norm = Callable[[Float32], "Rows"]
"""Layer norm: rows [M, E] → rows that a product of the same arithmetic takes."""


class Product(Protocol):
    """y = x Wᵀ + b: rows [M, K] → ndarray [shape=(M, N), float32]; then tanh-GELU or a residual, where asked for."""

    def __call__(self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None) -> Float32:
        """Multiply."""
        ...


class Arithmetic(Protocol):
    """Makes products and norms."""

    def product(
        self, weight: Float32, bias: Float32 | None, after: Affine | None = None, *, name: str = ""
    ) -> Product:
        """Pack a product of weight [N, K].

        Parameters
        ----------
        after : the layer norm whose `norm` makes its input.
        name : of the tensors; what calibration has found is told by it.
        """
        ...

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Make the layer norm that precedes products made with `after=affine`."""
        ...

    def attention(
        self, q: Float32, k: Float32, v: Float32, heads: int, scale: float, q_offsets: Int64, kv_offsets: Int64
    ) -> Float32:
        """Attend within each of several sequences; see `edge_kernels.attention`."""
        ...


class FloatArithmetic:
    """float32 throughout."""

    def product(
        self, weight: Float32, bias: Float32 | None, after: Affine | None = None, *, name: str = ""
    ) -> Product:
        """Pack a product; the norm before it is complete in itself, and nothing is rounded."""
        from edge_kernels.linear import pack_weight

        return _FloatProduct(pack_weight(weight), bias)

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Make a layer norm."""
        from edge_kernels.norm import layer_norm

        return lambda x: layer_norm(x, affine.gain, affine.bias, epsilon)

    def attention(
        self, q: Float32, k: Float32, v: Float32, heads: int, scale: float, q_offsets: Int64, kv_offsets: Int64
    ) -> Float32:
        """Attend in float32."""
        from edge_kernels.attention import attention

        return attention(q, k, v, heads, scale, q_offsets, kv_offsets)


class Int8Arithmetic(FloatArithmetic):
    """int8 products with int32 sums."""

    def __init__(self, calibration: Calibration | None = None) -> None:
        self._calibration = calibration or Calibration()

    def product(
        self, weight: Float32, bias: Float32 | None, after: Affine | None = None, *, name: str = ""
    ) -> Product:
        """Quantise and pack a product, with the norm's gain and bias folded in: W(g·n + b) = (W g) n + W b."""
        from edge_kernels.linear_int8 import pack_weight_int8

        if after is not None:
            # Not BLAS: its threads would spin on beside ours.
            moved = np.einsum("nk,k->n", weight, after.bias)
            return _Int8Product(pack_weight_int8(weight, factor=after.gain), moved if bias is None else bias + moved)
        if name in self._calibration.in_float:
            return super().product(weight, bias)
        smooth = self._calibration.smooth.get(name)
        factor = None if smooth is None else np.float32(1) / smooth
        return _Int8Product(pack_weight_int8(weight, factor=smooth), bias, factor)

    def norm(self, affine: Affine, epsilon: float) -> Norm:
        """Make a layer norm without gain and bias, quantised in the same pass; once for all products that read it."""
        from edge_kernels.rows_int8 import layer_norm_quantized

        return lambda x: layer_norm_quantized(x, epsilon)

    def attention(
        self, q: Float32, k: Float32, v: Float32, heads: int, scale: float, q_offsets: Int64, kv_offsets: Int64
    ) -> Float32:
        """Attend in int16 with int32 sums, or in float32 where that is as fast."""
        from edge_kernels.attention_int16 import GAINS, attention_int16

        attend = attention_int16 if GAINS else super().attention
        return attend(q, k, v, heads, scale, q_offsets, kv_offsets)


@dataclass(frozen=True)
class _FloatProduct:
    weight: PackedWeight
    bias: Float32 | None

    def __call__(self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None) -> Float32:
        from edge_kernels.linear import linear

        assert isinstance(x, np.ndarray)
        return linear(x, self.weight, self.bias, gelu=gelu, residual=residual)


@dataclass(frozen=True)
class _Int8Product:
    weight: PackedInt8Weight
    bias: Float32 | None
    factor: Float32 | None = None
    """On the columns of the input."""

    def __call__(self, x: Rows, *, gelu: bool = False, residual: Float32 | None = None) -> Float32:
        from edge_kernels.linear_int8 import linear_int8
        from edge_kernels.rows_int8 import quantize_rows

        if self.factor is not None:
            assert isinstance(x, np.ndarray)
            x = quantize_rows(x, self.factor)
        return linear_int8(x, self.weight, self.bias, gelu=gelu, residual=residual)
