"""CoDeNet's quantizers (Huang et al., FPGA 2021, sec. 4.2, and the authors' code).

    weights       w' = w gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta     running statistics
                  t = max(|min w'|, |max w'|) per output channel,  q = clip(round(w' (2^(k-1) - 1) / t), -2^(k-1), 2^(k-1) - 1)
    activations   [low, high]: running averages of a tensor's min and max, 0 included;
                  scale (high - low) / (2^8 - 1), integer zero point, codes clamped to 0..255

Rounding passes the gradient on: for the weights all of it, for the activations where they lie within the range. Biases stay
in float, and so does the image. The range includes 0 because zero padding must be a code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eff_kernels.fake_quant import fake_quant
from eff_quant_kit.layers import QuantLayer
from eff_quant_kit.quantizer import SMALLEST_SCALE, Quantizer

FEW_WEIGHTS, FEW_SHARE = 10, 0.95
LOWER, UPPER = 0.001, 0.999


class RunningRange(Quantizer):
    """An activation quantizer whose range follows its tensor while training. One of these is shared by a stage.

    While `calibrating` it takes the union of what it sees and quantizes nothing.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float):
        super().__init__(bits, signed=False, with_offset=True)
        self.momentum = momentum
        self.calibrating = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.scale.requires_grad_(False)
        assert self.offset is not None
        self.offset.requires_grad_(False)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`; the first one sets it."""
        low, high = (value.float() for value in x.detach().aminmax())
        if not bool(self.initialised):
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.calibrating:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)
        floor, ceiling = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = ((ceiling - floor) / self.q_max).clamp(min=SMALLEST_SCALE)
        self.set_scale(scale, (floor / scale).round() * scale)

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        assert self.offset is not None
        return round(-float(self.offset.detach()) / float(self.scale.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` fake-quantized."""
        if self.calibrating:
            self.observe(x)
            return x
        if not self.training:
            return super().forward(x)
        self.observe(x)
        assert self.offset is not None
        scale, offset = self.scale.detach().clone(), self.offset.detach().clone()  # a stage's next block moves them on
        return fake_quant(x, scale, self.q_min, self.q_max, offset=offset)


class QuantConv(nn.Module):
    """A convolution that folds its batch norm and quantizes the product in every forward pass."""

    def __init__(
        self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None, bits: int, percentile: bool, inputs: Quantizer | None
    ):
        super().__init__()
        self.layer, self.norm, self.percentile = layer, norm, percentile
        self.input_quantizer = inputs
        self.weight_quantizer = Quantizer(bits, channels=layer.out_channels, axis=0)
        self.weight_quantizer.scale.requires_grad_(False)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the norm's running statistics in them."""
        weight, bias, norm = self.layer.weight, self.layer.bias, self.norm
        if norm is None:
            return weight, bias
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        return weight * factor.view(-1, 1, 1, 1), shift * factor + norm.bias

    @torch.no_grad()
    def _levels_of(self, weight: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        quantizer.scale.copy_((weight_range(weight, self.percentile) / quantizer.q_max).clamp(min=SMALLEST_SCALE))
        quantizer.initialised.fill_(True)
        rounded: Tensor = quantizer(weight)
        return rounded

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for quantized weights."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight, bias = self.folded()
        weight = weight + (self._levels_of(weight) - weight).detach()
        return self.layer._conv_forward(x, weight, bias)

    def finished(self) -> QuantLayer:
        """Return the layer with the norm folded for good and its scales fixed."""
        with torch.no_grad():
            weight, bias = self.folded()
            self._levels_of(weight)
        layer = self.layer
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return QuantLayer(layer, self.weight_quantizer, self.input_quantizer)


def weight_range(weight: Tensor, percentile: bool) -> Tensor:
    """Return t per output channel: the larger of |min| and |max|, or of the percentiles that stand for them."""
    flat = weight.detach().flatten(1)
    count = flat.shape[1]
    low, high = flat.aminmax(dim=1)
    if percentile and count < FEW_WEIGHTS:
        low, high = FEW_SHARE * low, FEW_SHARE * high
    elif percentile:
        low = flat.kthvalue(math.ceil(count * LOWER), 1).values
        high = flat.kthvalue(math.ceil(count * UPPER), 1).values
    return torch.maximum(low.abs(), high.abs())
