"""Freezing the base model, and counting what is left to train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from eff.schemas import Metric

TrainBias = Literal["none", "targets", "all"]


def freeze(model: nn.Module, trained: Iterable[str], bias: TrainBias, targets: Iterable[str]) -> list[str]:
    """Freeze every parameter except whole modules and biases that are to be trained.

    Args:
        model: the base model, before adapters are put in.
        trained: names of modules that are trained whole, such as the head.
        bias: which biases are trained: none, those of the target layers, or all.
        targets: names of the target layers.

    Returns:
        The names of the parameters that stay trainable, in module order.
    """
    whole = tuple(trained)
    adapted = set(targets)
    kept = []
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        owner = owner.removesuffix(".layer")  # of a quantized layer
        is_bias = last == "bias" and (bias == "all" or (bias == "targets" and owner in adapted))
        in_whole = any(name == item or name.startswith(f"{item}.") for item in whole)
        parameter.requires_grad_((is_bias or in_whole) and parameter.is_floating_point())
        if parameter.requires_grad:
            kept.append(name)
    return kept


def parameter_metrics(trainable: int, total: int) -> dict[str, Metric]:
    """Return the count of trained parameters and their share of the base model's."""
    return {
        "trainable_parameters": Metric(value=trainable, better="lower"),
        "trainable_share": Metric(value=100.0 * trainable / max(1, total), unit="%", better="lower"),
    }
