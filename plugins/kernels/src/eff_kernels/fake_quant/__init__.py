"""Fake quantization with a learned step and the clip-then-round gradients of LSQ and LSQ+.

    u = (x - beta) / s,   x_hat = round(clip(u, q_min, q_max)) * s + beta

(Esser et al., ICLR 2020, eqs. 1-2; the offset beta is Bhalgat et al., CVPR workshops 2020, eq. 6.)
Memory bound: forward reads x once and writes it once; backward reads x and the gradient, writes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_device,
    check_dtype,
    check_finite,
    check_integer,
    check_number,
    check_shape,
    check_values,
)
from eff_kernels.fake_quant import library

__all__ = ["fake_quant"]

MAX_LEVEL = 2**22
"""Largest level: the Triton kernel rounds by adding 1.5 * 2^23, exact for float32 up to here."""
_LEAST, _MOST = 5e-324, torch.finfo(torch.float64).max
"""Finite numbers above 0."""


def fake_quant(
    x: Tensor,
    scale: Tensor,
    q_min: int,
    q_max: int,
    *,
    offset: Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """Return `x` rounded (half to even) to `scale` times a level in [q_min, q_max], plus `offset`.

    Backward, with upstream gradient G: to x, G where q_min <= u <= q_max, else 0; to the scale,
    `grad_scale * sum(G * r)` with r = round(u) - u strictly inside the range, q_min where
    u <= q_min, q_max where u >= q_max; to the offset, `grad_scale` times the sum of G outside.
    The clip is seen before the rounding: torch's `_fake_quantize_learnable_*` masks the rounded
    value instead, which differs within half a step of the borders.

    Args:
        x: values, any shape; float16, bfloat16, float32 or float64.
        scale: the step, floating point, finite and > 0 (looked at on the CPU only, and not under torch.compile: elsewhere
            that would wait for the device). Shape () or, with `axis`, (x.shape[axis],). Computed in float32 (float64 for
            float64 `x`).
        q_min: smallest level.
        q_max: largest level, above `q_min`.
        offset: the LSQ+ offset, floating point, finite (as for `scale`), same shape as `scale`, in the unit of `x`; None
            is 0.
        axis: dimension of `x` that has a scale per index; None is one scale for the tensor.
        group_size: one scale for so many consecutive elements of the last dimension, in the place of `axis`; `scale` then
            has shape (*x.shape[:-1], x.shape[-1] // group_size).
        grad_scale: factor on the gradients of scale and offset (LSQ's g), finite.

    Returns:
        Tensor like `x`. NaN in `x` stays NaN, gets gradient 0 and makes the scale's gradient NaN.

    Raises:
        TypeError: `x`, `scale` or `offset` is not floating point, a level, the axis or the group size no integer, or
            `grad_scale` no number.
        ValueError: the range is empty or beyond +-2^22, the axis does not exist, groups do not divide the last dimension, a
            shape or device does not fit, a scale is not above 0 and finite, or an offset or `grad_scale` not finite.
    """
    op = "fake_quant"
    check_dtype(op, "x", x, FLOATS)
    check_integer(op, "q_min", q_min)
    check_integer(op, "q_max", q_max)
    if not -MAX_LEVEL <= q_min < q_max <= MAX_LEVEL:
        raise ValueError(
            f"{op}: q_min and q_max are {q_min} and {q_max}, expected q_min below q_max, both within +-{MAX_LEVEL}"
        )
    if axis is not None:
        check_integer(op, "axis", axis)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"{op}: axis is {axis}, expected a dimension of x, which has {x.ndim}")
    if group_size is not None:
        check_integer(op, "group_size", group_size)
        if axis is not None:
            raise ValueError(f"{op}: axis {axis} and group_size {group_size} are both given, expected one of them")
        if x.ndim < 1 or group_size < 1 or x.shape[-1] % group_size:
            raise ValueError(
                f"{op}: group_size is {group_size}, expected a divisor of the last dimension of {tuple(x.shape)}"
            )
    wanted = _scale_shape(x, axis, group_size)
    for name, value in (("scale", scale), ("offset", offset)):
        if name == "scale" or value is not None:
            check_dtype(op, name, value, FLOATS)
            check_shape(op, name, value, wanted)
            check_device(op, name, value, "x", x)
    check_number(op, "grad_scale", grad_scale)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = scale.to(wide)
    check_values(op, "scale", scale, _LEAST, _MOST, "above 0 and finite")
    shape, dim = x.shape, -1 if axis is None else axis % x.ndim
    if group_size is not None:
        x, scale, dim = x.reshape(-1, group_size), scale.reshape(-1), 0
        offset = None if offset is None else offset.reshape(-1)
    beta = None if offset is None else offset.to(wide)
    if beta is not None:
        check_finite(op, "offset", beta)
    y = library.run(x, scale, beta, q_min, q_max, dim, grad_scale)
    return y if group_size is None else y.view(shape)


def _scale_shape(x: Tensor, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    if group_size is not None:
        return (*x.shape[:-1], x.shape[-1] // group_size)
    return () if axis is None else (x.shape[axis],)
