"""Linear layers whose weights are codes of a normal codebook.

Jie, Wang, Deng: Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy, ICCV 2023,
arXiv:2307.16867.
    Z = (W - mu) / (sd + 1e-5),   Q = the codebook's value nearest to Z,   Wq = Q sd + mu,   y = x Wq^T
mu and sd are those of the whole matrix (sd unbiased) and carry gradients; the quantizer alone is straight-through.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import RunError

EPS = 1e-5
ROUNDS = 500


@functools.cache
def codebook(bits: int, kind: str = "l1_normal") -> tuple[Tensor, Tensor]:
    """Return the 2^bits values of a standard normal variable's quantizer and the borders between them, float64.

    l1_normal: alternate r_k = (v_k + v_{k+1}) / 2 and v_k = Phi^-1((P_k + P_{k+1}) / 2), the median of the cell, 500 times
    from zeros. l2_normal: the cell's mean instead of its median. uniform: evenly spaced up to the largest of l1_normal.
    """
    if kind == "uniform":
        largest = float(codebook(bits)[0][-1])
        values = torch.linspace(-largest, largest, 2**bits, dtype=torch.float64)
        return values, (values[:-1] + values[1:]) / 2
    values = torch.zeros(2**bits, dtype=torch.float64)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for _ in range(ROUNDS):
        borders = (values[:-1] + values[1:]) / 2
        cumulative = torch.cat([ends[:1], torch.special.ndtr(borders), ends[1:]])
        medians = torch.special.ndtri((cumulative[:-1] + cumulative[1:]) / 2)
        values = medians if kind == "l1_normal" else _means(borders, cumulative, medians)
    return values, (values[:-1] + values[1:]) / 2


def _means(borders: Tensor, cumulative: Tensor, medians: Tensor) -> Tensor:
    """Return the mean of a normal variable in each cell; the median where a cell is empty."""
    zero = borders.new_zeros(1)
    density = torch.cat([zero, (-borders.square() / 2).exp() / math.sqrt(2 * math.pi), zero])
    share = cumulative[1:] - cumulative[:-1]
    return torch.where(share > 1e-12, (density[:-1] - density[1:]) / share.clamp(min=1e-12), medians)


class QLinear(nn.Module):
    """A linear layer without bias whose weight (out, in) is `bits` bits an element, a mean and a deviation."""

    def __init__(self, inputs: int, outputs: int, bits: int, kind: str, *, small: bool):
        super().__init__()
        self.bits, self.kind = bits, kind
        self.name = ""
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.fixed: Tensor
        """Mean and deviation of a weight decoded from a file, which is computed with as it is; deviation 0: none."""
        self.register_buffer("fixed", torch.zeros(2))
        if not small:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        elif bits < 32:  # zeros have no spread to standardise
            nn.init.trunc_normal_(self.weight, std=0.001, a=-0.002, b=0.002)
        else:
            nn.init.zeros_(self.weight)

    @property
    def decoded_before(self) -> bool:
        """Whether the weight comes from a file."""
        return bool(self.fixed[1] > 0)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased standard deviation of the weight (those of the file where it is decoded), 0-dim.

        Raises:
            RunError: all weights are equal.
        """
        if self.decoded_before:
            return self.fixed[0], self.fixed[1]
        mu, sd = self.weight.mean(), self.weight.std()
        if not bool(sd > 0):
            raise RunError(
                f"quant_biadapter: the weights of {self.name or 'an adapter'} are all equal, nothing to standardise"
            )
        return mu, sd

    def codes(self) -> Tensor:
        """Return the index of each weight's value in the codebook, int64 (out, in)."""
        weight = self.weight.detach()
        if self.kind == "sign":
            return (weight >= 0).long()
        mu, sd = self.statistics()
        borders = codebook(self.bits, self.kind)[1].to(weight)
        return torch.bucketize((weight - mu.detach()) / (sd.detach() + EPS), borders)

    def decoded(self, codes: Tensor, mu: Tensor, sd: Tensor) -> Tensor:
        """Return the weight that codes, mean and deviation stand for; for `sign`, sd is mean|w|."""
        if self.kind == "sign":
            return (codes * 2 - 1) * sd
        return codebook(self.bits, self.kind)[0].to(sd)[codes] * sd + mu

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what is stored: codes, and the two numbers of `decoded`."""
        if self.kind == "sign":
            magnitude = self.fixed[1] if self.decoded_before else self.weight.detach().abs().mean()
            return self.codes(), torch.zeros(()), magnitude
        mu, sd = self.statistics()
        return self.codes(), mu.detach(), sd.detach()

    def effective(self) -> Tensor:
        """Return the weight that the layer computes with."""
        if self.bits == 32 or self.decoded_before:
            return self.weight
        if self.kind == "sign":
            magnitude = self.weight.abs().mean()
            hard = (self.codes() * 2 - 1) * magnitude
            return hard + (self.weight - self.weight.detach())
        mu, sd = self.statistics()
        z = (self.weight - mu) / (sd + EPS)
        values, borders = (part.to(z) for part in codebook(self.bits, self.kind))
        q = values[torch.bucketize(z.detach(), borders)]
        return (z + (q - z).detach()) * sd + mu

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., out) of x (..., in)."""
        return F.linear(x, self.effective().to(x.dtype))

    def extra_repr(self) -> str:
        """Return sizes for printing."""
        return f"in={self.weight.shape[1]}, out={self.weight.shape[0]}, bits={self.bits}"
