"""What accumulate_ and sparsify mean, in plain torch; every kernel must agree with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def accumulate_(gradient: Tensor, u: Tensor, v: Tensor, momentum: float, nesterov: bool) -> None:
    """Add a gradient to momentum and residual, in place."""
    check_finite(gradient)
    if nesterov:
        u.add_(gradient).mul_(momentum)
        v.add_(u).add_(gradient)
    else:
        u.mul_(momentum).add_(gradient)
        v.add_(u)


def sparsify(
    v: Tensor, keep: int, stride: int, start: int, share: float, upper: float, lower: float, max_iterations: int,
    resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return values and indices."""
    flat = v.flatten()

    def passing(threshold: Tensor) -> Tensor:
        return (flat.abs() >= threshold).nonzero().flatten()

    check_nan(flat.isnan().any())
    return choose(flat, passing, keep, stride, start, share, upper, lower, max_iterations, resample)


def check_finite(gradient: Tensor) -> None:
    """Raise ValueError where the gradient holds NaN or infinity, which momentum and residual would never lose again."""
    if gradient.numel() and not bool(torch.stack(gradient.aminmax()).isfinite().all()):
        raise ValueError(
            "dgc_step_: gradient holds NaN or infinity, expected finite numbers; nothing was changed, leave this step out"
        )


def check_nan(found: Tensor) -> None:
    """Raise ValueError where NaN was found: it would never be sent, and nothing would pass a threshold of NaN."""
    if bool(found):
        raise ValueError("sparsify: v holds NaN, expected numbers; look at the gradients")


def choose(
    flat: Tensor, passing: Callable[[Tensor], Tensor], keep: int, stride: int, start: int, share: float, upper: float,
    lower: float, max_iterations: int, resample: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose with `passing`, which returns the ascending indices of entries at least as large as a threshold.

    Args:
        flat: (n,).
        passing: the pass over all entries.
        keep, stride, start, share: the plan.
        upper, lower, max_iterations, resample: the adaptation.
    """
    if stride == 1:
        indices = largest(flat, keep)
        return flat[indices], indices
    sample = flat[start::stride].abs()
    threshold = sample.topk(math.ceil(len(sample) * share), sorted=False).values.amin()
    indices = passing(threshold)
    for _ in range(max_iterations):
        if len(indices) > upper * keep:
            if resample:
                indices = indices[largest(flat[indices], keep)]
                break
            threshold = threshold * upper
        elif len(indices) < lower * keep:
            threshold = threshold * lower
        else:
            break
        indices = passing(threshold)
    indices = indices[:keep]
    return flat[indices], indices


def largest(flat: Tensor, keep: int) -> Tensor:
    """Return the indices of the `keep` entries of largest magnitude."""
    return flat.abs().topk(min(keep, len(flat)), sorted=False).indices
