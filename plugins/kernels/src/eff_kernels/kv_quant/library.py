"""Attention over a packed part as a torch operator: eff::kv_attend."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.dispatch import Op

OP = Op("kv_quant", dtypes=(torch.float32,))


@torch.library.custom_op("eff::kv_attend", mutates_args=())
def attend_op(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor | None, counts: Tensor | None, key_bits: int, value_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of weighted values, largest score, sum of weights."""
    sums, largest, totals = OP.implementation(query).attend(
        query, key_codes, key_scale, key_low, value_codes, value_scale, value_low, channel, counts, key_bits, value_bits
    )
    return sums, largest, totals


@attend_op.register_fake
def _(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor | None, counts: Tensor | None, key_bits: int, value_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), query.new_empty(query.shape[:3]), query.new_empty(query.shape[:3])
