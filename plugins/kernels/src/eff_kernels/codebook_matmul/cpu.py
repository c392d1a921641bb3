"""codebook_matmul on the CPU: some rows of the weight are decoded into the cache, multiplied, and forgotten.

An entry of 2, 4, 8 or 16 bytes is fetched as one number of that width, which is several times faster than as a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.codebook_matmul.reference import unpack_codes, widened

PIECE = 1 << 19
"""Weights decoded at a time: 2 MiB of float32."""
BFLOAT16_ROWS = 32
"""From here on a product in bfloat16 is faster than one in float32, which torch's small ones are."""
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype per width of an entry in bytes; only moved, never computed with."""


def decode(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the weight (N, K)."""
    codes = unpack_codes(packed, bits)
    codebook = codebook.contiguous()
    dtype = _WHOLE.get(codebook.shape[1] * codebook.element_size())
    if dtype is None:
        return torch.index_select(codebook, 0, codes.view(-1)).view(len(packed), -1)
    return (
        torch.index_select(codebook.view(dtype).view(-1), 0, codes.view(-1)).view(codebook.dtype).view(len(packed), -1)
    )


def forward(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    (m, k), n = x.shape, len(packed)
    dtype = product_dtype(m, x.dtype)
    columns, entries = x.to(dtype).t(), codebook.to(dtype)
    out = torch.empty(n, m, dtype=dtype)
    for here in _pieces(n, k):
        torch.mm(decode(packed[here], entries, bits), columns, out=out[here])
    return out.t().to(x.dtype).contiguous()


def backward_x(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    (m, n), k = grad.shape, packed.shape[1] * 8 // bits * codebook.shape[1]
    wide, entries = widened(grad), widened(codebook)
    out = wide.new_zeros(m, k)
    for here in _pieces(n, k):
        out.addmm_(wide[:, here], decode(packed[here], entries, bits))
    return out.to(grad.dtype)


def backward_codebook(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    """Return the gradient of the codebook (entries, dim), without ever holding that of the whole weight."""
    n, k = len(packed), x.shape[1]
    dim = k * bits // (packed.shape[1] * 8)
    wide, inputs = widened(grad).t(), widened(x)
    out = wide.new_zeros(entries, dim)
    for here in _pieces(n, k):
        out.index_add_(0, unpack_codes(packed[here], bits).view(-1).long(), (wide[here] @ inputs).view(-1, dim))
    return out.to(grad.dtype)


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _pieces(n: int, k: int) -> list[slice]:
    rows = max(1, PIECE // k)
    return [slice(start, start + rows) for start in range(0, n, rows)]
