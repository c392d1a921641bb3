"""Layers in fixed point: their inputs and outputs take the layer's format; the format is part of the state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant_adapt.config import AdaPTConfig
from eff_quant_adapt.formats import codes_of, quantize
from eff_quant_kit.layers import check_layers, find_layers, replace_module
from eff_quant_kit.packed import Packed, packed_fixed

PLUGIN = "quant_adapt"


class FixedPointLayer(nn.Module):
    """A convolution or linear layer; `layer.weight` lies on the grid of `format`, (WL, FL)."""

    def __init__(self, layer: nn.Module, config: AdaPTConfig):
        super().__init__()
        self.layer = layer
        self.inputs, self.outputs = config.quant_inputs, config.quant_outputs
        self.format: Tensor
        self.register_buffer("format", torch.tensor([config.wl_init, config.fl_init]))

    @property
    def lengths(self) -> tuple[int, int]:
        """Word and fraction length."""
        wl, fl = self.format.tolist()
        return int(wl), int(fl)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; rounding is stochastic while training and to nearest afterwards."""
        if self.inputs:
            x = self._straight_through(x)
        y: Tensor = self.layer(x)
        return self._straight_through(y) if self.outputs else y

    def _straight_through(self, x: Tensor) -> Tensor:
        quantized = quantize(x.detach(), *self.lengths, stochastic=self.training)
        return x + (quantized - x.detach())

    def density(self) -> float:
        """Return the share of weights that are not 0."""
        return float((self.layer.weight != 0).double().mean())  # type: ignore[union-attr]

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the weight: WL bits a code, zeros left out where that is shorter."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator,assignment]
        wl, fl = self.lengths
        return {f"{prefix}layer.weight": packed_fixed(codes_of(weight, wl, fl), wl, -fl, weight.dtype)}

    def extra_repr(self) -> str:
        """Return the format for printing."""
        return "WL={}, FL={}".format(*self.lengths)


def insert(model: nn.Module, config: AdaPTConfig) -> nn.Module:
    """Return `model` with its convolutions and linear layers in fixed point.

    Raises:
        UnsupportedModelError: it has none.
    """
    found = find_layers(model)
    check_layers(PLUGIN, model, found, ())
    for name, layer in found.items():
        replace_module(model, name, FixedPointLayer(layer, config))
    return model


def fixed_layers(model: nn.Module) -> dict[str, FixedPointLayer]:
    """Return the fixed-point layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FixedPointLayer)}


def owners(model: nn.Module) -> dict[str, str]:
    """Return by name of each parameter the layer whose format it takes: the one whose weight comes last before it.

    A weight that a layer shares, e.g. with an embedding, has the other's name and the layer's format.
    """
    layers = fixed_layers(model)
    by_weight = {layer.layer.weight: name for name, layer in layers.items()}
    found, current = {}, next(iter(layers))
    for name, parameter in model.named_parameters():
        current = by_weight.get(parameter, current)
        found[name] = current
    return found


def initialise(model: nn.Module, gain: float) -> None:
    """Draw weights from a normal of variance gain / fan_in cut at sqrt(3 gain / fan_in), biases from +-gain."""
    for item in fixed_layers(model).values():
        layer: Any = item.layer
        deviation = math.sqrt(gain / layer.weight[0].numel())
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-math.sqrt(3) * deviation, b=math.sqrt(3) * deviation)
        if layer.bias is not None:
            nn.init.uniform_(layer.bias, -gain, gain)
