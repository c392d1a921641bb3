"""What attention over one part means, in plain torch: dequantize, then attend."""

from __future__ import annotations

from torch import Tensor

from eff_kernels.kv_quant.cache import unpack


def attend(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor, bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return sum of weighted values (batch, heads, queries, dim), largest score and sum of weights (batch, heads, queries).

    Args:
        query: (batch, heads, queries, dim) float32, scaled.
        key_codes, value_codes: (batch, heads, n, dim * bits / 8) uint8.
        key_scale, key_low: (heads, dim).
        value_scale, value_low: (batch, n).
        channel: (heads, dim).
        bits: of the codes.
    """
    keys = unpack(key_codes, bits).float() * key_scale[:, None] + key_low[:, None]
    values = unpack(value_codes, bits).float() * value_scale[:, None, :, None] + value_low[:, None, :, None]
    scores = query @ keys.mT
    largest = scores.amax(-1)
    weights = (scores - largest[..., None]).exp()
    return weights @ (values * channel[:, None]), largest, weights.sum(-1)
