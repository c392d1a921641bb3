"""What codebook_matmul means, in plain torch; every kernel must agree with it. Written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.checks import INTEGERS, check_choice, check_contiguous, check_dtype, check_readable, check_shape
from eff_kernels.packing import check_codes, pack_bits, unpack_rows

CODE_BITS = (4, 8, 16)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes (N, J) as rows of bytes, uint8 (N, J * bits / 8); the same bit order as `eff_kernels.packing`.

    Raises:
        TypeError: the codes are no integers.
        ValueError: the codes are no matrix or do not fill whole bytes, a code does not fit, or bits is none of 4, 8, 16.
    """
    check_choice("pack_codes", "bits", bits, CODE_BITS)
    check_dtype("pack_codes", "codes", codes, (*INTEGERS, torch.bool))
    check_readable("pack_codes", "codes", codes)
    if codes.ndim != 2 or codes.shape[1] * bits % 8:
        raise ValueError(f"pack_codes: codes has shape {tuple(codes.shape)}, expected (N, J), J even for 4 bits")
    if bits == 16:
        check_codes("pack_codes", codes, bits)
        codes = codes.int()  # a byte has no high half to shift out
        codes, bits = torch.stack([codes & 255, codes >> 8], -1).flatten(1), 8
    return pack_bits(codes, bits, op="pack_codes").view(len(codes), codes.shape[1] * bits // 8)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Return the codes (N, J), int32, of what `pack_codes` made.

    Raises:
        TypeError: the rows are not uint8.
        ValueError: the rows are no matrix, not contiguous, or no whole codes, or bits is none of 4, 8, 16.
    """
    check_choice("unpack_codes", "bits", bits, CODE_BITS)
    check_dtype("unpack_codes", "packed", packed, (torch.uint8,))
    check_shape("unpack_codes", "packed", packed, ("N", "bytes"))
    check_contiguous("unpack_codes", "packed", packed)
    if packed.shape[1] * 8 % bits:
        raise ValueError(f"unpack_codes: packed has {packed.shape[1]} bytes a row, expected a multiple of 2")
    if bits == 16:
        return packed.view(torch.int16).int() & 0xFFFF
    return unpack_rows(packed, bits).int()


def decode(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the weight (N, K)."""
    return codebook[unpack_codes(packed, bits).long()].flatten(1)


def forward(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    return (widened(x) @ widened(decode(packed, codebook, bits)).t()).to(x.dtype)


def backward_x(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    return (widened(grad) @ widened(decode(packed, codebook, bits))).to(grad.dtype)


def backward_codebook(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    """Return the gradient of the codebook (entries, dim): that of the weight, added over the places of each entry."""
    codes = unpack_codes(packed, bits).flatten()
    d_weight = (widened(grad).t() @ widened(x)).view(len(codes), -1)
    return d_weight.new_zeros(entries, d_weight.shape[1]).index_add_(0, codes.long(), d_weight).to(grad.dtype)


def widened(values: Tensor) -> Tensor:
    """Return the tensor in the dtype of sums: float32, or float64."""
    return values if values.dtype == torch.float64 else values.float()
