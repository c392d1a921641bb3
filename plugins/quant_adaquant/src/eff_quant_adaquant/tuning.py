"""What comes after the layers: norm tuning ("para-normalisation") and the loss of bias tuning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.run import Run
from eff_quant_adaquant.insert import range_layers
from eff_quant_adaquant.quantizer import RangeLayer
from eff_quant_kit.folding import Folded
from eff_quant_kit.layers import CONVOLUTIONS, reestimate_batch_norm, replace_module

NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}


def tune_norms(model: nn.Module, folded: Iterable[Folded], batches: Iterable[Any], run: Run) -> int:
    """Give channels the mean and spread again that they had after the batch norm which was folded; return their norms.

    A norm goes back where it was, the identity at first (running mean beta, running variance gamma^2), takes the
    statistics of the quantized network, and is folded again: into weight, bias and the weight quantizer's range and
    zero alike, so that the codes of the weights stay the same. Needs no labels and no gradient.
    """
    layers = range_layers(model)
    back: list[tuple[RangeLayer, str, nn.modules.batchnorm._BatchNorm]] = []
    for item in folded:
        layer = layers.get(item.layer)
        if layer is None or not isinstance(layer.layer, CONVOLUTIONS):
            continue
        norm = NORMS[type(layer.layer)](len(item.gamma), eps=item.eps)
        norm.running_mean.copy_(item.beta)  # type: ignore[union-attr]
        norm.running_var.copy_(item.gamma.square())  # type: ignore[union-attr]
        with torch.no_grad():
            norm.weight.copy_((item.gamma.square() + item.eps).sqrt())
            norm.bias.copy_(item.beta)
        replace_module(model, item.norm, norm.to(run.device))
        back.append((layer, item.norm, norm))
    if not back:
        return 0
    reestimate_batch_norm(model, batches, lambda batch: run.forward(model, batch))
    for layer, name, norm in back:
        _fold_again(layer, norm)
        replace_module(model, name, nn.Identity())
    return len(back)


def _fold_again(layer: RangeLayer, norm: nn.modules.batchnorm._BatchNorm) -> None:
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    weight: Tensor = layer.layer.weight  # type: ignore[assignment]
    bias: Tensor = layer.layer.bias  # type: ignore[assignment]
    with torch.no_grad():
        weight.mul_(factor.view(-1, *[1] * (weight.ndim - 1)))
        layer.weight_quantizer.range.mul_(factor)
        layer.weight_quantizer.zero.mul_(factor)
        bias.copy_((bias - norm.running_mean) * factor + norm.bias)


def distillation_loss(quantized: Tensor, float_output: Tensor, is_classifier: bool) -> Tensor:
    """Return KL(softmax of float || softmax of quantized), averaged over samples; for other tasks the squared error."""
    if not is_classifier:
        return F.mse_loss(quantized, float_output)
    return F.kl_div(quantized.log_softmax(-1), float_output.log_softmax(-1), reduction="batchmean", log_target=True)
