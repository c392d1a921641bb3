"""Quantized layers run by eff-kernels: what a quantized model costs without onnxruntime.

    both sides in at most 8 bits:  y = s_x s_w sum_k (q_x - z_x)(q_w - z_w) + bias      scaled_int_matmul, exact sums
    weights alone (linear layers): y = x @ (s_w (q_w - z_w))^T + bias                   weight_only_matmul

Convolutions gather their windows (im2col) in 8 bits. Input codes are kept as int8; what moves them there, and the input's
offset, is a constant per output channel and part of the bias.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import EffError
from eff.measure import time_forward
from eff.run import Run
from eff.schemas import Metric, Metrics, TableRow
from eff.tasks import NoTask
from eff_kernels.int_matmul import longest_sum, scaled_int_matmul
from eff_kernels.packing import ROW_BITS
from eff_kernels.weight_only_matmul import pack_rows, weight_only_matmul
from eff_quant_kit.layers import QuantLayer, quant_layers, replace_module
from eff_quant_kit.quantizer import Quantizer

SECONDS = 0.1
"""How long a latency is measured."""


@dataclass(frozen=True)
class Executed:
    """A copy of a model for `eff-kernels`."""

    model: nn.Module
    ran: tuple[str, ...]
    """Layers that run on integers or packed weights."""
    left: dict[str, str]
    """Quantized layers that still compute in float, with the reason."""


class IntegerLayer(nn.Module):
    """A linear layer or a convolution on 8-bit integers."""

    def __init__(self, source: QuantLayer):
        super().__init__()
        layer, inputs, weights = source.layer, source.input_quantizer, source.weight_quantizer
        assert inputs is not None and weights is not None
        levels, zero = _weight_levels(source)
        codes = (levels - zero).flatten(1) if isinstance(layer, nn.Linear) else (levels - zero).permute(0, 2, 3, 1)
        self.layer = layer
        self.low, self.high = inputs.q_min, inputs.q_max
        self.shift = 0 if inputs.signed else 2 ** (inputs.bits - 1)
        self.codes: Tensor
        self.step: Tensor
        self.offset: Tensor | None
        self.register_buffer("codes", codes.flatten(1).to(torch.int8).contiguous())
        self.register_buffer("step", inputs.scale.detach().float().clone())
        self.register_buffer("offset", None if inputs.offset is None else inputs.offset.detach().float().clone())
        moved = self.shift * self.step + (0 if self.offset is None else self.offset)
        scale = (self.step * weights.scale.detach().float()).expand(len(codes)).contiguous()
        sums = (codes.flatten(1).sum(1).double() * weights.scale.detach().double()).float()
        bias = moved * sums
        if layer.bias is not None:
            bias = bias + layer.bias.detach().float()  # type: ignore[operator]
        self.scale: Tensor
        self.bias: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias.expand(len(codes)).contiguous())
        self.padding = int(_padding_level(inputs)) - self.shift if isinstance(layer, nn.Conv2d) else 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, float32."""
        u = x.float() if self.offset is None else x.float() - self.offset
        codes = (u / self.step).clamp_(self.low, self.high).round_().sub_(self.shift).to(torch.int8)
        if isinstance(self.layer, nn.Linear):
            return scaled_int_matmul(codes, self.codes, self.scale, self.bias)
        windows = self._windows(codes)
        return scaled_int_matmul(windows, self.codes, self.scale, self.bias).permute(0, 3, 1, 2)

    def _windows(self, codes: Tensor) -> Tensor:
        """Return the inputs of each output pixel, (B, OH, OW, kh kw C)."""
        layer = self.layer
        assert isinstance(layer, nn.Conv2d)
        (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
        rows, columns = (int(side) for side in layer.padding)
        last = codes.permute(0, 2, 3, 1).contiguous()
        if rows or columns:
            last = F.pad(last, (0, 0, columns, columns, rows, rows), value=self.padding)
        if kh == kw == 1:
            return last[:, ::sh, ::sw]
        return last.unfold(1, kh, sh).unfold(2, kw, sw).permute(0, 1, 2, 4, 5, 3).flatten(3)

    def extra_repr(self) -> str:
        """Return the product's size for printing."""
        return f"out={len(self.codes)}, sums of {self.codes.shape[1]}"


class PackedLinear(nn.Module):
    """A linear layer whose weights stay packed."""

    def __init__(self, source: QuantLayer):
        super().__init__()
        quantizer = source.weight_quantizer
        assert quantizer is not None
        levels, zero = _weight_levels(source)
        self.bits = quantizer.bits
        lift = -quantizer.q_min  # codes are unsigned
        n = len(levels)
        self.packed: Tensor
        self.scale: Tensor
        self.zero: Tensor
        self.register_buffer("packed", pack_rows(levels + lift, self.bits))
        self.register_buffer("scale", quantizer.scale.detach().float().reshape(-1, 1).expand(n, 1).contiguous())
        self.register_buffer("zero", (zero.float() + lift).reshape(-1, 1).expand(n, 1).contiguous())
        self.bias = source.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of x."""
        y = weight_only_matmul(x, self.packed, self.scale.to(x.dtype), bits=self.bits, zero_point=self.zero.to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)  # type: ignore[operator]


def describe(model: nn.Module, run: Run) -> Metrics:
    """Return the latency of one sample on eff-kernels and the quantized layers that run there; empty without any."""
    if not quant_layers(model) or run.task.name == NoTask.name:
        return Metrics()
    executed = on_kernels(model)
    if not executed.ran:
        return Metrics()
    try:
        latency = time_forward(executed.model, run, budget_s=SECONDS).median
    except EffError:  # a later method computes with the quantized layer itself, e.g. an adapter with its columns
        return Metrics()
    values = {
        "kernel_latency": Metric(value=latency, unit="ms", better="lower"),
        "kernel_layers": Metric(value=100 * len(executed.ran) / (len(executed.ran) + len(executed.left)), unit="%"),
    }
    rows: list[TableRow] = [{"layer": name, "stays in float": reason} for name, reason in executed.left.items()]
    return Metrics(values=values, tables={"not_on_kernels": rows} if rows else {})


def on_kernels(model: nn.Module) -> Executed:
    """Return a copy of `model` in eval mode whose quantized layers run on eff-kernels where they can."""
    changed = copy.deepcopy(model).eval().requires_grad_(False)
    ran, left = [], {}
    for name, layer in quant_layers(changed).items():
        if reason := _why_not(layer):
            left[name] = reason
            continue
        ran.append(name)
        replace_module(changed, name, PackedLinear(layer) if layer.input_quantizer is None else IntegerLayer(layer))
    return Executed(changed, tuple(ran), left)


def _why_not(source: QuantLayer) -> str:
    """Return why a layer cannot run on integers; empty where it can."""
    layer, inputs, weights = source.layer, source.input_quantizer, source.weight_quantizer
    if weights is None:
        return "its weights are not quantized"
    if type(weights) is not Quantizer or type(inputs) not in (Quantizer, type(None)):
        return f"its quantizer is a {type(weights if type(weights) is not Quantizer else inputs).__name__}"
    if weights.bits > 8:
        return f"its weights have {weights.bits} bits"
    if weights.axis not in (None, 0):
        return "its weights are quantized along their inputs"
    levels, zero = _weight_levels(source)
    if zero.numel() and bool(((zero - zero.round()).abs() > 1e-3).any()):
        return "the offset of its weights is no whole number of steps"
    if inputs is None:
        if not isinstance(layer, nn.Linear):
            return "a convolution with float inputs"
        if weights.bits not in ROW_BITS or layer.in_features % 8:
            return f"no packed product for {weights.bits} bits and {layer.in_features} inputs"
        return ""
    if inputs.bits > 8:
        return f"its inputs have {inputs.bits} bits"
    codes = levels - zero.round()
    if int(codes.min()) < -128 or int(codes.max()) > 127:
        return "its weights less their zero point do not fit int8"
    if codes[0].numel() > longest_sum(torch.int8):
        return "its sums could exceed 32 bits"
    return "" if isinstance(layer, nn.Linear) else _why_no_windows(layer, inputs)


def _why_no_windows(layer: nn.Module, inputs: Quantizer) -> str:
    if not isinstance(layer, nn.Conv2d):
        return f"{type(layer).__name__} has no integer product here"
    if layer.groups > 1:
        return f"a convolution in {layer.groups} groups"
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros" or tuple(layer.dilation) != (1, 1):
        return "a convolution that is dilated or not padded with zeros"
    level = _padding_level(inputs)
    if any(layer.padding) and not (abs(level - round(level)) < 1e-3 and inputs.q_min <= round(level) <= inputs.q_max):
        return "zero is no level of its inputs, and it is padded with zeros"
    return ""


def _weight_levels(source: QuantLayer) -> tuple[Tensor, Tensor]:
    """Return the integer levels of the weight and its zero point, shaped to spread over them."""
    weights, weight = source.weight_quantizer, source.layer.weight
    assert weights is not None and isinstance(weight, Tensor)
    levels = weights.levels(weight)
    if weights.offset is None:
        return levels, torch.zeros([1] * weight.ndim)
    zero = -weights.offset.detach() / weights.scale.detach()
    rounded = torch.where((zero - zero.round()).abs() < 1e-3, zero.round(), zero)
    return levels, rounded.view([-1, *[1] * (weight.ndim - 1)])


def _padding_level(inputs: Quantizer) -> float:
    """Return the level that stands for zero."""
    return 0.0 if inputs.offset is None else round(float(-inputs.offset / inputs.scale), 3)
