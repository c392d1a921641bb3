"""codebook_matmul on the CPU: some rows of the weight are decoded into the cache, multiplied, and forgotten.

An entry of 2, 4, 8 or 16 bytes is fetched as one number of that width, which is several times faster than as a row.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits * codebook.shape[1], dtype=codebook.dtype)
    _decode(packed, codebook.contiguous(), bits, out)
    return out


def forward(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    dtype = product_dtype(len(x), x.dtype)
    columns = x.to(dtype).t()
    out = torch.empty(len(packed), len(x), dtype=dtype)
    for here, weight in _pieces(packed, codebook.to(dtype), bits):
        torch.mm(weight, columns, out=out[here])
    return out.t().to(x.dtype).contiguous()


def backward_x(grad: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the gradient of x, (M, K), from that of the result, (M, N)."""
    wide = widened(grad)
    out = wide.new_zeros(len(grad), packed.shape[1] * 8 // bits * codebook.shape[1])
    for here, weight in _pieces(packed, widened(codebook), bits):
        out.addmm_(wide[:, here], weight)
    return out.to(grad.dtype)


def backward_codebook(grad: Tensor, x: Tensor, packed: Tensor, entries: int, bits: int) -> Tensor:
    """Return the gradient of the codebook (entries, dim), without ever holding that of the whole weight."""
    dim = x.shape[1] * bits // (packed.shape[1] * 8)
    wide, inputs = widened(grad).t(), widened(x)
    out = wide.new_zeros(entries, dim)
    for here in _slices(len(packed), x.shape[1]):
        out.index_add_(0, unpack_codes(packed[here], bits).view(-1).long(), (wide[here] @ inputs).view(-1, dim))
    return out.to(grad.dtype)


def product_dtype(m: int, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly, bfloat16 fast."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and m < BFLOAT16_ROWS):
        return torch.float32
    return dtype


def _slices(n: int, k: int) -> list[slice]:
    rows = max(1, PIECE // k)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _pieces(packed: Tensor, codebook: Tensor, bits: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the weight, each time in the same memory: fresh pages would cost as much as the decoding."""
    k = packed.shape[1] * 8 // bits * codebook.shape[1]
    codebook, slices = codebook.contiguous(), _slices(len(packed), k)
    buffer = torch.empty(slices[0].stop, k, dtype=codebook.dtype)
    for here in slices:
        weight = buffer[: here.stop - here.start]
        _decode(packed[here], codebook, bits, weight)
        yield here, weight


def _decode(packed: Tensor, codebook: Tensor, bits: int, out: Tensor) -> None:
    """Write the weight of the packed rows to `out`."""
    codes = unpack_codes(packed, bits).view(-1)
    whole = _WHOLE.get(codebook.shape[1] * codebook.element_size())
    if whole is None:
        torch.index_select(codebook, 0, codes, out=out.view(-1, codebook.shape[1]))
    else:
        torch.index_select(codebook.view(whole).view(-1), 0, codes, out=out.view(-1).view(whole))
