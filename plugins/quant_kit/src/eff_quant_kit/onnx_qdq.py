"""ONNX with QuantizeLinear and DequantizeLinear: integer weights in the file, 8-bit containers.

Fewer than 8 bits are stored in int8/uint8: the input is clipped to the range before QuantizeLinear,
so the values are those of the narrower integer. An offset that is a whole number of scales becomes the zero point; any
other (LSQ+) is subtracted before and added after.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.exporting import onnx_agreement, onnx_export
from eff.run import Run
from eff_quant_kit.layers import QuantLayer, QuantMatMul, quant_layers, replace_module
from eff_quant_kit.quantizer import Quantizer

_OPSET = 19


def _container(signed: bool) -> torch.dtype:
    return torch.int8 if signed else torch.uint8


def _zero_point(quantizer: Quantizer) -> tuple[Tensor, Tensor | None]:
    """Return zero point (integers, float32, like the scale) and the offset where that cannot be one."""
    scale = quantizer.scale.detach().float()
    if quantizer.offset is None:
        return torch.zeros_like(scale), None
    offset = quantizer.offset.detach().float()
    zero = (-offset / scale).round()
    whole = bool(((-offset / scale) - zero).abs().max() < 1e-3)
    inside = bool((zero >= quantizer.q_min).all() and (zero <= quantizer.q_max).all())
    return (zero, None) if whole and inside else (torch.zeros_like(scale), offset.clone())


class OnnxQuantizer(nn.Module):
    """An activation quantizer as ONNX operators."""

    def __init__(self, quantizer: Quantizer):
        super().__init__()
        if quantizer.bits > 8:
            raise ValueError(f"{quantizer.name}: ONNX export holds up to 8 bits, got {quantizer.bits}")
        self.q_min, self.q_max = quantizer.q_min, quantizer.q_max
        self.dtype = _container(quantizer.signed)
        self.register_buffer("scale", quantizer.scale.detach().float().clone())
        zero, offset = _zero_point(quantizer)
        self.register_buffer("zero", zero.to(self.dtype))
        self.register_buffer("offset", offset)
        scale = float(quantizer.scale.detach())
        self.low, self.high = (self.q_min - float(zero)) * scale, (self.q_max - float(zero)) * scale
        self.full = quantizer.bits == 8 and not quantizer.narrow_range

    def forward(self, x: Tensor) -> Tensor:
        """Return QuantizeLinear then DequantizeLinear of `x`."""
        if self.offset is not None:
            x = x - self.offset
        if not self.full:
            x = x.clamp(self.low, self.high)
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, self.scale, self.zero), dtype=self.dtype, shape=x.shape, version=_OPSET
        )
        value = torch.onnx.ops.symbolic(
            "DequantizeLinear", (codes, self.scale, self.zero), dtype=torch.float32, shape=x.shape, version=_OPSET
        )
        return value if self.offset is None else value + self.offset


class OnnxLayer(nn.Module):
    """A quantized layer with its weight as an integer initializer behind DequantizeLinear."""

    def __init__(self, source: QuantLayer):
        super().__init__()
        self.layer = source.layer
        self.input_quantizer = None if source.input_quantizer is None else OnnxQuantizer(source.input_quantizer)
        quantizer = source.weight_quantizer
        self.axis = None
        self.register_buffer("codes", None)
        if quantizer is not None:
            dtype = _container(quantizer.signed)
            self.axis = quantizer.axis
            self.register_buffer("codes", quantizer.levels(source.layer.weight).to(dtype))  # type: ignore[arg-type]
            self.register_buffer("scale", quantizer.scale.detach().float().clone())
            zero, offset = _zero_point(quantizer)
            if offset is not None:
                raise ValueError(f"{quantizer.name}: its offset is no whole number of steps; ONNX has no such weights")
            self.register_buffer("zero", zero.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.layer.weight
        if self.codes is not None:
            attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
            weight = torch.onnx.ops.symbolic(
                "DequantizeLinear", (self.codes, self.scale, self.zero), attributes,
                dtype=torch.float32, shape=self.codes.shape, version=_OPSET,
            )  # fmt: skip
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        output: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)  # type: ignore[operator]
        return output


def to_onnx_modules(model: nn.Module) -> nn.Module:
    """Return a copy of `model` whose quantizers are ONNX operators."""
    exported = copy.deepcopy(model).float().eval()
    for name, layer in quant_layers(exported).items():
        replace_module(exported, name, OnnxLayer(layer))
    for module in list(exported.modules()):
        if isinstance(module, QuantMatMul):
            for side in ("left_quantizer", "right_quantizer"):
                quantizer = getattr(module, side)
                setattr(module, side, None if quantizer is None else OnnxQuantizer(quantizer))
    return exported


def write_onnx(model: nn.Module, path: Path, run: Run) -> dict[str, Any]:
    """Write the file, run it in onnxruntime where that is installed, and return the agreement."""
    onnx_export(to_onnx_modules(model), path, run, optimize=False)
    return onnx_agreement(model, path, run)
