"""Bits by a proxy: the largest S within a size, exactly; and the quantizers that get them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eff_quant_emq.config import EMQConfig
from eff_quant_kit.allocation import Budget, allocate
from eff_quant_kit.layers import QuantLayer, name_quantizers, replace_module
from eff_quant_kit.observers import minmax_symmetric
from eff_quant_kit.quantizer import Quantizer

PLUGIN = "quant_emq"
FIXED = 8


def assign(
    model: nn.Module, names: Sequence[str], fixed: Sequence[str], scores: Tensor, config: EMQConfig
) -> dict[str, int]:
    """Return the bits of every layer: the most of sum_l b_l score_l within the budget, the fixed ones at 8.

    Raises:
        RequestError: the budget is below the smallest size, which is named.
    """
    numel = [model.get_submodule(name).weight.numel() for name in names]  # type: ignore[union-attr,operator]
    rest = sum(model.get_submodule(name).weight.numel() for name in fixed)  # type: ignore[union-attr,operator,misc]
    use = np.array([[count * b / 8 for b in config.bits] for count in numel], dtype=float)
    limit = config.budget * float(sum(numel) + rest) - float(rest)
    cost = -np.outer(scores.numpy(), np.array(config.bits, dtype=float))
    scale = np.abs(cost).max() or 1.0
    chosen = allocate(PLUGIN, cost / scale, [Budget("weights beside the fixed layers", use, limit, "B")]).choices
    return {
        **dict.fromkeys(fixed, FIXED),
        **{name: config.bits[index] for name, index in zip(names, chosen, strict=True)},
    }


def insert(model: nn.Module, bits: Mapping[str, int], initialise: bool = True) -> nn.Module:
    """Return `model` with its layers' weights at these bits, min-max per output channel."""
    for name, b in bits.items():
        layer: Any = model.get_submodule(name)
        quantizer = Quantizer(b, True, channels=len(layer.weight), axis=0)
        if initialise:
            with torch.no_grad():
                quantizer.set_scale(minmax_symmetric(layer.weight, quantizer.q_max, axis=0))
        replace_module(model, name, QuantLayer(layer, quantizer, None))
    name_quantizers(model)
    return model
