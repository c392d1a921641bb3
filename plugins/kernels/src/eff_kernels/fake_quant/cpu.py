"""fake_quant on the CPU: the reference with few passes, in pieces whose temporaries stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.fake_quant.reference import reduce, spread

PIECE = 1 << 17
"""Elements worked on at a time where one scale serves the whole tensor (half a MiB of float32)."""


def _scaled(x: Tensor, s: Tensor, beta: Tensor | None) -> Tensor:
    """Return u = (x - beta) / s as a fresh tensor."""
    if beta is None:
        return x.to(s.dtype) / s
    return (x.to(s.dtype) - beta).div_(s)


def forward(x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int) -> Tensor:
    """Return the fake-quantized values, in the dtype of `x`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dim >= 0 or x.numel() <= PIECE:
        s = spread(scale, x, dim)
        _forward_piece(x, s, None if offset is None else spread(offset, x, dim), q_min, q_max, out)
        return out
    flat = x.reshape(-1)
    for piece, target in zip(flat.split(PIECE), out.view(-1).split(PIECE), strict=True):
        _forward_piece(piece, scale, offset, q_min, q_max, target)
    return out


def _forward_piece(x: Tensor, s: Tensor, beta: Tensor | None, q_min: int, q_max: int, out: Tensor) -> None:
    u = _scaled(x, s, beta).clamp_(q_min, q_max).round_()
    if beta is None:
        if out.dtype == s.dtype:
            torch.mul(u, s, out=out)
        else:
            out.copy_(u.mul_(s))
    else:
        out.copy_(u.mul_(s).add_(beta))


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, scale and offset (the last two before `grad_scale`)."""
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dim >= 0 or x.numel() <= PIECE:
        s = spread(scale, x, dim)
        beta = None if offset is None else spread(offset, x, dim)
        r, outside = _backward_piece(grad, x, s, beta, q_min, q_max, d_x)
        return d_x, reduce(r, scale, dim), torch.zeros_like(scale) if outside is None else reduce(outside, scale, dim)
    d_scale, d_offset = torch.zeros_like(scale), torch.zeros_like(scale)
    pieces = (tensor.reshape(-1).split(PIECE) for tensor in (grad, x, d_x))
    for g, piece, target in zip(*pieces, strict=True):
        r, outside = _backward_piece(g, piece, scale, offset, q_min, q_max, target)
        d_scale += r.sum()
        if outside is not None:
            d_offset += outside.sum()
    return d_x, d_scale, d_offset


def _backward_piece(
    grad: Tensor, x: Tensor, s: Tensor, beta: Tensor | None, q_min: int, q_max: int, d_x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Write the gradient of x into `d_x`; return the summands of the scale's and the offset's."""
    u = _scaled(x, s, beta)
    g = grad.to(s.dtype)
    clipped = u.clamp(q_min, q_max)
    inside = clipped == u
    d_x.copy_(g * inside)
    outside = None if beta is None else torch.where(inside | u.isnan(), 0.0, g)
    # On a border r is the border's level, not round(u) - u = 0: subtract u strictly inside only.
    inside.logical_and_(clipped != q_min).logical_and_(clipped != q_max)
    r = torch.where(inside, clipped.round().sub_(u), clipped)
    return r.mul_(g), outside
