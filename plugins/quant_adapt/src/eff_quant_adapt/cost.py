"""The performance model of the reference code: operations weighted by bits and density. Not wall-clock time.

cost_q = density (MAdds WL + overhead),  cost_32 = 32 MAdds, by layer and step
overhead = 32 (3 T b r density + (lb + 1) T + 1) / lb / accumulated batches,  b = 2 log2(WL - 8) above 8 bits, else 1
T = kernel area times output channels
training speedup = 2 sum cost_32 / (sum cost_q + sum cost_32): the backward pass counts in float32
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.modes import eval_mode
from eff.run import Run
from eff_quant_adapt.formats import State
from eff_quant_adapt.layers import FixedPointLayer, fixed_layers


def multiply_adds(model: nn.Module, run: Run) -> dict[str, int]:
    """Return by layer the multiply-adds of one sample; 0 for a layer that the forward pass does not reach."""
    found = dict.fromkeys(fixed_layers(model), 0)

    def count(name: str, layer: FixedPointLayer, output: Tensor) -> None:
        weight: Tensor = layer.layer.weight  # type: ignore[assignment]
        places = output[0, 0].numel() if not isinstance(layer.layer, nn.Linear) else output[0].numel() // len(weight)
        found[name] += places * weight.numel()

    handles = [
        layer.register_forward_hook(lambda module, _, output, name=name: count(name, module, output))
        for name, layer in fixed_layers(model).items()
    ]
    try:
        with eval_mode(model), torch.no_grad():
            model(*(value.to(run.device) for value in run.task.example_inputs(1)))
    finally:
        for handle in handles:
            handle.remove()
    return found


class Cost:
    """Sums of the model's costs over the training."""

    def __init__(self, madds: dict[str, int]):
        self.madds = madds
        self.quantized = self.full = 0.0

    def note(self, layers: Mapping[str, FixedPointLayer], states: Mapping[str, State], accumulate: int) -> None:
        """Add one step."""
        for name, layer in layers.items():
            state, density, madds = states[name], layer.density(), self.madds[name]
            self.quantized += density * (madds * state.wl + overhead(layer, state, density, accumulate))
            self.full += 32 * madds

    def training_speedup(self) -> float:
        """Return the modelled speed-up of training so far over float32."""
        return 2 * self.full / (self.quantized + self.full) if self.full else 1.0

    def inference_speedup(self, layers: Mapping[str, FixedPointLayer]) -> float:
        """Return the modelled speed-up of the model as it is over float32; inf where all weights are 0."""
        cost = sum(layer.density() * self.madds[name] * layer.lengths[0] for name, layer in layers.items())
        return 32 * sum(self.madds.values()) / cost if cost else math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"quantized": self.quantized, "full": self.full}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.quantized, self.full = state["quantized"], state["full"]


def overhead(layer: FixedPointLayer, state: State, density: float, accumulate: int) -> float:
    """Return what switching formats costs in a step, in bit-weighted operations."""
    weight: Tensor = layer.layer.weight  # type: ignore[assignment]
    tensor = len(weight) * weight[0, 0].numel()
    bisections = 2 * math.log2(state.wl - 8) if state.wl > 8 else 1
    operations = 3 * tensor * bisections * state.bins * density + (state.lookback + 1) * tensor + 1
    return 32 * operations / state.lookback / accumulate


def size_ratio(layers: Mapping[str, FixedPointLayer]) -> float:
    """Return the bits of the weights, zeros left out, over 32 bits a weight."""
    numel = {name: layer.layer.weight.numel() for name, layer in layers.items()}  # type: ignore[operator,union-attr]
    bits = sum(layer.density() * layer.lengths[0] * numel[name] for name, layer in layers.items())  # type: ignore[operator]
    return float(bits / (32 * sum(numel.values())))  # type: ignore[arg-type]
