"""QALoRA (He, Liu, Wu, Zhou, Zhuang: EfficientDM, ICLR 2024, arXiv:2310.03270).

    W = Q(W_0 + B A; delta_w, z_w)          sec. 3.2: the adapter is inside the quantizer, so it merges into the integers
    linear: A (r, in), B (out, r);  conv: dW[o, c, y, x] = sum_r B[o, r] A[r, c, y, x]
B starts at zero. delta_w trains, z_w does not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eff_quant_kit.layers import QuantLayer
from eff_quant_kit.quantizer import Quantizer


class AdaptedWeight(nn.Module):
    """Computes a layer's quantized weight from its frozen base, two factors, a trained scale and a fixed zero point."""

    def __init__(self, quantizer: Quantizer, weight: Tensor, rank: int, packed: bool):
        super().__init__()
        rank = min(rank, len(weight), weight[0].numel())
        scale, offset = quantizer.scale.detach(), quantizer.offset
        assert offset is not None
        self.q_max, self.shape = quantizer.q_max, weight.shape
        self.spread = [-1] + [1] * (weight.ndim - 1)
        self.scale = nn.Parameter(scale.clone())
        self.first_scale = scale.clone()
        self.zero_point = (-offset.detach() / scale).round()
        base = weight.detach().clone()
        # the base keeps its own scale: shared with the trained one, W_0 would move with delta
        self.base = quantizer(base).detach() if packed else base
        self.down = nn.Parameter(torch.empty(rank, weight[0].numel(), device=weight.device))
        self.up = nn.Parameter(torch.zeros(len(weight), rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def merged(self) -> Tensor:
        """Return W_0 + B A, in float."""
        return self.base + (self.up @ self.down).view(self.shape)

    def levels(self) -> Tensor:
        """Return the integers 0 .. 2^b - 1; their gradient passes through round."""
        scale, zero = self.scale.view(self.spread), self.zero_point.view(self.spread)
        u = self.merged() / scale
        return (u + (u.round() - u).detach() + zero).clamp(0, self.q_max)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the dequantized weight; the layer's own is not used."""
        return (self.levels() - self.zero_point.view(self.spread)) * self.scale.view(self.spread)


def adapt(model: nn.Module, names: list[str], rank: int, packed: bool) -> dict[str, AdaptedWeight]:
    """Put adapters into the quantized layers `names`; everything else stops training."""
    model.requires_grad_(False)
    made: dict[str, AdaptedWeight] = {}
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLayer) and layer.weight_quantizer is not None
        weight: Tensor = layer.layer.weight  # type: ignore[assignment]
        made[name] = AdaptedWeight(layer.weight_quantizer, weight, rank, packed)
        layer.weight_quantizer = made[name]  # type: ignore[assignment]
    return made


@torch.no_grad()
def merge(model: nn.Module, bits: int) -> dict[str, float]:
    """Make the adapted layers plain quantized ones again; return the share of integers that training changed."""
    changed: dict[str, float] = {}
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, QuantLayer) or not isinstance(layer.weight_quantizer, AdaptedWeight):
            continue
        adapted = layer.weight_quantizer
        start = (adapted.base / adapted.first_scale.view(adapted.spread)).round() + adapted.zero_point.view(
            adapted.spread
        )
        levels = adapted.levels()
        changed[name] = float((levels != start.clamp(0, adapted.q_max)).double().mean())
        quantizer = Quantizer(bits, False, channels=len(levels), axis=0, with_offset=True).to(levels.device)
        quantizer.set_scale(adapted.scale, -adapted.zero_point * adapted.scale)
        layer.layer.weight.copy_(adapted(levels))
        layer.weight_quantizer = quantizer.requires_grad_(False)
    return changed
