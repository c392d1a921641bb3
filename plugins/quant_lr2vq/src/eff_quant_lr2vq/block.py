"""The block of LR2VQ (Zhu, Zhou, Zhong, IJCNN 2023, arXiv:2211.11397): s_n ~ P^T b_n for groups of m weights.

A sub-vector s_n is m consecutive outputs (or inputs) at one input (output) and kernel position; b_n has d <= m entries and
P (d, m) is shared by the layer. Along outputs the block is two layers with nothing in between: a convolution with d outputs
per group, which holds b, and a grouped 1x1 convolution with P^T, after which the layer's bias is added.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.codebooks import decode, kmeans, nearest
from eff_quant_kit.packed import Packed, in_half_precision, packed_codes
from eff_quant_lr2vq.config import LR2VQConfig
from eff_quant_lr2vq.dkm import dkm, straight_through
from eff_quant_lr2vq.rank import spectrum

POINTWISE: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
MOST_DISTANCES = 1 << 24
"""Above this many sub-vectors times codewords, "auto" assigns hard: every round keeps that many values for backward."""


def to_groups(weight: Tensor, m: int, axis: str) -> Tensor:
    """Return a weight (out, in, ...) as (out / m, in, ..., m), or along the inputs as (out, in / m, ..., m)."""
    dim = 0 if axis == "out" else 1
    shape = weight.shape
    return weight.reshape(*shape[:dim], -1, m, *shape[dim + 1 :]).movedim(dim + 1, -1)


def from_groups(groups: Tensor, axis: str) -> Tensor:
    """Undo `to_groups` for any length of the last dimension."""
    dim = 0 if axis == "out" else 1
    return groups.movedim(-1, dim + 1).flatten(dim, dim + 1)


class Factored(nn.Module):
    """A convolution or linear layer computed from b and P; without P (d = m) b are the sub-vectors themselves."""

    def __init__(self, layer: nn.Module, m: int, axis: str, projection: Tensor | None):
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.register_parameter("weight", None)
        self.m, self.axis = m, axis
        self.projection = None if projection is None else nn.Parameter(projection.detach().clone())

    def representation(self) -> Tensor:
        """Return b as (..., d), in the layout of `to_groups`."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Return the dense weight."""
        b = self.representation()
        return from_groups(b if self.projection is None else b @ self.projection, self.axis)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output: through the two thin layers where that is possible."""
        bias: Tensor | None = self.layer.bias  # type: ignore[assignment]
        if self.projection is None or self.axis == "in":
            return self._product(x, self.weight(), bias)
        thin = self._product(x, from_groups(self.representation(), "out"), None)
        d, m = self.projection.shape
        if isinstance(self.layer, nn.Linear):
            y = (thin.view(*thin.shape[:-1], -1, d) @ self.projection).flatten(-2)
            return y if bias is None else y + bias
        groups = thin.shape[1] // d
        taps = self.projection.t().repeat(groups, 1).view(groups * m, d, *[1] * (thin.ndim - 2))
        return POINTWISE[thin.ndim](thin, taps, bias, groups=groups)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)
        output: Tensor = self.layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output


class LowRank(Factored):
    """The block while it trains: stage 1 with b free, stage 2 with b clustered in every forward pass."""

    def __init__(self, layer: nn.Module, m: int, d: int, k: int, config: LR2VQConfig):
        """Start from the least-squares optimum for d: P the first eigenvectors of the second moment, b = s P^T."""
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        groups = to_groups(weight, m, config.group_axis)
        projection = spectrum(groups.reshape(-1, m))[1][:d] if d < m else None
        super().__init__(layer, m, config.group_axis, projection)
        self.config = config
        self.b = nn.Parameter(groups.contiguous() if projection is None else groups @ projection.t())
        self.codebook = nn.Parameter(torch.zeros(k, d, device=weight.device, dtype=weight.dtype))
        self.unit: Tensor
        self.register_buffer("unit", torch.zeros((), device=weight.device))
        """Mean distance to the nearest codeword when clustering began; 0 before."""
        self.tau = config.tau_end

    @property
    def is_soft(self) -> bool:
        """Whether sub-vectors attend to all codewords."""
        if self.config.assignment == "auto":
            return self.sub_vectors().shape[0] * len(self.codebook) <= MOST_DISTANCES
        return self.config.assignment == "soft"

    def sub_vectors(self) -> Tensor:
        """Return b as (N, d)."""
        return self.b.flatten(0, -2)

    @torch.no_grad()
    def start_clustering(self, generator: torch.Generator) -> None:
        """Make the first codebook by k-means."""
        self.orthonormalise()
        points = self.sub_vectors()
        codebook, _ = kmeans(points, len(self.codebook), self.config.kmeans_iterations, generator)
        self.codebook.copy_(codebook)
        self.unit.copy_(nearest(points, codebook)[0].mean().clamp(min=1e-6))

    def representation(self) -> Tensor:
        """Return b: free, clustered softly in training, and as hard codewords otherwise."""
        if not bool(self.unit):
            return self.b
        points = self.sub_vectors()
        if not self.training:
            return decode(nearest(points.detach(), self.codebook.detach())[1][:, 0], self.codebook).view(self.b.shape)
        if not self.is_soft:
            return straight_through(points, self.codebook).view(self.b.shape)
        clustered, codebook = dkm(
            points, self.codebook.detach().clone(), self.tau * self.unit, self.config.dkm_rounds, self.config.dkm_eps
        )
        with torch.no_grad():
            self.codebook.copy_(codebook)
        return clustered.view(self.b.shape)

    @torch.no_grad()
    def orthonormalise(self) -> None:
        """Make the rows of P orthonormal without changing the weight: b takes the other factor.

        (b / s, s P) is the same weight for any s, so distances and temperatures would drift with training.
        """
        if self.projection is None:
            return
        q, r = torch.linalg.qr(self.projection.t())
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0)  # a factor near the identity keeps the optimiser's state valid
        q, r = q * signs, r * signs[:, None]
        self.projection.copy_(q.t())
        self.b.copy_(self.b @ r.t())
        self.codebook.copy_(self.codebook @ r.t())

    @torch.no_grad()
    def harden(self) -> nn.Module:
        """Return the layer with codes, codebook and projection as the file holds them.

        Along the inputs a linear layer becomes one that multiplies with its codes.
        """
        self.orthonormalise()
        codebook = in_half_precision(self.codebook)
        projection = None if self.projection is None else in_half_precision(self.projection)
        codes = nearest(self.sub_vectors(), codebook)[1].view(self.b.shape[:-1])
        if isinstance(self.layer, nn.Linear) and self.axis == "in":
            return CodebookLinear(codes, codebook, self.layer.bias, projection)
        return Coded(self, codes, codebook, projection)

    @torch.no_grad()
    def clustering_error(self) -> float:
        """Return the mean squared distance of b to its codewords."""
        return float(nearest(self.sub_vectors(), self.codebook)[0].square().mean())


class Coded(Factored):
    """The finished block: b are codes of a codebook."""

    def __init__(self, block: Factored, codes: Tensor, codebook: Tensor, projection: Tensor | None):
        super().__init__(block.layer, block.m, block.axis, projection)
        self.codebook = nn.Parameter(codebook.detach().clone())
        self.codes: Tensor
        self.register_buffer("codes", codes.to(torch.uint8 if len(codebook) <= 256 else torch.int16))

    def representation(self) -> Tensor:
        """Return b."""
        return decode(self.codes, self.codebook)

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the block: codes at ceil(log2 k) bits, codebook and projection in float16."""
        tables = {f"{prefix}codebook": self.codebook.detach()}
        if self.projection is not None:
            tables[f"{prefix}projection"] = self.projection.detach()
        return {f"{prefix}codes": packed_codes(self.codes, len(self.codebook), tables)}

    @classmethod
    def empty(cls, layer: Any, m: int, d: int, k: int, axis: str) -> Coded:
        """Return a block of zeros in the structure of `harden`, to load a state into."""
        weight: Tensor = layer.weight
        codes = torch.zeros(to_groups(weight, m, axis).shape[:-1], dtype=torch.int64, device=weight.device)
        block = Factored(layer, m, axis, None)
        projection = torch.zeros(d, m, device=weight.device) if d < m else None
        return cls(block, codes, torch.zeros(k, d, device=weight.device), projection)
