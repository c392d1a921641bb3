"""A linear layer whose sub-vectors mix a few codewords, until each has settled on one.

Deng, Li, Wang, Gu, Xu, Huang: VQ4DiT, AAAI 2025, arXiv:2408.17131.
    w_n ~ sum_j R_nj C[A_nj],   R = softmax(z),   A_n the nearest codewords
    z_j = ln(D_last / (D_j + 1e-5)), z_last = 0: the ratios start in proportion to 1 / distance
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.codebooks import kmeans, nearest
from eff_quant_kit.packed import in_half_precision

CERTAIN = 1e4
"""Logit of the codeword that a frozen sub-vector keeps."""
NEAR = 1e-5


class SoftLinear(nn.Module):
    """A linear layer while its codes are being chosen."""

    def __init__(self, shape: tuple[int, int], k: int, d: int, candidates: int, bias: bool):
        """Make a layer of zeros for a weight of `shape` (out, in), to fill or to load a state into."""
        super().__init__()
        rows = shape[0] * shape[1] // d
        self.shape = shape
        self.candidates: Tensor
        self.frozen: Tensor
        self.hard: Tensor
        self.register_buffer("candidates", torch.zeros(rows, candidates, dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros(rows, dtype=torch.bool))
        self.register_buffer("hard", torch.zeros((), dtype=torch.bool))
        self.logits = nn.Parameter(torch.zeros(rows, candidates))
        self.codebook = nn.Parameter(torch.zeros(k, d))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    @classmethod
    @torch.no_grad()
    def of(
        cls, layer: nn.Linear, k: int, d: int, candidates: int, rounds: int, generator: torch.Generator
    ) -> SoftLinear:
        """Return `layer` with a k-means codebook and the nearest codewords of each sub-vector as candidates."""
        made = cls((layer.out_features, layer.in_features), k, d, candidates, layer.bias is not None).to(
            layer.weight.device
        )
        points = layer.weight.detach().reshape(-1, d)
        made.codebook.copy_(kmeans(points, k, rounds, generator)[0])
        distances, codes = nearest(points, made.codebook, candidates)
        made.candidates.copy_(codes)
        made.logits.copy_((distances[:, -1:].clamp(min=NEAR) / (distances + NEAR)).log())
        made.logits[:, -1] = 0
        if made.bias is not None:
            made.bias.copy_(layer.bias)
        if candidates == 1:
            made.settle()
        return made

    def ratios(self) -> Tensor:
        """Return R (N, candidates)."""
        return self.logits.softmax(1)

    def codes(self) -> Tensor:
        """Return the likeliest code of each sub-vector, int64 (N,)."""
        return self.candidates.gather(1, self.logits.detach().argmax(1, keepdim=True))[:, 0]

    def weight(self) -> Tensor:
        """Return the dense weight (out, in)."""
        if bool(self.hard):
            return self.codebook[self.codes()].view(self.shape)
        return (self.ratios()[..., None] * self.codebook[self.candidates]).sum(1).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) of x (..., in)."""
        return F.linear(x, self.weight(), self.bias)

    def ratio_loss(self) -> Tensor:
        """Return n_cand times the mean of R (1 - R) over the sub-vectors that have not settled."""
        r = self.ratios()[~self.frozen]
        return r.shape[1] * (r * (1 - r)).mean() if len(r) else r.sum()

    @torch.no_grad()
    def freeze(self, row: float, layer: float) -> None:
        """Freeze sub-vectors whose largest ratio is above `row`; the layer where more than the share `layer` has been."""
        if bool(self.hard):
            return
        self.frozen |= self.ratios().amax(1) > row
        self._pin()
        if float(self.frozen.float().mean()) > layer:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Give every sub-vector its likeliest codeword."""
        self.frozen.fill_(True)
        self.hard.fill_(True)
        self._pin()
        self.logits.requires_grad_(False)

    def _pin(self) -> None:
        chosen = F.one_hot(self.logits.argmax(1), self.logits.shape[1]) * CERTAIN
        self.logits.copy_(torch.where(self.frozen[:, None], chosen.to(self.logits.dtype), self.logits))

    @torch.no_grad()
    def finished(self) -> CodebookLinear:
        """Return the layer as codes and a codebook that float16 holds."""
        codes = self.codes().view(self.shape[0], -1)
        return CodebookLinear(codes, in_half_precision(self.codebook), self.bias)
