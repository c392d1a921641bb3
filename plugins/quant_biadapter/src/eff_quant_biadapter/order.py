"""Which linear layers a model runs, in order: the last one is its head."""

from __future__ import annotations

from torch import nn

from eff.run import Run
from eff_quant_kit.layers import QuantLayer, execution_order


def linear_order(model: nn.Module, run: Run) -> list[str]:
    """Return the linear layers (quantized ones too) in the order in which the forward pass first calls them."""
    inside = {id(module.layer) for module in model.modules() if isinstance(module, QuantLayer)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, QuantLayer)) and id(module) not in inside
    }
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(1))
    return execution_order(model, layers, lambda: model(*inputs))
