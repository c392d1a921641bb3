"""Integer codes of 2 to 8 bits packed into bytes, little-endian inside the byte stream."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return unsigned codes as a dense stream of bytes.

    Args:
        codes: integers in [0, 2^bits - 1], any shape.
        bits: 1 to 8.

    Returns:
        uint8 vector of ceil(codes.numel() * bits / 8) bytes; code i has bits i*bits to i*bits+bits-1,
        least significant first.

    Raises:
        ValueError: a code does not fit, or bits is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
    flat = codes.flatten().to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ValueError(f"codes must be in [0, {2**bits - 1}], got {int(flat.min())} to {int(flat.max())}")
    stream = ((flat[:, None] >> torch.arange(bits)) & 1).flatten()
    padding = -len(stream) % 8
    stream = torch.cat([stream, stream.new_zeros(padding)]).view(-1, 8)
    return (stream << torch.arange(8)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` unsigned codes (int32 vector) from what `pack_bits` made.

    Raises:
        ValueError: the stream is too short, or bits is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be between 1 and 8, got {bits}")
    if packed.numel() * 8 < count * bits:
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    stream = ((packed.to(torch.int32)[:, None] >> torch.arange(8)) & 1).flatten()[: count * bits]
    return (stream.view(count, bits) << torch.arange(bits)).sum(1).to(torch.int32)
