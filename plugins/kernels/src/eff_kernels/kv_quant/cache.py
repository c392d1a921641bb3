"""What a quantized cache consists of, and the quantizers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Tokens of one width: n of each head."""

    bits: int
    index: Tensor
    """Positions, (batch, heads, n) int64; not read by attention."""
    key_codes: Tensor
    """(batch, heads, n, dim * bits / 8) uint8, the first channels in the lowest bits."""
    value_codes: Tensor
    key_scale: Tensor
    """(heads, dim) float32."""
    key_low: Tensor
    value_scale: Tensor
    """(batch, n) float32: for the i-th token of every head."""
    value_low: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what attention reads."""
        return (
            self.key_codes, self.key_scale, self.key_low, self.value_codes, self.value_scale, self.value_low,
        )  # fmt: skip


@dataclass(frozen=True)
class QuantizedKV:
    """A packed cache."""

    parts: tuple[Part, ...]
    channel: Tensor
    """c of the values, (heads, dim) float32."""
    dtype: torch.dtype
    """Of the keys and values."""
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of codes and parameters, without the positions."""
        tensors = [self.channel, *(tensor for part in self.parts for tensor in part.tensors())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens (batch, heads, n, dim) in float32."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])).float()


def quantize_part(keys: Tensor, values: Tensor, channel: Tensor, index: Tensor, bits: int) -> Part:
    """Return the tokens `index` at this width."""
    k = gather(keys, index)
    key_scale, key_low = _range(k, (0, 2), bits)  # (1, heads, 1, dim)
    v = gather(values, index) / channel[:, None]
    value_scale, value_low = _range(v, (1, 3), bits)  # (batch, 1, n, 1)
    return Part(
        bits, index, pack(_codes(k, key_scale, key_low, bits), bits), pack(_codes(v, value_scale, value_low, bits), bits),
        key_scale[0, :, 0], key_low[0, :, 0], value_scale[:, 0, :, 0], value_low[:, 0, :, 0],
    )  # fmt: skip


def dequantize_part(part: Part, channel: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values (batch, heads, n, dim), float32."""
    keys = unpack(part.key_codes, part.bits).float() * part.key_scale[:, None] + part.key_low[:, None]
    values = unpack(part.value_codes, part.bits).float() * part.value_scale[:, None, :, None]
    return keys, (values + part.value_low[:, None, :, None]) * channel[:, None]


def _range(x: Tensor, dims: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    """Return step and smallest value; a step of 1 where all values are equal."""
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return torch.where(step > 0, step, 1.0), low


def _codes(x: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    return ((x - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., dim) packed to (..., dim * bits / 8) bytes, as `eff_kernels.packing` orders them."""
    per_byte = 8 // bits
    apart = codes.unflatten(-1, (-1, per_byte))
    packed = apart[..., 0].clone()
    for place in range(1, per_byte):
        packed |= apart[..., place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `pack`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
