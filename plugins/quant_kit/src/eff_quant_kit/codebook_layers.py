"""A linear layer whose weight is codes of a codebook, d consecutive inputs of a row each: eff_kernels.codebook_matmul."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff_kernels.codebook_matmul import codebook_matmul, pack_codes, unpack_codes
from eff_quant_kit.codebooks import decode
from eff_quant_kit.packed import Packed, packed_codes


def op_bits(k: int, columns: int) -> int:
    """Return the bits per code in memory, 4, 8 or 16: the fewest that hold k codes and fill whole bytes per row.

    Raises:
        ValueError: k is above 65536.
    """
    for bits in (4, 8, 16):
        if k <= 2**bits and columns * bits % 8 == 0:
            return bits
    raise ValueError(f"a codebook may have at most 65536 codewords, got {k}")


class CodebookLinear(nn.Module):
    """y = x @ W^T + bias with W[n, j d + t] = words[code[n, j], t]; words are the codebook, or codebook @ projection.

    Codebook, projection and bias train; the codes are fixed.
    """

    def __init__(self, codes: Tensor, codebook: Tensor, bias: Tensor | None = None, projection: Tensor | None = None):
        """Take the layer's parts.

        Args:
            codes: shape (out, in / d), integers below k.
            codebook: shape (k, d), or (k, r) with a projection.
            bias: shape (out,).
            projection: shape (r, d).
        """
        super().__init__()
        self.bits = op_bits(len(codebook), codes.shape[1])
        self.rows: Tensor
        self.register_buffer("rows", pack_codes(codes, self.bits))
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.projection = None if projection is None else nn.Parameter(projection.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def empty(
        cls, shape: tuple[int, int], k: int, d: int, bias: bool = True, rank: int | None = None
    ) -> CodebookLinear:
        """Return a layer of zeros for a weight of `shape` (out, in), to load a state into; `rank` makes a projection."""
        return cls(
            torch.zeros(shape[0], shape[1] // d, dtype=torch.int64),
            torch.zeros(k, rank or d),
            torch.zeros(shape[0]) if bias else None,
            torch.zeros(rank, d) if rank else None,
        )

    @property
    def codes(self) -> Tensor:
        """The codes, shape (out, in / d)."""
        return unpack_codes(self.rows, self.bits)

    def words(self) -> Tensor:
        """Return the codewords in weight space, (k, d)."""
        return self.codebook if self.projection is None else self.codebook @ self.projection

    def weight(self) -> Tensor:
        """Return the dense weight (out, in)."""
        return decode(self.codes, self.words()).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) for x (..., in)."""
        y = codebook_matmul(x, self.rows, self.words().to(x.dtype), bits=self.bits)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the layer: codes at ceil(log2 k) bits, codebook and projection in float16."""
        tables = {f"{prefix}codebook": self.codebook.detach()}
        if self.projection is not None:
            tables[f"{prefix}projection"] = self.projection.detach()
        return {f"{prefix}rows": packed_codes(self.codes, len(self.codebook), tables, op_bits=self.bits)}

    def extra_repr(self) -> str:
        """Return sizes for printing."""
        k, d = self.words().shape
        return f"in={self.rows.shape[1] * 8 // self.bits * d}, out={len(self.rows)}, k={k}, d={d}"
