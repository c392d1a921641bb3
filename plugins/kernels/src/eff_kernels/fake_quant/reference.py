"""What fake_quant means, in plain torch; every kernel must agree with it. Written for reading."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(value: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return a per-channel vector shaped to broadcast against `x`; `dim` -1 is one value for all."""
    if dim < 0:
        return value
    return value.view([-1 if index == dim else 1 for index in range(x.ndim)])


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that scale, rounding and reductions use."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int) -> Tensor:
    """Return the fake-quantized values, in the dtype of `x`."""
    s = spread(scale, x, dim)
    beta = spread(offset, x, dim) if offset is not None else torch.zeros((), dtype=s.dtype, device=x.device)
    u = (x.to(s.dtype) - beta) / s
    return (u.clamp(q_min, q_max).round() * s + beta).to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and offset (the last two before `grad_scale`)."""
    s = spread(scale, x, dim)
    beta = spread(offset, x, dim) if offset is not None else torch.zeros((), dtype=s.dtype, device=x.device)
    u = (x.to(s.dtype) - beta) / s
    g = grad.to(s.dtype)
    inside = (u >= q_min) & (u <= q_max)
    r = u.round() - u
    r = torch.where(u <= q_min, q_min, r)
    r = torch.where(u >= q_max, q_max, r)
    d_x = torch.where(inside, g, 0.0).to(x.dtype)
    return d_x, reduce(g * r, scale, dim), reduce(torch.where(inside | u.isnan(), 0.0, g), scale, dim)


def reduce(values: Tensor, like: Tensor, dim: int) -> Tensor:
    """Return the sum over everything but dimension `dim`, shaped like the scale."""
    if dim < 0:
        return values.sum()
    others = [index for index in range(values.ndim) if index != dim]
    return values.sum(others) if others else values.clone()
