"""Unsigned integer codes packed into bytes: the one layout of all packed weights, little-endian inside the byte stream.

Code i has the bits i*bits to i*bits + bits - 1 of the stream, least significant first; byte j holds the bits 8j to 8j + 7.
So eight codes fill `bits` whole bytes, and a row of a multiple of eight codes is a stream of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import INTEGERS, check_choice, check_dtype, check_integer, check_range, check_readable

ROW_BITS = (2, 3, 4, 8)
"""Widths that `unpack_rows` knows."""

_SPREAD = {
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    3: (torch.int64, ((20, 0x00000FFF00000FFF), (10, 0x003F003F003F003F), (5, 0x0707070707070707))),
    4: (torch.int16, ((4, 0x0F0F),)),
}
"""How to pull the codes in a word apart into one byte each: shift the upper half up, keep what is in place, again."""


def pack_bits(codes: Tensor, bits: int, *, op: str = "pack_bits") -> Tensor:
    """Return unsigned codes as a dense stream of bytes.

    Args:
        codes: integers in [0, 2^bits - 1], any shape, of an integer dtype or bool.
        bits: 1 to 8.
        op: who asks, named in errors.

    Returns:
        uint8 vector of ceil(codes.numel() * bits / 8) bytes; code i has bits i*bits to i*bits+bits-1,
        least significant first.

    Raises:
        TypeError: the codes are no integers.
        ValueError: a code does not fit, or bits is out of range.
    """
    check_width(op, bits)
    check_codes(op, codes, bits)
    flat = codes.flatten()
    count = flat.numel()
    eights = torch.cat([flat.to(torch.uint8), flat.new_zeros(-count % 8, dtype=torch.uint8)]).view(-1, 8)
    word = torch.zeros(len(eights), dtype=torch.int64, device=codes.device)
    for index in range(8):
        word |= eights[:, index].long() << (index * bits)
    stream = torch.stack([(word >> (8 * index)) & 255 for index in range(bits)], 1).to(torch.uint8)
    return stream.flatten()[: -(-count * bits // 8)].contiguous()


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return `count` unsigned codes (int32 vector) from what `pack_bits` made.

    Raises:
        TypeError: the stream is not uint8.
        ValueError: the stream is too short, or bits is out of range.
    """
    check_width("unpack_bits", bits)
    check_dtype("unpack_bits", "packed", packed, (torch.uint8,))
    if packed.numel() * 8 < count * bits:
        raise ValueError(
            f"unpack_bits: packed has {packed.numel()} bytes, expected {-(-count * bits // 8)} for {count} codes of {bits} bits"
        )
    stream = packed.flatten()[: -(-count * bits // 8)]
    units = torch.cat([stream, stream.new_zeros(-len(stream) % bits)]).view(-1, bits)
    word = torch.zeros(len(units), dtype=torch.int64, device=packed.device)
    for index in range(bits):
        word |= units[:, index].long() << (8 * index)
    codes = torch.stack([(word >> (index * bits)) & (2**bits - 1) for index in range(8)], 1)
    return codes.flatten()[:count].to(torch.int32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Return codes (N, K) packed per row, uint8 (N, K * bits / 8).

    Raises:
        TypeError: the codes are no integers.
        ValueError: the codes are no matrix, K is no multiple of 8, a code does not fit, or bits is none of `ROW_BITS`.
    """
    check_choice("pack_rows", "bits", bits, ROW_BITS)
    check_dtype("pack_rows", "codes", codes, (*INTEGERS, torch.bool))
    if codes.ndim != 2 or codes.shape[1] % 8:
        raise ValueError(f"pack_rows: codes has shape {tuple(codes.shape)}, expected (N, K) with K a multiple of 8")
    return pack_bits(codes, bits, op="pack_rows").view(len(codes), codes.shape[1] * bits // 8)


def unpack_rows(packed: Tensor, bits: int, work: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the codes (N, K), uint8, of what `pack_rows` made; few passes over whole words, on any device.

    Args:
        packed: uint8, shape (N, K * bits / 8), contiguous.
        bits: one of `ROW_BITS`.
        work: `unpacking_buffers` of at least N rows, for many calls: the result then lies in the first of them.

    Raises:
        ValueError: bits is none of `ROW_BITS`.
    """
    check_choice("unpack_rows", "bits", bits, ROW_BITS)
    n = len(packed)
    word, shifted = (buffer[:n] for buffer in work or unpacking_buffers(n, packed.shape[1], bits, packed.device))
    if bits == 8:
        return word.copy_(packed)
    if bits == 3:
        low, middle, high = packed.view(n, packed.shape[1] // 3, 3).unbind(-1)
        word.copy_(high).bitwise_left_shift_(8).bitwise_or_(middle).bitwise_left_shift_(8).bitwise_or_(low)
    else:
        word.copy_(packed)
    for shift, mask in _SPREAD[bits][1]:
        torch.bitwise_left_shift(word, shift, out=shifted)
        word.bitwise_or_(shifted).bitwise_and_(mask)
    return word.view(torch.uint8)


def check_width(op: str, bits: int) -> None:
    """Raise unless `bits` is a width of a stream."""
    check_integer(op, "bits", bits)
    check_range(op, "bits", bits, 1, 8)


def check_codes(op: str, codes: Tensor, bits: int) -> None:
    """Raise unless the codes are integers of `bits` bits; waits for the device."""
    check_dtype(op, "codes", codes, (*INTEGERS, torch.bool))
    check_readable(op, "codes", codes)
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= 2**bits:
            raise ValueError(f"{op}: codes has values from {low} to {high}, expected 0 to {2**bits - 1}")


def unpacking_buffers(rows: int, row_bytes: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what `unpack_rows` works in; fresh pages at every call would cost as much as the unpacking."""
    dtype = torch.uint8 if bits == 8 else _SPREAD[bits][0]
    word = torch.empty(rows, row_bytes // 3 if bits == 3 else row_bytes, dtype=dtype, device=device)
    return word, torch.empty_like(word)
