"""fake_quant on the CPU: the reference with few passes, working in place on its own temporaries."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.fake_quant.reference import reduce, spread


def _scaled(x: Tensor, s: Tensor, beta: Tensor | None) -> Tensor:
    """Return u = (x - beta) / s as a fresh tensor."""
    if beta is None:
        return x.to(s.dtype) / s
    return (x.to(s.dtype) - beta).div_(s)


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int) -> Tensor:
    """Return the fake-quantized values, in the dtype of `x`."""
    s = spread(scale, x, dim)
    beta = spread(offset, x, dim) if offset is not None else None
    u = _scaled(x, s, beta).clamp_(q_min, q_max).round_().mul_(s)
    if beta is not None:
        u.add_(beta)
    return u.to(x.dtype)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and offset (the last two before `grad_scale`)."""
    s = spread(scale, x, dim)
    beta = spread(offset, x, dim) if offset is not None else None
    u = _scaled(x, s, beta)
    clipped = u.clamp(q_min, q_max)
    inside = clipped == u
    d_x = (grad * inside).to(x.dtype)
    g = grad.to(s.dtype)
    if beta is not None:
        outside = torch.where(inside | u.isnan(), 0.0, g)
        d_offset = reduce(outside, scale, dim)
    else:
        d_offset = torch.zeros_like(scale)
    # On a border r is the border's level, not round(u) - u = 0: subtract u strictly inside only.
    inside.logical_and_(clipped != q_min).logical_and_(clipped != q_max)
    nan = u.isnan()
    u.masked_fill_(~(inside | nan), 0.0)
    r = clipped.round_().sub_(u)
    return d_x, reduce(r.mul_(g), scale, dim), d_offset
