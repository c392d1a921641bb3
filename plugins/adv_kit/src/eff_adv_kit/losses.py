"""The losses that attacks maximise, one value per sample.

z are logits (N, K), p = softmax(z), y labels (N,), j the strongest class other than y.

    cross entropy        -log p_y                                    ce
    logit margin         z_j - z_y                                   margin   (Carlini and Wagner, 2017)
    DLR                  -(z_y - z_j) / (z_(1) - z_(3))              dlr      (Croce and Hein, ICML 2020)
    MIFPE                -log p_y of z / (z_(1) - z_(2))             mifpe    (the divisor has no gradient)
    probability margin   p_j - p_y                                   pm       (Xie et al., CVPR 2025)

with z_(1) >= z_(2) >= ... sorted. Targeted forms take a class t in the place of j (and z_(1) - (z_(3) + z_(4)) / 2
in DLR's divisor); they too are maximised: a larger value is nearer to t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,)) -> values (N,)."""
TargetedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,), targets (N,)) -> values (N,)."""

_TINY = 1e-12  # keeps DLR finite where logits are equal, as in AutoAttack


def of_class(values: Tensor, index: Tensor) -> Tensor:
    """Return the entry of each row (N, K) that `index` (N,) names."""
    return values.gather(1, index[:, None])[:, 0]


def runner_up(logits: Tensor, y: Tensor) -> Tensor:
    """Return the strongest class other than `y`, (N,). Exact for logits of any size."""
    return logits.detach().scatter(1, y[:, None], -torch.inf).argmax(1)


def logit_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return z_j - z_y: above 0 where the sample is misclassified."""
    return of_class(logits, runner_up(logits, y)) - of_class(logits, y)


def logit_margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return z_t - z_y."""
    return of_class(logits, target) - of_class(logits, y)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log p_y."""
    return F.cross_entropy(logits, y, reduction="none")


def cross_entropy_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return log p_t."""
    return -F.cross_entropy(logits, target, reduction="none")


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference-of-logits ratio; needs 3 classes."""
    top = logits.topk(3, dim=1).values
    return logit_margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted difference-of-logits ratio; needs 4 classes."""
    top = logits.topk(4, dim=1).values
    return logit_margin_targeted(logits, y, target) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + _TINY)


def mifpe(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of logits divided by the gap of the first two, which has no gradient."""
    top = logits.detach().topk(2, dim=1).values
    return cross_entropy(logits / (top[:, :1] - top[:, 1:] + _TINY), y)


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return p_j - p_y in [-1, 1].

    Its gradient in z_k is p_k ([k = j] - [k = y]) - p_k (p_j - p_y). j is taken from the logits: equal to
    the one of the probabilities, except where those underflow.
    """
    p = logits.softmax(1)
    return of_class(p, runner_up(logits, y)) - of_class(p, y)


def probability_margin_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return p_t - p_y."""
    p = logits.softmax(1)
    return of_class(p, target) - of_class(p, y)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy, "margin": logit_margin, "dlr": dlr, "mifpe": mifpe, "pm": probability_margin,
}  # fmt: skip
TARGETED_LOSSES: dict[str, TargetedLoss] = {
    "ce": cross_entropy_targeted, "margin": logit_margin_targeted, "dlr": dlr_targeted,
    "pm": probability_margin_targeted,
}  # fmt: skip
CLASSES_NEEDED = {"dlr": 3}
CLASSES_NEEDED_TARGETED = {"dlr": 4}
