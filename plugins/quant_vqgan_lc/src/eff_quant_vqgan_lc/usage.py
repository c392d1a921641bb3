"""How much of a codebook is in use.

    utilisation = share of the N entries that occur at least once,   perplexity = exp(-sum_j p_j log p_j)

over one pass of the training images or over the test images; counted by bincount, never by one-hot vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Usage:
    """How often each of `entries` entries has occurred."""

    def __init__(self, entries: int):
        self.entries = entries
        self.counts = torch.zeros(entries, dtype=torch.int64)

    def update(self, codes: Tensor) -> None:
        """Take in codes of any shape."""
        self.counts += torch.bincount(codes.detach().flatten(), minlength=self.entries).cpu()

    @property
    def tokens(self) -> int:
        """Codes seen."""
        return int(self.counts.sum())

    @property
    def utilisation(self) -> float:
        """Share of the entries that occurred, 0 to 1."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """Effective number of entries, 1 to N; 0 before any code."""
        if not self.tokens:
            return 0.0
        p = self.counts[self.counts > 0].double() / self.tokens
        return float((-(p * p.log()).sum()).exp())

    @property
    def entropy(self) -> float:
        """Bits per code that an ideal entropy coder would need; 0 before any code."""
        return float(torch.tensor(max(self.perplexity, 1.0), dtype=torch.float64).log2())
