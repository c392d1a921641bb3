"""Fake quantization with a learned step and the clip-then-round gradients of LSQ and LSQ+.

    u = (x - beta) / s,   x_hat = round(clip(u, q_min, q_max)) * s + beta

(Esser et al., ICLR 2020, eqs. 1-2; the offset beta is Bhalgat et al., CVPR workshops 2020, eq. 6.)
Memory bound: forward reads x once and writes it once; backward reads x and the gradient, writes one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.fake_quant import library

__all__ = ["fake_quant"]

MAX_LEVEL = 2**22
"""Largest level: the Triton kernel rounds by adding 1.5 * 2^23, exact for float32 up to here."""


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
        scale: the step, > 0 (not checked: that would wait for the device). Shape () or, with
            `axis`, (x.shape[axis],). Computed in float32 (float64 for float64 `x`).
        q_min: smallest level.
        q_max: largest level, above `q_min`.
        offset: the LSQ+ offset, same shape as `scale`, in the unit of `x`; None is 0.
        axis: dimension of `x` that has a scale per index; None is one scale for the tensor.
        group_size: one scale for so many consecutive elements of the last dimension, in the place of `axis`; `scale` then
            has shape (*x.shape[:-1], x.shape[-1] // group_size).
        grad_scale: factor on the gradients of scale and offset (LSQ's g).

    Returns:
        Tensor like `x`. NaN in `x` stays NaN, gets gradient 0 and makes the scale's gradient NaN.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: the range is empty or beyond +-2^22, the axis does not exist, groups do not divide the last dimension, or
            a shape does not fit.
    """
    if not x.is_floating_point():
        raise TypeError(f"fake_quant needs a floating-point tensor, got {x.dtype}")
    if q_min >= q_max:
        raise ValueError(f"q_min must be below q_max, got {q_min} and {q_max}")
    if max(-q_min, q_max) > MAX_LEVEL:
        raise ValueError(f"levels must lie within +-{MAX_LEVEL}, got {q_min} and {q_max}")
    if axis is not None and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of {x.ndim} dimensions")
    if group_size is not None:
        if axis is not None:
            raise ValueError(
                f"fake_quant: axis {axis} and group_size {group_size} are both given, expected one of them"
            )
        if x.ndim < 1 or group_size < 1 or x.shape[-1] % group_size:
            raise ValueError(
                f"fake_quant: group_size is {group_size}, expected a divisor of the last dimension of {tuple(x.shape)}"
            )
    wanted = _scale_shape(x, axis, group_size)
    for name, value in (("scale", scale), ("offset", offset)):
        if value is not None and tuple(value.shape) != wanted:
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if group_size is not None:
        flat = None if offset is None else offset.reshape(-1)
        grouped = x.reshape(-1, group_size)
        return fake_quant(grouped, scale.reshape(-1), q_min, q_max, offset=flat, axis=0, grad_scale=grad_scale).view(
            x.shape
        )
    dim = -1 if axis is None else axis % x.ndim
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    beta = None if offset is None else offset.to(wide)
    return library.run(x, scale.to(wide), beta, q_min, q_max, dim, grad_scale)


def _scale_shape(x: Tensor, axis: int | None, group_size: int | None) -> tuple[int, ...]:
    if group_size is not None:
        return (*x.shape[:-1], x.shape[-1] // group_size)
    return () if axis is None else (x.shape[axis],)
