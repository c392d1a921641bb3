"""What the rotation means, in plain torch; every kernel must agree with it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(keys: Tensor, cos: Tensor, sin: Tensor, lengths: list[int], interleaved: bool) -> Tensor:
    """Return the rotated keys.

    Args:
        keys: (batch, heads, length, dim).
        cos, sin: (batch or 1, segments, R / 2), float32 (float64 for float64 keys).
        lengths: tokens of each segment, in order.
        interleaved: how channels are paired.
    """
    half = cos.shape[-1]
    segment = segment_of(lengths, keys.device)
    c, s = (table[:, segment].unsqueeze(1) for table in (cos, sin))  # (batch or 1, 1, length, R / 2)
    turned, rest = keys[..., : 2 * half].to(cos.dtype), keys[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    one, two = a * c - b * s, a * s + b * c
    pairs = torch.stack((one, two), -1).flatten(-2) if interleaved else torch.cat((one, two), -1)
    return torch.cat((pairs.to(keys.dtype), rest), -1).contiguous()


def segment_of(lengths: list[int], device: torch.device) -> Tensor:
    """Return the segment of each token, (length,) int64."""
    counts = torch.tensor(lengths, device=device)
    return torch.repeat_interleave(torch.arange(len(lengths), device=device), counts, output_size=sum(lengths))
