"""fake_quant on the CPU: few passes, in place on its own temporaries.

Backward works through large tensors in pieces that share two work buffers: these stay in the cache,
where temporaries of the whole tensor are fresh pages at every call.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from eff_kernels.fake_quant.reference import reduce, spread

PIECE = 65536
"""Elements per piece of the backward pass; a float32 temporary is 256 KiB."""

# One vectorised pass: its first argument where the second lies strictly between the bounds, else 0.
_keep_between = torch.ops.aten.hardtanh_backward.grad_input


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
    d_x = torch.empty_like(x)
    if x.numel() <= PIECE or dim > 0 or not (x.is_contiguous() and grad.is_contiguous()):
        work = torch.empty_like(x, dtype=scale.dtype), torch.empty_like(x, dtype=scale.dtype)
        d_scale, d_offset = _piece(grad, x, d_x, scale, offset, q_min, q_max, dim, work)
    else:
        d_scale, d_offset = _in_pieces(grad, x, d_x, scale, offset, q_min, q_max, dim)
    if math.isnan(d_scale.sum().item()):
        # A NaN has no place in the range; it shows in d_scale, so the common case needs no pass for it.
        beta = spread(offset, x, dim) if offset is not None else None
        d_x.masked_fill_(_scaled(x, spread(scale, x, dim), beta).isnan(), 0.0)
    return d_x, d_scale, d_offset


def _in_pieces(
    grad: Tensor, x: Tensor, d_x: Tensor, scale: Tensor, offset: Tensor | None, q_min: int, q_max: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Do `_piece` for runs of elements (one scale) or of whole channels (`dim` 0) of contiguous tensors."""
    rows = 1 if dim < 0 else x.shape[0]
    flat = [t.view(-1) if dim < 0 else t.view(rows, -1) for t in (grad, x, d_x)]
    step = PIECE if dim < 0 else max(1, PIECE // flat[0].shape[1])
    buffers = [torch.empty_like(flat[1][:step], dtype=scale.dtype) for _ in range(2)]
    sums = []
    for start in range(0, flat[0].shape[0], step):
        here = slice(start, start + step)
        g, v, d = (t[here] for t in flat)
        s, beta = (t if t is None or dim < 0 else t[here] for t in (scale, offset))
        work = buffers[0][: len(v)], buffers[1][: len(v)]
        sums.append(_piece(g, v, d, s, beta, q_min, q_max, dim, work))
    d_scale, d_offset = zip(*sums, strict=True)
    if dim < 0:
        return torch.stack(d_scale).sum(), torch.stack(d_offset).sum()
    return torch.cat(d_scale), torch.cat(d_offset)


def _piece(
    grad: Tensor, x: Tensor, d_x: Tensor, scale: Tensor, offset: Tensor | None,
    q_min: int, q_max: int, dim: int, work: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill `d_x` and return the gradients of scale and offset; `d_x` where `x` is NaN is left to the caller."""
    s = spread(scale, x, dim)
    u, strictly_inside = work
    if offset is None:
        torch.div(x if x.dtype == s.dtype else x.to(s.dtype), s, out=u)
    else:
        torch.sub(x.to(s.dtype), spread(offset, x, dim), out=u).div_(s)
    g = grad if grad.dtype == s.dtype else grad.to(s.dtype)
    below, above = _just_outside(q_min, q_max, s.dtype)
    passed = d_x if d_x.dtype == s.dtype else torch.empty_like(u)
    _keep_between(g, u, below, above, grad_input=passed)
    if passed is not d_x:
        d_x.copy_(passed)
    d_offset = torch.zeros_like(scale)
    if offset is not None:
        d_offset = reduce(torch.sub(g, passed, out=strictly_inside), scale, dim)  # G where it did not pass, exactly
    # On a border r is the border's level, not round(u) - u = 0: subtract u strictly inside only.
    _keep_between(u, u, q_min, q_max, grad_input=strictly_inside)
    r = u.clamp_(q_min, q_max).round_().sub_(strictly_inside)
    if dim < 0 and r.is_contiguous() and g.is_contiguous():
        return torch.dot(r.view(-1), g.view(-1)), d_offset
    return reduce(r.mul_(g), scale, dim), d_offset


@functools.cache
def _just_outside(q_min: int, q_max: int, dtype: torch.dtype) -> tuple[float, float]:
    """Return the neighbours of the range, so that the strict comparison keeps its borders.

    Beside 0 the neighbour is the smallest normal number: a subnormal would be 0 under flush-to-zero.
    """
    limits = torch.tensor([q_min, q_max], dtype=dtype)
    below, above = torch.nextafter(limits, torch.tensor([-torch.inf, torch.inf], dtype=dtype)).tolist()
    tiny = torch.finfo(dtype).tiny
    return below if q_min else -tiny, above if q_max else tiny
