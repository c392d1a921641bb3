"""The projection of AdamP and SGDP (Heo et al., ICLR 2021, arXiv:2006.08217).

A weight w that is followed by normalisation is scale invariant, so its gradient g is orthogonal to it. For a
weight with more than one dimension, first with one row per output channel, then with the whole tensor as one row:

    detected    max over rows of |cos(w, g)| < delta / sqrt(row length)
    projected   u - n <n, u>,  n = w / (|w| + eps), per row

The test looks at the gradient, the projection acts on the update u. Where neither view passes, u stays.

Many tensors are handled at once: sums over rows are taken per tensor, everything after that on all rows of
all tensors together, without a decision on the host, so that an accelerator is never waited for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of several tensors stand when they are put behind each other (L tensors, R rows)."""

    counts: tuple[int, ...]
    """Rows of each tensor."""
    sizes: Tensor
    """The same as a tensor (L,), int64."""
    owner: Tensor
    """Tensor that each row belongs to, (R,) int64."""
    row_scale: Tensor
    """1 / sqrt(row length) of each tensor, (L,)."""
    layer_scale: Tensor
    """1 / sqrt(number of elements) of each tensor, (L,)."""


class Detection(NamedTuple):
    """Which of L weights are scale invariant, and what the projection needs of them."""

    channel: Tensor
    """(L,) bool: each output channel by itself."""
    layer: Tensor
    """(L,) bool: only the tensor as a whole."""
    row_norms: Tensor
    """Norm of each row, (R,)."""
    layer_norms: Tensor
    """Norm of each weight, (L,)."""
    rows: Rows


def detect(weights: Sequence[Tensor], gradients: Sequence[Tensor], delta: float, eps: float) -> Detection:
    """Test which weights the loss does not depend on the scale of.

    Args:
        weights: tensors with two or more dimensions, float32 or float64, none empty; rows are dimension 0.
        gradients: like `weights`.
        delta: numerator of the threshold, > 0.
        eps: smallest norm in the cosine.
    """
    rows = _rows([tuple(weight.shape) for weight in weights], weights[0])
    products = _row_sums(torch._foreach_mul(list(gradients), list(weights)))
    weight_norms, gradient_norms = _row_norms(weights), _row_norms(gradients)
    cosine = products.abs() / (weight_norms.clamp_min(eps) * gradient_norms.clamp_min(eps))
    largest = _per_tensor(cosine, rows, "max")
    totals = _per_tensor(torch.stack((products, weight_norms.square(), gradient_norms.square()), 1), rows, "sum")
    layer_norms = totals[:, 1].sqrt()
    layer_cosine = totals[:, 0].abs() / (layer_norms.clamp_min(eps) * totals[:, 2].sqrt().clamp_min(eps))
    channel = largest < delta * rows.row_scale
    layer = ~channel & (layer_cosine < delta * rows.layer_scale)
    return Detection(channel, layer, weight_norms, layer_norms, rows)


def remove_radial_(updates: Sequence[Tensor], weights: Sequence[Tensor], found: Detection, eps: float) -> None:
    """Take from each update, in place, its component along the weight where that is scale invariant."""
    rows = found.rows
    if (
        updates[0].device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not (found.channel | found.layer).any()
    ):
        return  # a CPU is asked at no cost
    products = _row_sums(torch._foreach_mul(list(updates), list(weights)))
    by_channel = products / (found.row_norms + eps).square()
    by_layer = _per_tensor(products, rows, "sum") / (found.layer_norms + eps).square()
    nothing = torch.zeros_like(by_layer)
    factor = torch.where(found.channel[rows.owner], by_channel, torch.where(found.layer, by_layer, nothing)[rows.owner])
    for update, weight, part in zip(updates, weights, factor.split(rows.counts), strict=True):
        update.addcmul_(weight, part.view(-1, *[1] * (weight.ndim - 1)), value=-1)


def project_and_decay_(
    updates: list[Tensor],
    params: list[Tensor],
    grads: list[Tensor],
    decay: float | Tensor,
    delta: float,
    wd_ratio: float,
    eps: float,
) -> None:
    """Project the updates by the weights as they are, then shrink the weights by `decay`, in place."""
    matrices = [index for index, parameter in enumerate(params) if parameter.ndim > 1]
    decays = isinstance(decay, Tensor) or decay > 0
    if matrices:
        weights, chosen = [params[index] for index in matrices], [updates[index] for index in matrices]
        found = detect(weights, [grads[index] for index in matrices], delta, eps)
        remove_radial_(chosen, weights, found, eps)
        if decays:
            share = 1 - (1 - wd_ratio) * (found.channel | found.layer).to(weights[0].dtype)
            torch._foreach_mul_(weights, list((1 - decay * share).unbind()))
    others = [parameter for parameter in params if parameter.ndim <= 1]
    if others and decays:
        torch._foreach_mul_(others, 1 - decay)


def subtract_(params: list[Tensor], updates: list[Tensor], sizes: list[Any]) -> None:
    """Take from each parameter its update times its step size; updates stay, they may be the momentum."""
    if isinstance(sizes[0], Tensor) or len(set(sizes)) > 1:
        torch._foreach_sub_(params, torch._foreach_mul(updates, sizes))
    else:
        torch._foreach_add_(params, updates, alpha=-sizes[0])


def _row_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of each row; over dimensions instead of a view, which memory formats may not allow."""
    return torch.cat([tensor.sum(dim=tuple(range(1, tensor.ndim))) for tensor in tensors])


def _row_norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim))) for tensor in tensors])


def _per_tensor(values: Tensor, rows: Rows, how: str) -> Tensor:
    """Reduce over the rows of each tensor: (R, ...) to (L, ...)."""
    if torch.compiler.is_compiling():  # which fuses these, but has no segment_reduce
        parts = values.split(rows.counts)
        return torch.stack([part.amax(0) if how == "max" else part.sum(0) for part in parts])
    return torch.segment_reduce(values, how, lengths=rows.sizes)


def _rows(shapes: Sequence[tuple[int, ...]], like: Tensor) -> Rows:
    if torch.compiler.is_compiling():
        return _make_rows(tuple(shapes), like.device, like.dtype)
    return _kept_rows(tuple(shapes), like.device, like.dtype)


def _make_rows(shapes: tuple[tuple[int, ...], ...], device: torch.device, dtype: torch.dtype) -> Rows:
    counts = tuple(shape[0] for shape in shapes)
    owner = [index for index, count in enumerate(counts) for _ in range(count)]
    return Rows(
        counts,
        torch.tensor(counts, device=device),
        torch.tensor(owner, device=device),
        torch.tensor([1 / math.sqrt(math.prod(shape[1:])) for shape in shapes], device=device, dtype=dtype),
        torch.tensor([1 / math.sqrt(math.prod(shape)) for shape in shapes], device=device, dtype=dtype),
    )


_kept_rows = functools.lru_cache(maxsize=64)(_make_rows)  # the same for every step of a training
