"""Mixing nested weights in closed form (TangleNAS: Sukthanker et al., AutoML 2024).

Every candidate is a slice of one weight W. The sum over all candidates, each padded with zeros,

    W_mix = sum_j a_j Pad(S_j(W))

separates where the candidates are nested and the coefficients a product over dimensions:

    W_mix = W * m_o (x) m_i (x) m_k,    m_o[r] = sum of a_j over the widths above r

so it costs one pass over W however many candidates there are. A mask is `table @ a`, with a 0/1 table
(positions, candidates) that says which candidate keeps which position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_nas_kit.space import Axis


def axis_table(axis: Axis, values: Sequence[int], size: int) -> Tensor:
    """Return which candidate keeps which position of a dimension, (size, candidates) of 0 and 1.

    Raises:
        ValueError: the dimension cannot be divided into channels, or a candidate is larger than it.
    """
    channels, rest = divmod(size, axis.repeat * axis.blocks)
    if rest:
        raise ValueError(f"{size} positions are no multiple of {axis.repeat * axis.blocks}")
    if max(values) > channels:
        raise ValueError(f"candidate {max(values)} is larger than the layer, which has {channels}")
    channel = (torch.arange(size) // axis.repeat) % channels
    return (channel[:, None] < torch.tensor(values)[None, :]).float()


def kernel_table(values: Sequence[int], size: int) -> Tensor:
    """Return which kernel size keeps which tap, (size * size, candidates): the k x k taps in the centre.

    Raises:
        ValueError: a candidate is larger than the kernel.
    """
    if max(values) > size:
        raise ValueError(f"kernel {max(values)} is larger than the layer's, which is {size}")
    distance = (torch.arange(size) - size // 2).abs()
    ring = torch.maximum(distance[:, None], distance[None, :]).flatten()
    return (ring[:, None] <= torch.tensor([value // 2 for value in values])[None, :]).float()


class _MaskMix(torch.autograd.Function):
    """W * m_o (x) m_i (x) m_k for W (O, I, K); keeps W and the three vectors for the backward, nothing of W's size."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, out: Tensor, inp: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(weight, out, inp, kernel)
        return weight * ((out[:, None] * inp)[:, :, None] * kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # type: ignore[override]
        weight, out, inp, kernel = ctx.saved_tensors
        plane = out[:, None] * inp
        per_entry = gradient * weight
        over_kernel = per_entry @ kernel
        return (
            gradient * (plane[:, :, None] * kernel),
            over_kernel @ inp,
            out @ over_kernel,
            plane.flatten() @ per_entry.flatten(0, 1),
        )


def mix(weight: Tensor, out: Tensor | None, inp: Tensor | None, kernel: Tensor | None) -> Tensor:
    """Return the mixed weight in closed form, with gradients for weight and masks.

    Args:
        weight: (O, I) or (O, I, K, K).
        out: mask of the first dimension, (O,); None: nothing is chosen there.
        inp: mask of the second, (I,) or None.
        kernel: mask of the taps, (K * K,) or None.
    """
    if out is None and inp is None and kernel is None:
        return weight
    flat = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    masks = (
        weight.new_ones(size) if mask is None else mask.to(weight.dtype)
        for mask, size in zip((out, inp, kernel), flat.shape, strict=True)
    )
    mixed: Tensor = _MaskMix.apply(flat, *masks)
    return mixed.view_as(weight)


def mix_by_sum(weight: Tensor, factors: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Return what `mix` means: the sum over all candidates in the order of itertools.product.

    Args:
        weight: (O, I) or (O, I, K, K).
        factors: for output, input and taps: (table (positions, candidates), coefficients), or None.
    """
    flat = weight.flatten(2) if weight.ndim > 2 else weight[:, :, None]
    tables = [
        (flat.new_ones(size, 1), flat.new_ones(1)) if factor is None else factor
        for factor, size in zip(factors, flat.shape, strict=True)
    ]
    mixed = torch.zeros_like(flat)
    for o, i, k in itertools.product(*(range(len(coefficients)) for _, coefficients in tables)):
        keep = torch.einsum("o,i,k->oik", tables[0][0][:, o], tables[1][0][:, i], tables[2][0][:, k])
        mixed = mixed + tables[0][1][o] * tables[1][1][i] * tables[2][1][k] * (flat * keep)
    return mixed.view_as(weight)
