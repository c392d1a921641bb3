"""Product with weights that stay packed in 2, 3, 4 or 8 bits, with a scale (and a zero point) per group.

    y = x @ w^T,   w[n, k] = (level[n, k] - zero_point[n, g]) * scale[n, g],   g = k // (K / G)

Uniform grids of PTQ by learned rounding (Yvinec et al., arXiv:2308.07662, sec. 2) and of any other round-to-grid method.
Levels are unsigned, packed by `eff_kernels.packing.pack_rows`: level k of a row has bits k*bits to k*bits + bits - 1 of
the row's bytes, least significant first. A matrix takes N * K * bits / 8 bytes; one row of x reads little else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_choice,
    check_contiguous,
    check_device,
    check_dtype,
    check_no_gradient,
    check_not_empty,
    check_shape,
)
from eff_kernels.packing import ROW_BITS, pack_rows, unpack_rows
from eff_kernels.weight_only_matmul import library
from eff_kernels.weight_only_matmul import prepacked as second_layout
from eff_kernels.weight_only_matmul.prepacked import Prepacked

__all__ = ["Prepacked", "dequantize", "pack_rows", "prepack", "unpack_rows", "weight_only_matmul"]

GROUP_MULTIPLE = 8
"""Levels of a group come in this multiple: eight levels fill whole bytes at every width."""


def weight_only_matmul(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    *,
    bits: int,
    zero_point: Tensor | None = None,
    prepacked: Prepacked | None = None,
) -> Tensor:
    """Return x @ w^T for the packed weight; backward to `x` only.

    Weights are computed in float32, then rounded to the dtype of `x` where the product runs in it; sums are float32
    (float64 for float64 `x`). On a GPU one row takes a vector kernel, up to some hundred rows a fused product, more
    rows dequantize the weight and call the library's product. NaN in `x` or `scale` reaches the results it belongs to.

    Args:
        x: activations, shape (..., K), floating point.
        packed: levels of `pack_rows`, shape (N, K * bits / 8), uint8, contiguous; K a multiple of 8.
        scale: step of the grid, shape (N, G), floating point; K / G a multiple of 8.
        bits: 2, 3, 4 or 8.
        zero_point: level that stands for 0, need not be an integer, shape (N, G), floating point; None is 2^(bits-1).
        prepacked: `prepack` of the same weight. Taken for up to 32 rows of bfloat16 on the CPU without a gradient,
            where it is several times faster; its scales are bfloat16. Otherwise the packed weight is. `packed`, `scale`
            and `zero_point` must be the tensors it was made of, unchanged since.

    Returns:
        Shape (..., N), dtype of `x`.

    Raises:
        TypeError: a dtype is not as stated, or `prepacked` is something else.
        ValueError: a shape, device, layout or `bits` does not fit, `scale` or `zero_point` asks for a gradient, or
            `prepacked` is of another weight.
    """
    op = "weight_only_matmul"
    check_dtype(op, "x", x, FLOATS)
    if not x.ndim:
        raise ValueError(f"{op}: x has no dimensions, expected (..., K)")
    k = x.shape[-1]
    _check_weight(op, packed, scale, zero_point, bits)
    check_shape(op, "packed", packed, ("N", k * bits // 8))
    if packed.shape[1] * 8 != k * bits:
        raise ValueError(f"{op}: x has {k} columns, expected {packed.shape[1] * 8 // bits} as packed has")
    check_device(op, "packed", packed, "x", x)
    if prepacked is not None and not torch.compiler.is_compiling():
        if not isinstance(prepacked, Prepacked):
            raise TypeError(f"{op}: prepacked is {type(prepacked).__name__}, expected what prepack returns")
        if not prepacked.is_of(packed, scale, zero_point, bits):
            raise ValueError(
                f"{op}: prepacked is of another weight {tuple(prepacked.packed.shape)} in {prepacked.bits} bits, expected "
                f"prepack of these very tensors, {tuple(packed.shape)} in {bits} bits; make it anew where they were replaced"
            )
    if prepacked is not None and library.OP.choose(x).path == "cpu" and second_layout.suits(x):
        return second_layout.forward(x.reshape(-1, k), prepacked).view(*x.shape[:-1], len(packed))
    return library.run(x.reshape(-1, k), packed, scale, zero_point, bits).view(*x.shape[:-1], len(packed))


def prepack(packed: Tensor, scale: Tensor, *, bits: int, zero_point: Tensor | None = None) -> Prepacked | None:
    """Return the weight in the layout of torch's own products for few rows, made once; arguments and errors as above.

    None where torch has none: off the CPU; rows not a multiple of 16 or groups not of 32; 8 bits with several groups or
    a zero point.
    """
    _check_weight("prepack", packed, scale, zero_point, bits)
    return second_layout.make(packed, scale, zero_point, bits)


def dequantize(
    packed: Tensor, scale: Tensor, *, bits: int, zero_point: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weight (N, K) that `weight_only_matmul` multiplies with; arguments and errors as there."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"dequantize: dtype is {dtype}, expected a floating-point dtype")
    _check_weight("dequantize", packed, scale, zero_point, bits)
    result: Tensor = library.dequantize_op(packed, scale, zero_point, bits, dtype)
    return result


def _check_weight(op: str, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> None:
    """Raise where the packed weight, its scales and its zero points do not belong together."""
    check_choice(op, "bits", bits, ROW_BITS)
    check_dtype(op, "packed", packed, (torch.uint8,))
    check_shape(op, "packed", packed, ("N", "bytes"))
    check_not_empty(op, "packed", packed)
    check_contiguous(op, "packed", packed)
    if packed.shape[1] % bits:
        raise ValueError(f"{op}: packed has {packed.shape[1]} bytes a row, expected a multiple of {bits}")
    check_dtype(op, "scale", scale, FLOATS)
    check_shape(op, "scale", scale, (len(packed), "groups"))
    check_not_empty(op, "scale", scale)
    k, groups = packed.shape[1] * 8 // bits, scale.shape[1]
    if k % groups or k // groups % GROUP_MULTIPLE:
        raise ValueError(
            f"{op}: scale has {groups} groups for {k} levels a row, expected groups of a multiple of {GROUP_MULTIPLE}"
        )
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value is None:
            continue
        check_dtype(op, name, value, FLOATS)
        check_shape(op, name, value, scale.shape)
        check_device(op, name, value, "packed", packed)
        check_no_gradient(op, name, value, "which only x gets")
