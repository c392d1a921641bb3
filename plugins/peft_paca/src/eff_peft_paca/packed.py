"""A frozen linear layer in 4 or 8 bits: the base of QPaCA.

nf4: blocks of 64 weights, w = absmax * level, 16 levels (QLoRA: Dettmers et al., NeurIPS 2023,
     arXiv:2305.14314, appendix E): quantiles of a normal distribution, 0 among them
int8: rows, w = absmax / 127 * code
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_peft_kit.delta import matrix

BLOCK = 64
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_INT8_MAX = 127

Format = Literal["nf4", "int8"]


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept in `codes` and `absmax` and made when it is used."""

    codes: Tensor
    absmax: Tensor

    def __init__(self, layer: nn.Module, format: Format):
        super().__init__()
        weight = matrix(layer)
        self.format = format
        self.shape = tuple(weight.shape)
        self.dtype = weight.dtype
        self.bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]
        codes, absmax = pack(weight, format)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)

    @property
    def layer(self) -> nn.Module:
        """The layer itself, as for other modules that compute a weight."""
        return self

    def weight(self) -> Tensor:
        """Return the dequantized weight, (out, in)."""
        return unpack(self.codes, self.absmax, self.shape, self.format).to(self.dtype)

    @torch.no_grad()
    def repack(self, weight: Tensor) -> None:
        """Quantize another weight into this layer."""
        codes, absmax = pack(weight, self.format)
        self.codes.copy_(codes)
        self.absmax.copy_(absmax)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, self.weight().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Return shape and format."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}"


def pack(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return codes and absmax of a weight (out, in).

    nf4: uint8 codes, two in a byte, and one absmax per block of 64 in row order; the last block is filled up
    with zeros. int8: codes (out, in) and absmax (out, 1). absmax is float32, 0 where all weights are 0.
    """
    weight = weight.detach().float()
    if format == "int8":
        absmax = weight.abs().amax(1, keepdim=True)
        codes = (weight / _divisor(absmax) * _INT8_MAX).round()
        return codes.to(torch.int8), absmax
    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(1, keepdim=True)
    levels = _levels(weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(flat / _divisor(absmax), middles).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], absmax


def unpack(codes: Tensor, absmax: Tensor, shape: tuple[int, ...], format: Format) -> Tensor:
    """Return the weight (out, in), float32."""
    if format == "int8":
        return codes.float() * (absmax / _INT8_MAX)
    wide = codes.int()  # ONNX shifts no bytes
    both = torch.stack([wide >> 4, wide & 15], 1).long()
    flat = _levels(codes.device)[both].view(-1, BLOCK) * absmax
    return flat.flatten()[: shape[0] * shape[1]].view(shape)


def _divisor(absmax: Tensor) -> Tensor:
    return absmax.masked_fill(absmax == 0, 1.0)


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, device=device)
