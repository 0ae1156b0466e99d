"""What both operations are made of: one register-blocked matrix product and vectorised exp, sigmoid and tanh.

All arrays of the kernels are one-dimensional and contiguous, with offsets and strides as integers, so that every
kernel compiles once per dtype. The right factor of a product comes in panels of 64 bytes of columns (`panels`); the
inner kernel is written in vector instructions because LLVM does not block loops over matrices for registers.

numba's cache of a kernel looks at the file of that kernel only: after a change in this file, delete the cached
files (``*.nbi``, ``*.nbc``) of the modules that import it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

#: A flat array of a kernel.
Array = np.ndarray[Any, Any]

PANEL_BYTES = 64
#: Products that are summed before the sum goes to memory: short chains keep the rounding errors of long sums small.
CHAIN = 16
#: Rows of the left factor that one tile holds in registers.
TILE_ROWS = 8 if llvm.get_host_cpu_features().get("avx512f", False) else 4


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` without the GIL. NaN and infinity keep their meaning; sums may be reordered."""
    fastmath = {"contract", "reassoc", "nsz"}
    compiled: Callable[..., Any] = numba.njit(function, cache=True, nogil=True, error_model="numpy", fastmath=fastmath)
    return compiled


def panels(x: Tensor) -> Tensor:
    """Cut the columns of a right factor into panels.

    Args:
        x: (..., K, C), float32 or float64, any strides.

    Returns:
        (..., P, K, W) contiguous, W columns of 64 bytes, P = C / W rounded up, zeros beyond C.
    """
    width = PANEL_BYTES // x.element_size()
    missing = -x.shape[-1] % width
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (x.shape[-1] // width, width)).movedim(-2, -3).contiguous()


def flat(x: Tensor) -> Array:
    """The elements of a contiguous tensor as a flat array over the same memory."""
    return x.view(-1).numpy()


def strided(x: Tensor) -> tuple[Array, tuple[int, ...]]:
    """The memory under a tensor of any strides, expanded dimensions included, as a flat array, and the strides."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.as_strided(x, (extent if x.numel() else 0,), (1,)).numpy(), x.stride()


def _vector(builder: ir.IRBuilder, pointer: ir.Value, lanes: int, element: ir.Type) -> ir.Value:
    return builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer())


def _intrinsic(signature: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = intrinsic(signature)
    return compiled


def _tile(rows: int, columns: int) -> Callable[..., Any]:
    """A function ``c += a @ w`` for a tile of `rows` rows and `columns` panels, summed in registers.

    Its arguments: ``a, a0, a_row, a_k`` the left factor, the offset of its first element and its strides;
    ``w, w0, w_panel`` the panels, the offset of the first element and the distance of two panels; ``depth`` K;
    ``c, c0, c_row`` likewise, the columns of c being contiguous.
    """

    def signature(context: Any, a: Any, a0: Any, a_row: Any, a_k: Any, w: Any, w0: Any, w_panel: Any, depth: Any,
                  c: Any, c0: Any, c_row: Any) -> Any:  # fmt: skip
        dtype = c.dtype
        size = dtype.bitwidth // 8
        lanes = PANEL_BYTES // size
        index = types.intp

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            a, a0, a_row, a_k, w, w0, w_panel, depth, c, c0, c_row = args
            element = context.get_value_type(dtype)
            vector = ir.VectorType(element, lanes)
            zero = ir.IntType(32)(0)
            lane0 = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
            kinds = (signature.args[0], signature.args[4], signature.args[8])
            a, w, c = (
                context.make_array(kind)(context, builder, x).data for kind, x in zip(kinds, (a, w, c), strict=True)
            )

            def times(x: ir.Value, factor: int) -> ir.Value:
                return builder.mul(x, x.type(factor))

            def at(pointer: ir.Value, *offsets: ir.Value) -> ir.Value:
                for offset in offsets:
                    pointer = builder.gep(pointer, [offset])
                return pointer

            tile = [(r, p) for r in range(rows) for p in range(columns)]
            places = {
                (r, p): _vector(builder, at(c, c0, times(c_row, r), c0.type(p * lanes)), lanes, element)
                for r, p in tile
            }
            sums = {place: cgutils.alloca_once(builder, vector) for place in tile}
            for place in tile:
                builder.store(ir.Constant(vector, None), sums[place])
            a_rows = [at(a, a0, times(a_row, r)) for r in range(rows)]
            w_columns = [at(w, w0, times(w_panel, p)) for p in range(columns)]
            with cgutils.for_range(builder, depth) as loop:
                k_a, k_w = builder.mul(loop.index, a_k), times(loop.index, lanes)
                factors = [builder.load(_vector(builder, at(x, k_w), lanes, element), align=size) for x in w_columns]
                for r in range(rows):
                    scalar = builder.load(at(a_rows[r], k_a))
                    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, zero)
                    broadcast = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), lane0)
                    for p in range(columns):
                        product = builder.fmul(broadcast, factors[p], flags=("contract",))
                        total = builder.fadd(builder.load(sums[r, p]), product, flags=("contract",))
                        builder.store(total, sums[r, p])
            for place in tile:
                before = builder.load(places[place], align=size)
                builder.store(builder.fadd(before, builder.load(sums[place])), places[place], align=size)
            return context.get_dummy_value()

        return types.void(a, index, index, index, w, index, index, index, c, index, index), generate

    return _intrinsic(signature)


_tall_tile = _tile(TILE_ROWS, 1)
_wide_tile = _tile(1, 4)
_small_tile = _tile(1, 1)


@kernel
def add_product(
    a: Array, a0: int, a_row: int, a_k: int, w: Array, w0: int, w_panel: int, depth: int,
    c: Array, c0: int, c_row: int, rows: int, columns: int,
) -> None:  # fmt: skip
    """``c += a @ w``, W being the columns of a panel.

    Callers pass constants as ``np.intp``: for each literal numba would compile this function anew.

    Args:
        a: the left factor (rows, depth).
        a0: offset of its first element.
        a_row: its row stride.
        a_k: its other stride.
        w: the right factor as panels (columns, depth, W), each contiguous.
        w0: offset of its first element.
        w_panel: distance from panel to panel.
        depth: K, the length of the sums.
        c: (rows, columns * W), rows contiguous.
        c0: offset of its first element.
        c_row: its row stride.
        rows: rows of a and c.
        columns: panels of w.
    """
    width = PANEL_BYTES // c.itemsize
    tall = rows - rows % TILE_ROWS
    wide = columns - columns % 4
    for p in range(columns):
        for r in range(0, tall, TILE_ROWS):
            for k in range(0, depth, CHAIN):
                _tall_tile(
                    a, a0 + r * a_row + k * a_k, a_row, a_k, w, w0 + p * w_panel + k * width, w_panel,
                    min(CHAIN, depth - k), c, c0 + r * c_row + p * width, c_row,
                )  # fmt: skip
    for r in range(tall, rows):
        for p in range(0, wide, 4):
            for k in range(0, depth, CHAIN):
                _wide_tile(
                    a, a0 + r * a_row + k * a_k, a_row, a_k, w, w0 + p * w_panel + k * width, w_panel,
                    min(CHAIN, depth - k), c, c0 + r * c_row + p * width, c_row,
                )  # fmt: skip
        for p in range(wide, columns):
            for k in range(0, depth, CHAIN):
                _small_tile(
                    a, a0 + r * a_row + k * a_k, a_row, a_k, w, w0 + p * w_panel + k * width, w_panel,
                    min(CHAIN, depth - k), c, c0 + r * c_row + p * width, c_row,
                )  # fmt: skip


_LN2 = Decimal(2).ln()
#: Per dtype: bits of the fraction, bits kept in the high part of ln 2, range of exp.
_EXP = {types.float32: (23, 9, -87.3, 88.0), types.float64: (52, 32, -708.3, 709.0)}
#: (exp(r) - 1 - r) / r^2 for |r| <= ln(2) / 2: the Taylor series.
_EXP_SERIES = {
    types.float32: [1 / math.factorial(k) for k in range(2, 8)],
    types.float64: [1 / math.factorial(k) for k in range(2, 14)],
}
#: (tanh(x) / x - 1) / x^2 as a polynomial in x^2 for |x| <= 0.55, interpolated at Chebyshev nodes.
_TANH_SERIES = {
    types.float32: [-0.3333333188, 0.1333309695, -0.05390615888, 0.02128952177, -0.006573224231],
    types.float64: [
        -0.333333333333333333, 0.133333333333333072, -0.0539682539682135637, 0.0218694885337008273,
        -0.00886323545271468112, 0.00359212660048533871, -0.00145581738691284845, 0.000589894249091289851,
        -0.000238427011434883357, 0.0000944341829620754001, -0.0000335515449242574551, 0.00000776889720893809813,
    ],
}  # fmt: skip


def _power_of_two(context: Any, n: Any) -> Any:
    """2^n for an integral float n within the range of normal exponents."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        integer = ir.IntType(n.bitwidth)
        fraction = _EXP[n][0]
        bias = (1 << (n.bitwidth - fraction - 2)) - 1
        exponent = builder.add(builder.fptosi(args[0], integer), integer(bias))
        return builder.bitcast(builder.shl(exponent, integer(fraction)), args[0].type)

    return n(n), generate


def _polynomial(coefficients: dict[Any, list[float]]) -> Callable[..., Any]:
    """A function of one float: the polynomial with the coefficients for its dtype, constant first."""

    def signature(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
            *lower, highest = (args[0].type(value) for value in coefficients[x])
            total = highest
            for value in reversed(lower):
                product = builder.fmul(total, args[0], flags=("contract",))
                total = builder.fadd(product, value, flags=("contract",))
            return total

        return x(x), generate

    return _intrinsic(signature)


_scale = _intrinsic(_power_of_two)
_exp_series = _polynomial(_EXP_SERIES)
_tanh_series = _polynomial(_TANH_SERIES)


def exp(x: Any) -> Any:
    """The exponential within 1 ulp; 0 below the normal numbers, saturates at x = 88 (709 in float64)."""
    raise NotImplementedError


def tanh(x: Any) -> Any:
    """The hyperbolic tangent within 2 ulp."""
    raise NotImplementedError


def _implements(stub: Callable[..., Any]) -> Callable[..., Any]:
    """Without reordering of sums, which the reduction of the argument would not survive."""
    found: Callable[..., Any] = overload(
        stub, jit_options={"fastmath": {"contract"}, "forceinline": True, "error_model": "numpy"}
    )
    return found


@_implements(exp)
def _exp_impl(x: Any) -> Any:
    number = np.float32 if x == types.float32 else np.float64
    _, bits, lowest, highest = _EXP[x]
    ln2_high = Decimal(int(_LN2 * 2**bits)) / 2**bits
    ln2_0, ln2_1, per_ln2 = number(ln2_high), number(_LN2 - ln2_high), number(1 / _LN2)
    low, high, zero, half = number(lowest), number(highest), number(0), number(0.5)

    def value(x: Any) -> Any:
        inside = x if x < high else high
        inside = inside if inside > low else low
        n = np.floor(inside * per_ln2 + half)
        r = (inside - n * ln2_0) - n * ln2_1
        power = _scale(n)
        y = power + power * (r + r * r * _exp_series(r))
        y = y if x >= low else zero
        return y if x == x else x

    return value


@_implements(tanh)
def _tanh_impl(x: Any) -> Any:
    number = np.float32 if x == types.float32 else np.float64
    zero, one, two, middle = number(0), number(1), number(2), number(0.55)

    def value(x: Any) -> Any:
        size = abs(x)
        e = exp(-two * size)
        square = x * x
        # 1 - tanh^2 needs the last bit near 1, small results their relative precision.
        y = one - two * e / (one + e) if size > middle else size + size * (square * _tanh_series(square))
        return y if x >= zero else -y

    return value


@kernel
def exp_minus(a: Array, shift: Any) -> None:
    """``a = exp(a - shift)`` in place; `shift` of the dtype of a."""
    for j in range(a.size):
        a[j] = exp(a[j] - shift)


@kernel
def sigmoid(a: Array) -> None:
    """``a = 1 / (1 + exp(-a))`` in place."""
    one = a.dtype.type(1)
    for j in range(a.size):
        a[j] = one / (one + exp(-a[j]))


@kernel
def tanh_all(a: Array) -> None:
    """``a = tanh(a)`` in place."""
    for j in range(a.size):
        a[j] = tanh(a[j])
