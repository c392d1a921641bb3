"""AdaQuant's quantizer: asymmetric, by range and zero (Hubara et al., arXiv:2006.10518; reference code CalibTIP, MIT).

    n = 2^b - 1,  scale = r / n,  zp = clip(round(-z / scale), 0, n)
    q = round(clip(x / scale + zp, 0, n)),  x_hat = (q - zp) scale

Range r, zero z (the smallest value, real) and x all receive gradients; rounding passes them straight through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_kernels.fake_quant import fake_quant
from eff_quant_kit.quantizer import SMALLEST_SCALE, Quantizer

SMALLEST_RANGE, LARGEST_RANGE = 1e-6, 1e5
"""The reference keeps ranges between these."""


def round_through(x: Tensor) -> Tensor:
    """Round half to even, as the reference does; the gradient passes."""
    return x + (x.round() - x).detach()


def quantize(x: Tensor, range_: Tensor, zero: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Quantize and dequantize `x`.

    Args:
        x: values, any shape, floating point.
        range_: width of the range (the paper's r), unit of `x`; shape () or, with `axis`, (x.shape[axis],).
        zero: smallest value (the paper's z), shape and unit of `range_`.
        bits: 2 to 22; the grid has 2^bits levels.
        axis: dimension of `x` that has a range per index.

    Returns:
        Tensor like `x`; 0 is among its possible values.

    Raises:
        ValueError: a range or a zero is not finite (on the CPU).
    """
    scale, zero_point = grid(range_, zero, bits)
    # x / scale + zp is (x - offset) / scale with offset -zp scale; gradients reach zp through the offset
    return fake_quant(x, scale, 0, 2**bits - 1, offset=-zero_point * scale, axis=axis)


def grid(range_: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and integer zero point, both with gradients."""
    levels = 2**bits - 1
    scale = range_.clamp(SMALLEST_RANGE, LARGEST_RANGE) / levels
    return scale, round_through(-zero / scale).clamp(0, levels)


def extremes(x: Tensor, axis: int | None = None) -> tuple[Tensor, Tensor]:
    """Return smallest and largest value, per tensor or per index of `axis`; 0 lies between them."""
    dims = [index for index in range(x.ndim) if index != axis]
    return x.amin(dims).clamp(max=0), x.amax(dims).clamp(min=0)


def quantize_bias(bias: Tensor, bits: int) -> Tensor:
    """Quantize a bias on the range it has now (the reference gives it the bits of weight and input together)."""
    low, high = extremes(bias.detach())
    return quantize(bias, high - low, low, bits)


class RangeQuantizer(nn.Module):
    """One range and zero for a tensor, or one per channel of a weight."""

    def __init__(self, bits: int, channels: int | None = None):
        super().__init__()
        self.bits = bits
        shape = () if channels is None else (channels,)
        self.range = nn.Parameter(torch.ones(shape))
        self.zero = nn.Parameter(torch.zeros(shape))

    def cover(self, low: Tensor, high: Tensor) -> None:
        """Take the range [low, high]."""
        with torch.no_grad():
            self.range.copy_((high - low).clamp(min=SMALLEST_RANGE))
            self.zero.copy_(low)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` fake-quantized."""
        return quantize(x, self.range, self.zero, self.bits, axis=0 if self.range.ndim else None)

    def as_quantizer(self) -> Quantizer:
        """Return the kit's quantizer with the same grid: unsigned levels and the offset -zp scale."""
        channels = len(self.range) if self.range.ndim else None
        axis = None if channels is None else 0
        made = Quantizer(self.bits, signed=False, channels=channels, axis=axis, with_offset=True)
        scale, zero_point = grid(self.range.detach(), self.zero.detach(), self.bits)
        scale = scale.clamp(
            min=SMALLEST_SCALE
        )  # of channels that are all but zero; the offset is a whole number of them
        made.set_scale(scale, -zero_point * scale)
        return made


class RangeLayer(nn.Module):
    """A convolution or linear layer while it is being calibrated: input, weight and bias are quantized."""

    def __init__(self, layer: nn.Module, weight_bits: int, act_bits: int):
        super().__init__()
        self.layer = layer
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.weight_quantizer = RangeQuantizer(weight_bits, len(weight))
        self.input_quantizer = RangeQuantizer(act_bits)
        self.input_low: Tensor
        self.input_high: Tensor
        self.register_buffer("input_low", torch.zeros(()))
        self.register_buffer("input_high", torch.ones(()))

    @property
    def bias_bits(self) -> int:
        """Bits of the bias."""
        return self.weight_quantizer.bits + self.input_quantizer.bits

    def set_bits(self, weight_bits: int, act_bits: int) -> None:
        """Use other numbers of bits; ranges stay."""
        self.weight_quantizer.bits, self.input_quantizer.bits = weight_bits, act_bits

    def cover_measured(self) -> None:
        """Take the ranges of the weight as it is and of the inputs as they were measured."""
        self.weight_quantizer.cover(*extremes(self.layer.weight.detach(), 0))  # type: ignore[union-attr,operator]
        self.input_quantizer.cover(self.input_low, self.input_high)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for quantized input, weight and bias."""
        weight = self.weight_quantizer(self.layer.weight)
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        if bias is not None:
            bias = quantize_bias(bias, self.bias_bits)
        x = self.input_quantizer(x)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        output: Tensor = self.layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output
