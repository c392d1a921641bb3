"""Attention over packed codes on the CPU: blocks of tokens, whose codes alone are unpacked, with a running softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.kv_quant.cache import within
from eff_kernels.kv_quant.reference import finite

BLOCK = 512
"""Tokens whose codes are unpacked at a time."""


def attend(
    query: Tensor, key_codes: Tensor, key_scale: Tensor, key_low: Tensor, value_codes: Tensor, value_scale: Tensor,
    value_low: Tensor, channel: Tensor | None, counts: Tensor | None, key_bits: int, value_bits: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the reference does; arguments as there."""
    dim = query.shape[-1]
    scaled = (query * key_scale[:, None])[..., _plane_order(dim, key_bits)]
    offset = (query * key_low[:, None]).sum(-1, keepdim=True)
    sums = torch.zeros_like(query)
    lows = torch.zeros(query.shape[:3])
    largest = torch.full(query.shape[:3], -torch.inf)
    totals = torch.zeros(query.shape[:3])
    present = None if counts is None else within(counts, key_codes.shape[2])
    for start in range(0, key_codes.shape[2], BLOCK):
        here = slice(start, start + BLOCK)
        scores = scaled @ _planes(key_codes[:, :, here], key_bits).mT + offset
        if present is not None:
            scores.masked_fill_(~present[:, None, None, here], -torch.inf)
        new = torch.maximum(largest, scores.amax(-1))
        base = new if present is None else finite(new)
        fade = (largest - base).exp_()
        weights = scores.sub_(base[..., None]).exp_()
        totals.mul_(fade).add_(weights.sum(-1))
        lows.mul_(fade).add_((weights @ value_low[:, None, here, None])[..., 0])
        weights.mul_(value_scale[:, None, None, here])
        sums.mul_(fade[..., None]).add_(weights @ _planes(value_codes[:, :, here], value_bits))
        largest = new
    out = sums[..., _plane_order(dim, value_bits).argsort()] + lows[..., None]
    return out if channel is None else out * channel[:, None], largest, totals


def _plane_order(dim: int, bits: int) -> Tensor:
    """Return the order of channels that unpacking by planes gives: no interleaving of codes is ever made."""
    return torch.arange(dim).view(-1, 8 // bits).t().flatten()


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes as floats, plane by plane: all first codes of the bytes, then all second ones, ..."""
    width, planes = packed.shape[-1], 8 // bits
    out = torch.empty(*packed.shape[:-1], planes * width)
    for place in range(planes):
        plane = packed >> (place * bits) if place else packed
        out[..., place * width : (place + 1) * width].copy_(plane & (2**bits - 1) if place < planes - 1 else plane)
    return out
