"""The structure around the calibration: layers in, measured, and out again as the kit's quantized layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Batch
from eff.run import Run
from eff_quant_adaquant.quantizer import RangeLayer, quantize_bias
from eff_quant_kit.calibration import CalibrationSet, over_padding
from eff_quant_kit.layers import QuantLayer, name_quantizers, replace_module
from eff_quant_kit.quantizer import Quantizer


def range_layers(model: nn.Module) -> dict[str, RangeLayer]:
    """Return the layers under calibration by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RangeLayer)}


def measure_inputs(model: nn.Module, calibration: CalibrationSet, run: Run) -> None:
    """Set every layer's input extremes: those of each sample averaged over a batch, then over the batches.

    The inputs are those of the float network: the layers' own forward is not used.
    """
    layers = range_layers(model)
    batch: Batch = {}
    lows: dict[str, list[Tensor]] = {name: [] for name in layers}
    highs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            rows = over_padding(arguments[0].detach(), batch).flatten(1)
            lows[name].append(rows.amin(1).mean())
            highs[name].append(rows.amax(1).mean())

        return hook

    handles = [layer.layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    bare = {name: layer.layer for name, layer in layers.items()}
    for name, layer in bare.items():
        replace_module(model, name, layer)
    try:
        with torch.no_grad():
            for batch in calibration:
                run.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            replace_module(model, name, layer)
    for name, layer in layers.items():
        if lows[name]:
            layer.input_low.copy_(torch.stack(lows[name]).mean().clamp(max=0))
            layer.input_high.copy_(torch.stack(highs[name]).mean().clamp(min=0))


def finished_layers(model: nn.Module, plan: Mapping[str, tuple[int, int]]) -> nn.Module:
    """Put the kit's quantized layers at the names of `plan` ((weight bits, input bits)); values come from a checkpoint."""
    for name, (weight_bits, act_bits) in plan.items():
        layer = model.get_submodule(name)
        channels = len(layer.weight)  # type: ignore[arg-type]
        weight = Quantizer(weight_bits, signed=False, channels=channels, axis=0, with_offset=True)
        inputs = Quantizer(act_bits, signed=False, with_offset=True)
        replace_module(model, name, QuantLayer(layer, weight, inputs))
    name_quantizers(model)
    return model


def convert(model: nn.Module) -> nn.Module:
    """Replace layers under calibration by the kit's quantized layers with the same grids; biases stay on theirs."""
    for name, layer in range_layers(model).items():
        bare, bias = layer.layer, layer.layer.bias
        if bias is not None:
            with torch.no_grad():
                bias.copy_(quantize_bias(bias.detach(), layer.bias_bits))  # type: ignore[operator,arg-type]
        quantized = QuantLayer(bare, layer.weight_quantizer.as_quantizer(), layer.input_quantizer.as_quantizer())
        replace_module(model, name, quantized)
    name_quantizers(model)
    return model.requires_grad_(False)
