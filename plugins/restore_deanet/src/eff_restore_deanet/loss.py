"""The loss: mean absolute error plus contrastive regularisation (section III-E; Wu et al., CVPR 2021).

    CR = sum_i w_i |V_i(out) - V_i(clear)| / (|V_i(out) - V_i(hazy)| + 1e-7)

V_i: activations of a frozen network, five levels; |.|: mean of absolute differences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff_restore_deanet.config import DEANetConfig

if TYPE_CHECKING:
    from eff.data import Batch
    from eff.run import Loss

LEVEL_WEIGHTS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
EPSILON = 1e-7  # keeps the ratio finite where the output is the hazy input


def contrastive_regularisation(
    features: Callable[[Tensor], list[Tensor]], output: Tensor, clear: Tensor, hazy: Tensor
) -> Tensor:
    """Return CR, 0-dim: small where `output` looks like `clear` and unlike `hazy`.

    Args:
        features: gives five activations of images (N, 3, H, W).
        output: restored images, with gradient.
        clear: targets.
        hazy: inputs.
    """
    with torch.no_grad():
        positive, negative = features(_colour(clear)), features(_colour(hazy))
    total = output.new_zeros(())
    for weight, v, p, n in zip(LEVEL_WEIGHTS, features(_colour(output)), positive, negative, strict=True):
        total = total + weight * (v - p).abs().mean() / ((v - n).abs().mean() + EPSILON)
    return total


def _colour(image: Tensor) -> Tensor:
    return image.expand(-1, 3, -1, -1)


def with_contrast(inner: Loss, features: nn.Module | None, config: DEANetConfig) -> Loss:
    """Return w_l1 times the loss of the task, plus w_cr CR where there are features."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        plain, output = inner(model, batch)
        total = config.w_l1 * plain
        if features is not None:
            total = total + config.w_cr * contrastive_regularisation(features, output, batch["target"], batch["image"])
        return total, output

    return loss
