"""The rotation on the CPU: written straight into the result, in pieces of tokens that stay in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 17
"""Elements of a piece of the keys; 512 KiB in float32."""


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], interleaved: bool) -> Tensor:
    """Return the rotated keys; arguments as in the reference."""
    half, length = cos.shape[-1], keys.shape[2]
    out = torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
    many = max(1, PIECE * length // max(1, keys.numel()))
    end = 0
    for segment, count in enumerate(lengths):
        c, s = (table[:, segment, None, None] for table in (cos, sin))  # (batch or 1, 1, 1, R / 2)
        start, end = end, end + count
        for first in range(start, end, many):
            here = slice(first, min(first + many, end))
            x, target = keys[:, :, here], out[:, :, here]
            wide = target if keys.dtype == cos.dtype else torch.empty_like(target, dtype=cos.dtype)
            a, b = _pairs(x.to(cos.dtype), half, interleaved)
            one, two = _pairs(wide, half, interleaved)
            torch.mul(a, c, out=one).addcmul_(b, s, value=-1)
            torch.mul(b, c, out=two).addcmul_(a, s)
            if wide is not target:
                target.copy_(wide)
            target[..., 2 * half :] = x[..., 2 * half :]
    return out


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    turned = x[..., : 2 * half]
    return (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
