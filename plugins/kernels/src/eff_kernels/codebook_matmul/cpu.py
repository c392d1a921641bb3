"""codebook_matmul on the CPU: some rows of the weight are decoded into the cache, multiplied, and forgotten.

Few rows of x need no weight at all: the products of every slice of x with every entry are a small table, and a result is
the sum of those that its codes name (the asymmetric distances of product quantization, Jegou et al., 2011, sec. III).

An entry of 2, 4, 8 or 16 bytes is fetched as one number of that width, which is several times faster than as a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_kernels.codebook_matmul.reference import unpack_codes, widened

PIECE = 1 << 19
"""Weights decoded at a time: 2 MiB of float32."""
PRODUCT = 1 << 23
"""The same for bfloat16, 16 MiB: its products want many rows at a time, and an allocator reuses as much."""
TABLE_BYTES = 16
"""Shortest entry for which looking up products beats decoding: the shorter, the more look-ups."""
_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype per width of an entry in bytes; only moved, never computed with."""


def decode(packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return the weight (N, K)."""
    out = torch.empty(len(packed), packed.shape[1] * 8 // bits * codebook.shape[1], dtype=codebook.dtype)
    _decode(packed, codebook.contiguous(), bits, out)
    return out


def forward(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N)."""
    if takes_table(x, packed, codebook):
        return _from_table(x, packed, codebook, bits)
    dtype = product_dtype(x.dtype)
    inputs, out = x.to(dtype), torch.empty(len(x), len(packed), dtype=dtype)
    for here, weight in _pieces(packed, codebook.to(dtype), bits, PRODUCT if dtype == torch.bfloat16 else PIECE):
        out[:, here] = F.linear(inputs, weight)
    return out.to(x.dtype)


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


def takes_table(x: Tensor, packed: Tensor, codebook: Tensor) -> bool:
    """Whether x looks its products up: few look-ups, and a table that costs at most half the dense product."""
    entries, dim = codebook.shape
    return dim * product_dtype(x.dtype).itemsize >= TABLE_BYTES and len(x) <= dim and 2 * entries <= len(packed)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to multiply in; processors multiply float16 slowly."""
    return torch.float32 if dtype == torch.float16 else dtype


def _from_table(x: Tensor, packed: Tensor, codebook: Tensor, bits: int) -> Tensor:
    """Return x (M, K) times the transposed weight, (M, N), from the products of all slices of x with all entries."""
    (m, k), (entries, dim), n = x.shape, codebook.shape, len(packed)
    slices = widened(x).reshape(m, k // dim, dim).permute(1, 2, 0)
    table = (widened(codebook) @ slices).view(-1, m)
    first = torch.arange(0, len(table), entries, dtype=torch.int32)
    out = torch.empty(n, m, dtype=table.dtype)
    rows = max(1, PIECE // (k // dim))
    for start in range(0, n, rows):
        codes = unpack_codes(packed[start : start + rows], bits)
        if entries < 2**bits and int(codes.max()) >= entries:
            raise IndexError("a code would name the product of another slice")
        codes += first
        if m == 1:  # embedding_bag adds single numbers one by one
            out[start : start + rows, 0] = table.view(-1).index_select(0, codes.view(-1)).view(codes.shape).sum(1)
        else:
            out[start : start + rows] = F.embedding_bag(codes, table, mode="sum")
    return out.t().to(x.dtype).contiguous()


def _slices(n: int, k: int, piece: int = PIECE) -> list[slice]:
    rows = max(1, piece // k)
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _pieces(packed: Tensor, codebook: Tensor, bits: int, piece: int = PIECE) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of the weight, each time in the same memory: fresh pages would cost as much as the decoding."""
    k = packed.shape[1] * 8 // bits * codebook.shape[1]
    codebook, slices = codebook.contiguous(), _slices(len(packed), k, piece)
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
