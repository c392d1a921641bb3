"""What a quantized cache consists of, and the quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.checks import check_device, check_dtype, check_shape, check_values

SCHEMES = ("channel", "token", "channel_separable")
"""What shares a range: a channel of a head; a token, over all heads; a token whose channels were first divided by c."""


@dataclass(frozen=True)
class Codes:
    """Keys or values of some tokens: channel * (scale * code + low), the channel factor being the whole cache's."""

    bits: int
    packed: Tensor
    """(batch, heads, n, dim * bits / 8) uint8, the first channels in the lowest bits."""
    scale: Tensor
    """float32; (batch, n) by token: for the i-th token of every head; else (heads, dim)."""
    low: Tensor
    by_token: bool

    def dequantize(self, channel: Tensor | None) -> Tensor:
        """Return (batch, heads, n, dim), float32."""
        place = (slice(None), None, slice(None), None) if self.by_token else (slice(None), None)
        x = unpack(self.packed, self.bits).float() * self.scale[place] + self.low[place]
        return x if channel is None else x * channel[:, None]

    def select(self, sequences: Tensor) -> Codes:
        """Return those of some sequences of the batch."""
        held = ("packed", "scale", "low") if self.by_token else ("packed",)
        return replace(self, **{name: getattr(self, name).index_select(0, sequences) for name in held})


@dataclass(frozen=True)
class Part:
    """Tokens of one pair of widths: n of each head, in the order of their positions.

    Where sequences have different numbers of tokens (padding), n is the largest and `counts` has them all.
    """

    keys: Codes
    values: Codes
    member: Tensor
    """Which positions these are, a bit each: (batch, heads, ceil(length / 8)) uint8; not read by attention."""
    counts: Tensor | None
    """(batch,) int32; None: n everywhere."""

    @property
    def tokens(self) -> int:
        """n."""
        return self.keys.packed.shape[2]

    @property
    def is_packed_attention(self) -> bool:
        """Whether attention can read the codes: keys by channel, values by token."""
        return not self.keys.by_token and self.values.by_token

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the codes and their parameters."""
        return tuple(x for codes in (self.keys, self.values) for x in (codes.packed, codes.scale, codes.low))

    def present(self) -> Tensor | None:
        """Return which of the n tokens a sequence has, (batch, n) bool; None: all."""
        return None if self.counts is None else within(self.counts, self.tokens)

    def mask(self, length: int) -> Tensor:
        """Return which of `length` positions these tokens have, (batch, heads, length) bool."""
        return unpack(self.member, 1)[..., :length].bool()


@dataclass(frozen=True)
class QuantizedKV:
    """A packed cache."""

    parts: tuple[Part, ...]
    key_channel: Tensor | None
    """c of the keys, (heads, dim) float32; None where they are not channel-separable."""
    value_channel: Tensor | None
    dtype: torch.dtype
    """Of the keys and values."""
    length: int
    """Positions, those of padding included."""

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are stored."""
        for part in self.parts:
            yield from (*part.tensors(), part.member)
            if part.counts is not None:
                yield part.counts
        yield from (c for c in (self.key_channel, self.value_channel) if c is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, parameters and positions."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, heads, length, dim."""
        keys = self.parts[0].keys
        batch, heads, _, width = keys.packed.shape
        return batch, heads, self.length, width * 8 // keys.bits

    def select(self, sequences: Tensor) -> QuantizedKV:
        """Return the cache of these sequences of the batch, (k,) int64 or int32, e.g. of the beams that go on.

        Raises:
            TypeError, ValueError: no vector of integers on the device of the cache, or a sequence that is not there (CPU).
        """
        op, held = "QuantizedKV.select", self.parts[0].member
        check_dtype(op, "sequences", sequences, (torch.int64, torch.int32))
        check_shape(op, "sequences", sequences, ("k",))
        check_device(op, "sequences", sequences, "cache", held)
        check_values(op, "sequences", sequences, 0, len(held) - 1, f"0 to {len(held) - 1}")
        parts = tuple(
            Part(
                part.keys.select(sequences), part.values.select(sequences), part.member.index_select(0, sequences),
                None if part.counts is None else part.counts.index_select(0, sequences),
            )
            for part in self.parts
        )  # fmt: skip
        return replace(self, parts=parts)


def within(counts: Tensor, n: int) -> Tensor:
    """Return (batch, n) bool: the first `counts` of each row."""
    return torch.arange(n, device=counts.device) < counts[:, None]


def positions(mask: Tensor, n: int) -> Tensor:
    """Return the first n positions where `mask` (..., length) is true, in order; then some others."""
    return mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :n]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Return tokens (batch, heads, n, dim) in float32."""
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])).float()


def make_part(
    keys: Tensor, values: Tensor, mask: Tensor, counts: Tensor, bits: tuple[int, int], by_token: tuple[bool, bool]
) -> Part:
    """Return the tokens of `mask` (batch, heads, length) at these widths; keys and values are divided by c already.

    Args:
        keys, values: (batch, heads, length, dim).
        mask: true for as many tokens in all heads of a sequence.
        counts: how many that are, (batch,).
        bits: of keys and values.
        by_token: what shares a range in keys and in values.
    """
    n = int(counts.max())
    index = positions(mask, n)
    is_ragged = bool((counts != n).any())
    present = within(counts, n) if is_ragged else None
    codes = [
        quantize(gather(x, index), width, token, present)
        for x, width, token in zip((keys, values), bits, by_token, strict=True)
    ]
    member = pack(F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)), 1)
    return Part(codes[0], codes[1], member, counts.to(torch.int32) if is_ragged else None)


def quantize(x: Tensor, bits: int, by_token: bool, present: Tensor | None = None) -> Codes:
    """Return the codes of x (batch, heads, n, dim): q = round((x - min) / s), s = (max - min) / (2^bits - 1).

    Tokens that are not `present` (batch, n) have no part in minimum and maximum; their codes mean nothing. Where all
    values are equal s is 1.
    """
    dims = (1, 3) if by_token else (0, 2)
    low, high = x, x
    if present is not None:
        there = present[:, None, :, None]
        low, high = x.masked_fill(~there, torch.inf), x.masked_fill(~there, -torch.inf)
    low, high = low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)
    step = (high - low) / (2**bits - 1)
    step, low = torch.where(step > 0, step, 1.0), torch.where(low.isfinite(), low, 0.0)
    codes = ((x - low) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    flat = (step[:, 0, :, 0], low[:, 0, :, 0]) if by_token else (step[0, :, 0], low[0, :, 0])
    return Codes(bits, pack(codes, bits), *flat, by_token)


def channel_factor(x: Tensor, covered: Tensor | None) -> Tensor:
    """Return c = sqrt(max |x_d|) over batch and covered tokens, (heads, dim) float32; 1 for a channel of zeros."""
    magnitude = x.float().abs()
    if covered is not None:
        magnitude = magnitude.masked_fill(~covered[..., None], 0.0)
    channel = magnitude.amax((0, 2)).sqrt()
    return torch.where(channel > 0, channel, 1.0)


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
