"""The finished layers: the kit's, with the levels that were learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant_gradptq.grid import unwarp, warp
from eff_quant_gradptq.rounding import RoundingLayer
from eff_quant_kit.layers import QuantLayer, name_quantizers, replace_module
from eff_quant_kit.quantizer import Quantizer


class PowerQuantizer(Quantizer):
    """A quantizer with the levels s sign(k) |k|^(1/a); `table` holds them for s = 1."""

    def __init__(self, bits: int, power: float, channels: int):
        super().__init__(bits, signed=True, channels=channels, axis=0, narrow_range=True)
        self.power = power

    @property
    def table(self) -> Tensor:
        """Values of the levels q_min to q_max."""
        return unwarp(torch.arange(self.q_min, self.q_max + 1, dtype=torch.float32), self.power)

    def levels(self, x: Tensor) -> Tensor:
        """Return the integer levels of `x`, as int32."""
        u = x.detach().float() / self._spread(self.scale.detach(), x)  # type: ignore[operator]
        return warp(u, self.power).clamp(self.q_min, self.q_max).round().to(torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on the grid; no gradient (the weights are decided)."""
        scale = self._spread(self.scale.detach(), x)
        return (self.table.to(x.device)[(self.levels(x) - self.q_min).long()] * scale).to(x.dtype)


def weight_quantizer(channels: int, record: Mapping[str, Any]) -> Quantizer:
    """Return the empty quantizer that a layer's record describes."""
    bits = record["bits"]
    widest = max(bits) if isinstance(bits, list) else bits
    if record["power"] != 1.0:
        made: Quantizer = PowerQuantizer(widest, record["power"], channels)
    else:
        signed = record["symmetric"]
        made = Quantizer(widest, signed=signed, channels=channels, axis=0, with_offset=not signed)
    if isinstance(bits, list):
        made.channel_bits = tuple(bits)
    return made


def finished_layers(model: nn.Module, records: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Put the kit's quantized layers at the names of `records`; values come from a checkpoint."""
    for name, record in records.items():
        layer = model.get_submodule(name)
        inputs = None if record["act_bits"] is None else Quantizer(record["act_bits"], signed=record["act_signed"])
        replace_module(model, name, QuantLayer(layer, weight_quantizer(len(layer.weight), record), inputs))  # type: ignore[arg-type]
    name_quantizers(model)
    return model


def convert(model: nn.Module) -> dict[str, Any]:
    """Replace layers with learned rounding by finished ones in place; returns the records that rebuild them."""
    records: dict[str, Any] = {}
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, RoundingLayer)]:
        bits = layer.bits.tolist()
        inputs = layer.input_quantizer
        records[name] = record = {
            "bits": bits[0] if len(set(bits)) == 1 else bits,
            "power": layer.power,
            "symmetric": layer.config.symmetric,
            "act_bits": None if inputs is None else inputs.bits,
            "act_signed": None if inputs is None else inputs.signed,
        }
        scale = (layer.scale * layer.log_scale.exp()).detach()
        quantizer = weight_quantizer(len(scale), record)
        with torch.no_grad():
            layer.layer.weight.copy_(layer.weight)  # type: ignore[operator,union-attr]
        quantizer.set_scale(unwarp(scale, layer.power), None if layer.config.symmetric else -layer.zero * scale)
        replace_module(model, name, QuantLayer(layer.layer, quantizer.to(scale.device), inputs))
    name_quantizers(model)
    model.requires_grad_(False)
    return records
