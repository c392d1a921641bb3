"""What attention over one part means, in plain torch: dequantize, then attend."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.kv_quant.cache import unpack, within


def attend(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor | None, counts: Tensor | None, key_bits: int, value_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return sum of weighted values (batch, heads, queries, dim), largest score and sum of weights (batch, heads, queries).

    Args:
        query: (batch, heads, queries, dim) float32, scaled.
        key_codes, value_codes: (batch, heads, n, dim * bits / 8) uint8.
        key_scale, key_low: (heads, dim).
        value_scale, value_low: (batch, n).
        channel: factor of the values, (heads, dim); None: 1.
        counts: the first tokens of each sequence that exist, (batch,) int32; None: all n.
        key_bits, value_bits: of the codes.
    """
    keys = unpack(key_codes, key_bits).float() * key_scale[:, None] + key_low[:, None]
    values = unpack(value_codes, value_bits).float() * value_scale[:, None, :, None] + value_low[:, None, :, None]
    if channel is not None:
        values = values * channel[:, None]
    present = None if counts is None else within(counts, keys.shape[2])[:, None, None]
    return attend_float(query, keys, values, present)


def attend_float(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for keys and values in float32; `visible`: bool, broadcast to (batch, heads, queries, n)."""
    scores = query @ keys.mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(-1)
    weights = (scores - finite(largest)[..., None]).exp()
    return weights @ values, largest, weights.sum(-1)


def finite(largest: Tensor) -> Tensor:
    """Return the largest scores to subtract: 0 where there is no token at all."""
    return largest.masked_fill(largest == -torch.inf, 0.0)
