"""The learned rounding (AdaRound, Nagel et al., arXiv:2004.10568, as BRECQ's code, MIT, has it).

    w_soft = d (clip(floor(w/d) + h(V) + zp, 0, 2^b - 1) - zp)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),  zeta = 1.1, gamma = -0.1
    V at first: -log((zeta - gamma) / (frac - gamma) - 1), frac = w/d - floor(w/d), so w_soft = w
    penalty: sum 1 - |2 h - 1|^beta;  at the end h = 1 if V >= 0, else 0

With span 2, h runs from -1 to 2 and the penalty is on its distance to the nearest whole number. The other variable is an
offset e with w_q = d (clip(round(w/d + e) + zp, ...) - zp), rounding straight through, |e| <= span.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.grid import level_range, search_power, search_scale, unwarp, warp
from eff_quant_kit.quantizer import Quantizer

STRETCH = 0.1


class RoundingLayer(nn.Module):
    """A convolution or linear layer whose weight is rounded by a learned choice.

    `mode` is "float" before its unit's turn, "soft" during it, "hard" after.
    """

    def __init__(self, layer: nn.Module, bits: Tensor, config: GradPTQConfig, act_bits: int | None, signed: bool):
        super().__init__()
        self.layer = layer
        self.config = config
        self.mode: Literal["float", "soft", "hard"] = "float"
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows = weight.detach().flatten(1)
        self.power = 1.0
        narrow = config.grid == "power"
        if narrow:
            self.power = config.power if config.power is not None else search_power(rows, bits, config.search_p)
        warped = warp(rows, self.power)
        scale, zero = search_scale(warped, bits, config.symmetric, narrow, config.search_p)
        low, high = level_range(bits, config.symmetric, narrow)
        for name, value in (("bits", bits), ("scale", scale), ("zero", zero), ("low", low), ("high", high)):
            self.register_buffer(name, value.to(rows.dtype) if name != "bits" else value)
        u = warped / scale[:, None]
        self.register_buffer("base", u.floor())
        self.register_buffer("frac", u - u.floor())
        self.register_buffer("learned", self._selection())
        self.variable = nn.Parameter(self._start())
        self.log_scale = nn.Parameter(torch.zeros_like(scale))
        self.input_quantizer = Quantizer(act_bits, signed=signed) if act_bits is not None else None
        self.quantizes_input = False

    def _selection(self) -> Tensor:
        """Return which weights are learned: those in range that `select` takes."""
        u = self.base + self.frac
        inside = (u + self.zero[:, None] >= self.low[:, None]) & (u + self.zero[:, None] <= self.high[:, None])
        config = self.config
        if config.select == "all":
            return inside
        count = int(config.select_frac * inside.numel())
        rank = torch.rand(inside.numel()) if config.select == "random" else (self.frac.flatten() - 0.5).abs().cpu()
        chosen = torch.zeros(inside.numel(), dtype=torch.bool)
        chosen[rank.argsort()[:count]] = True
        return inside & chosen.view_as(inside).to(inside.device)

    @property
    def bounds(self) -> tuple[float, float]:
        """gamma and zeta of the stretched sigmoid."""
        return -(self.config.span - 1) - STRETCH, self.config.span + STRETCH

    def _start(self) -> Tensor:
        if self.config.variable == "offset":
            return torch.zeros_like(self.frac)
        gamma, zeta = self.bounds
        return -torch.log((zeta - gamma) / (self.frac - gamma) - 1)

    def soft(self) -> Tensor:
        """Return h(V), (C, n)."""
        gamma, zeta = self.bounds
        return (torch.sigmoid(self.variable) * (zeta - gamma) + gamma).clamp(1 - self.config.span, self.config.span)

    def levels(self) -> Tensor:
        """Return the level of each weight before the zero point is added: soft, or whole numbers in mode hard."""
        nearest = self.base + (self.frac >= 0.5).to(self.base.dtype)
        if self.config.variable == "offset":
            u = self.base + self.frac + self.variable.clamp(-self.config.span, self.config.span)
            chosen = u + (u.round() - u).detach()
        elif self.mode == "hard":
            h = self.soft()
            chosen = self.base + ((self.variable >= 0).to(h.dtype) if self.config.span == 1 else h.round())
        else:
            chosen = self.base + self.soft()
        level = torch.where(self.learned, chosen, nearest)
        zero = self.zero[:, None]
        return (level + zero).clamp(self.low[:, None], self.high[:, None]) - zero

    @property
    def weight(self) -> Tensor:
        """The weight of the current mode."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        if self.mode == "float":
            return weight
        scale = (self.scale * self.log_scale.exp())[:, None]
        return unwarp(self.levels() * scale, self.power).view_as(weight)

    def penalty(self, beta: float) -> Tensor:
        """Return the sum of 1 - |2h - 1|^beta over learned weights; the offset needs none."""
        if self.config.variable == "offset":
            return self.variable.new_zeros(())
        h = self.soft()
        h = h - h.detach().floor().clamp(max=self.config.span - 1)
        return ((1 - (2 * h - 1).abs().pow(beta)) * self.learned).sum()

    def decidedness(self) -> float:
        """Return mean |2h - 1| of the learned weights, 1 where all are decided."""
        if self.config.variable == "offset" or not bool(self.learned.any()):
            return 1.0
        h = self.soft().detach()
        h = h - h.floor().clamp(max=self.config.span - 1)
        return float((2 * h - 1).abs()[self.learned].mean())

    def flips(self) -> float:
        """Return the share of weights that are not rounded to nearest."""
        nearest = (self.base + (self.frac >= 0.5).to(self.base.dtype) + self.zero[:, None]).clamp(
            self.low[:, None], self.high[:, None]
        )
        return float((self.levels().detach() + self.zero[:, None] != nearest).double().mean())

    def clipped(self) -> float:
        """Return the share of weights outside the range, for which there is nothing to learn."""
        u = self.base + self.frac + self.zero[:, None]
        return float(((u < self.low[:, None]) | (u > self.high[:, None])).double().mean())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        if self.quantizes_input and self.input_quantizer is not None:
            x = self.input_quantizer(x)
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, self.weight, bias)
        output: Tensor = self.layer._conv_forward(x, self.weight, bias)  # type: ignore[operator]
        return output
