"""Product with a vector-quantized weight: runs of `dim` inputs of a row are one entry of a codebook.

    y = x @ w^T,   w[n, j * dim + t] = codebook[code[n, j], t]

(VQ4DiT, Deng et al., AAAI 2025, arXiv:2408.17131; LR2VQ, Zhu et al., arXiv:2211.11397, with groups along the inputs.)
Codes are packed in rows of bytes, little-endian: two 4-bit codes a byte (the first in the low half), one 8-bit code a
byte, or two bytes a 16-bit code. A matrix takes N * K / dim * bits / 8 bytes and the codebook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from eff_kernels.checks import (
    FLOATS,
    check_choice,
    check_contiguous,
    check_device,
    check_dtype,
    check_not_empty,
    check_range,
    check_shape,
)
from eff_kernels.codebook_matmul import library
from eff_kernels.codebook_matmul.reference import CODE_BITS, pack_codes, unpack_codes

__all__ = ["codebook_matmul", "decode", "pack_codes", "unpack_codes"]

MAX_DIM = 64
"""Longest entry: a tile of the Triton kernels holds whole entries."""


def codebook_matmul(x: Tensor, packed: Tensor, codebook: Tensor, *, bits: int) -> Tensor:
    """Return x @ w^T for the coded weight; backward to `x` and to the codebook.

    Sums are float32 (float64 for float64); the gradient of an entry adds those of all places that use it, in float32
    and in a fixed order. On a GPU few rows of x decode in the kernel, more decode the weight once and call the library's
    product. A code that the codebook does not have raises IndexError on the CPU and gives NaN on a GPU.

    Args:
        x: activations, shape (..., K), floating point; NaN stays in its row.
        packed: codes of `pack_codes`, shape (N, K / dim * bits / 8), uint8, contiguous.
        codebook: shape (entries, dim), dtype of `x`; dim in 1 to 64, at most 2^bits entries.
        bits: 4, 8 or 16.

    Returns:
        Shape (..., N), dtype of `x`.

    Raises:
        TypeError: a dtype is not as stated.
        ValueError: a shape, device, layout or `bits` does not fit.
        IndexError: a code is outside the codebook (CPU).
    """
    op = "codebook_matmul"
    check_dtype(op, "x", x, FLOATS)
    if not x.ndim:
        raise ValueError(f"{op}: x has no dimensions, expected (..., K)")
    _check_weight(op, packed, codebook, bits)
    check_dtype(op, "codebook", codebook, (x.dtype,))
    check_device(op, "packed", packed, "x", x)
    k = packed.shape[1] * 8 // bits * codebook.shape[1]
    if x.shape[-1] != k:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., {k})")
    with _naming_codes(op, packed, codebook, bits):
        return library.run(x.reshape(-1, k), packed, codebook, bits).view(*x.shape[:-1], len(packed))


def decode(packed: Tensor, codebook: Tensor, *, bits: int) -> Tensor:
    """Return the weight (N, K) that `codebook_matmul` multiplies with, without a gradient; arguments and errors as there."""
    _check_weight("decode", packed, codebook, bits)
    with _naming_codes("decode", packed, codebook, bits):
        result: Tensor = library.decode_op(packed, codebook.detach(), bits)
    return result


@contextlib.contextmanager
def _naming_codes(op: str, packed: Tensor, codebook: Tensor, bits: int) -> Iterator[None]:
    """Say which code the codebook lacks, once the look-up has failed: no pass for what is rarely wrong."""
    try:
        yield
    except IndexError as error:
        found = int(unpack_codes(packed, bits).max())
        raise IndexError(f"{op}: packed has the code {found}, expected 0 to {len(codebook) - 1}") from error


def _check_weight(op: str, packed: Tensor, codebook: Tensor, bits: int) -> None:
    """Raise where codes and codebook do not belong together."""
    check_choice(op, "bits", bits, CODE_BITS)
    check_dtype(op, "packed", packed, (torch.uint8,))
    check_shape(op, "packed", packed, ("N", "bytes"))
    check_not_empty(op, "packed", packed)
    check_contiguous(op, "packed", packed)
    if packed.shape[1] * 8 % bits:
        raise ValueError(f"{op}: packed has {packed.shape[1]} bytes a row, expected a multiple of 2 for 16-bit codes")
    check_dtype(op, "codebook", codebook, FLOATS)
    check_shape(op, "codebook", codebook, ("entries", "dim"))
    check_range(op, "entries of the codebook", codebook.shape[0], 1, 2**bits)
    check_range(op, "dim of the codebook", codebook.shape[1], 1, MAX_DIM)
    check_device(op, "codebook", codebook, "packed", packed)
