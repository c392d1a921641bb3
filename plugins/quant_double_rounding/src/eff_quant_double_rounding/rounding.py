"""Double rounding: quantize to the highest width, then shift that integer, rounding, to a lower one.

Huang, Liu, Zhao, Xia, Ren: Nearly Lossless Adaptive Bit Switching, arXiv:2502.01199.
    Wh = clip(round(W / s), -2^(h-1), 2^(h-1) - 1),   D = h - l
    Wl = clip(round(Wh / 2^D), -2^(l-1), 2^(l-1) - 1),   value Wl s 2^D
Ties round up in both, so that training has the integers of the shift (Wh + 2^(D-1)) >> D.
    dW: where -2^(l-1) <= v <= 2^(l-1) - 1, v = W / (s 2^D);   ds: 2^D (Wl - v) there, 2^D times the bound elsewhere
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROUNDINGS = ("double", "floor", "floor_centred")


def limits(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of a width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def integers(weight: Tensor, scale: Tensor, high: int) -> Tensor:
    """Return Wh of a weight (any shape) with a 0-dim scale, int32."""
    return (weight / scale + 0.5).floor().clamp(*limits(high)).to(torch.int32)


def shifted(stored: Tensor, high: int, low: int, rounding: str = "double") -> Tensor:
    """Return Wl of the stored integers by integer arithmetic alone, int32."""
    shift = high - low
    lifted = stored + (1 << (shift - 1)) if shift and rounding == "double" else stored
    return (lifted >> shift).clamp(*limits(low))


def value(stored: Tensor, scale: Tensor, high: int, low: int, rounding: str = "double") -> Tensor:
    """Return what a width computes with: Wl s 2^D, for floor_centred (Wl + (1 - 2^-D) / 2) s 2^D, its bin's middle."""
    found = shifted(stored, high, low, rounding).to(scale.dtype)
    if rounding == "floor_centred":
        found = found + (1 - 2.0 ** (low - high)) / 2
    return found * (scale * 2 ** (high - low))


class _DoubleRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, high: int, low: int, rounding: str, grad_scale: float
    ) -> Tensor:
        found = value(integers(weight, scale, high), scale, high, low, rounding)
        ctx.save_for_backward(weight, scale, found)
        ctx.widths, ctx.grad_scale = (high, low), grad_scale
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        (grad,) = gradients
        weight, scale, found = ctx.saved_tensors
        high, low = ctx.widths
        step = 2.0 ** (high - low)
        v = weight / (scale * step)
        bottom, top = limits(low)
        inside = (v >= bottom) & (v <= top)
        level = found / (scale * step)
        d_scale = (grad * step * torch.where(inside, level - v, level)).sum() * ctx.grad_scale
        return grad * inside, d_scale.view_as(scale), None, None, None, None


def double_round(
    weight: Tensor, scale: Tensor, high: int, low: int, rounding: str = "double", grad_scale: float = 1.0
) -> Tensor:
    """Return `weight` at width `low` through width `high`, with the gradients above.

    Args:
        weight: any shape.
        scale: s of the highest width, 0-dim, above 0.
        high: stored width.
        low: width to compute with, at most `high`.
        rounding: "double", "floor" or "floor_centred".
        grad_scale: factor of the scale's gradient.
    """
    result: Tensor = _DoubleRound.apply(weight, scale, high, low, rounding, grad_scale)  # type: ignore[no-untyped-call]
    return result
