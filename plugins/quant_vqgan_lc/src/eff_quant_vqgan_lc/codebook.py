"""Codebooks of N entries, and the search in them (VQGAN-LC, Zhu et al., NeurIPS 2024, arXiv:2406.11837).

    e = P(E)            N x d, the frozen table through a shared projector, anew in every pass
    a = argmin_j |z - e_j|^2,    z_q = e_a

Whichever entries are selected, their gradient moves the projector, and with it all entries. Baselines: entries that are
parameters themselves; fixed ones; ones that follow a moving average of their members; ones on the unit sphere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_kit.codebooks import nearest_codes
from eff_quant_vqgan_lc.config import VQGANLCConfig

EPS = 1e-5
"""Of Laplace smoothing."""
TINY = 1e-12
HIDDEN = 256
"""Width of the projector `mlp`."""


class Found(NamedTuple):
    """Latents (T, d) as they were compared, their entries (T, d) and the entries' indices (T,)."""

    z: Tensor
    z_q: Tensor
    codes: Tensor


class Codebook(nn.Module):
    """Entries P(E): a table, learned or not, and where there is one, a projector.

    Args:
        table: E, shape (N, width); without a projector width is d.
        learns: whether E is a parameter.
        projector: P, or None.
        normalised: compare on the unit sphere (factorized codes).
        chunk: entries of one block of distances.
    """

    def __init__(
        self,
        table: Tensor,
        learns: bool,
        projector: nn.Module | None = None,
        normalised: bool = False,
        chunk: int = 8192,
    ):
        super().__init__()
        self.table: Tensor
        if learns:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)
        self.projector = projector
        self.normalised, self.chunk = normalised, chunk

    def entries(self) -> Tensor:
        """Return what latents are compared with, (N, d)."""
        found = self.table if self.projector is None else self.projector(self.table)
        return F.normalize(found, dim=1) if self.normalised else found

    def forward(self, z: Tensor) -> Found:
        """Return the nearest entry of each latent of z (T, d), in float32: distances cancel in less."""
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1) if self.normalised else z.float()
            entries = self.entries().float()
            codes = self.search(z.detach(), entries.detach())
            return Found(z, F.embedding(codes, entries), codes)

    def search(self, z: Tensor, entries: Tensor) -> Tensor:
        """Return argmin_j |z - e_j| (T,), int64; ties go to the first, NaN goes anywhere."""
        if torch.compiler.is_exporting():  # one product, for any number of latents
            return torch.addmm(entries.square().sum(1), z, entries.t(), alpha=-2).argmin(1)
        return nearest_codes(z, entries, columns=self.chunk)[:, 0]

    @torch.no_grad()
    def match(self, z: Tensor) -> None:
        """Shift and scale the entries, by projector or table, to the mean and spread of latents (T, d) in each dimension."""
        entries = self.entries()
        scale = z.std(0) / entries.std(0).clamp(min=TINY)
        shift = z.mean(0) - scale * entries.mean(0)
        if self.projector is None:
            self.table.mul_(scale).add_(shift)
            return
        last = self.projector[-1] if isinstance(self.projector, nn.Sequential) else self.projector
        last.weight.mul_(scale[:, None])  # type: ignore[operator,union-attr]
        last.bias.mul_(scale).add_(shift)  # type: ignore[operator,union-attr]

    def finished(self) -> Codebook:
        """Return the same entries as a fixed table: what is shipped."""
        return Codebook(self.entries().detach().float().clone(), False, None, self.normalised, self.chunk)


class EMACodebook(Codebook):
    """Entries that are moving averages of the latents assigned to them.

    n_j <- decay n_j + (1 - decay) count_j,   m_j <- decay m_j + (1 - decay) sum of members
    e_j = m_j / ((n_j + eps) / (n + N eps) n),   n = sum of n_j

    n starts at 1 and m at the entries, so that they agree. (The reference starts n at 0, which throws unused entries far away.)
    """

    def __init__(self, table: Tensor, decay: float, chunk: int = 8192):
        super().__init__(table, learns=False, chunk=chunk)
        self.decay = decay
        self.register_buffer("counts", torch.ones(len(table), device=table.device))
        self.register_buffer("sums", table.clone())

    def forward(self, z: Tensor) -> Found:
        """Return the nearest entries; in training move them afterwards."""
        found = super().forward(z)
        if self.training and torch.is_grad_enabled():
            found = Found(found.z, found.z_q.clone(), found.codes)
            self.update(found.z.detach(), found.codes)
        return found

    def match(self, z: Tensor) -> None:
        """Do so, and let the sums follow."""
        super().match(z)
        self.sums.copy_(self.table)  # type: ignore[operator]

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Take in latents (T, d) and their codes (T,)."""
        counts: Tensor = self.counts  # type: ignore[assignment]
        sums: Tensor = self.sums  # type: ignore[assignment]
        entries = len(counts)
        counts.mul_(self.decay).add_(torch.bincount(codes, minlength=entries), alpha=1 - self.decay)
        sums.mul_(self.decay).index_add_(0, codes, z, alpha=1 - self.decay)
        total = counts.sum()
        self.table.copy_(sums / ((counts + EPS) / (total + entries * EPS) * total)[:, None])


def make_projector(kind: str, width: int, d: int) -> nn.Module:
    """Return P from `width` to d: a linear layer with bias, weight ~ N(0, d^-1/2) (std), or two layers."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, d))
    linear = nn.Linear(width, d)
    nn.init.normal_(linear.weight, std=d**-0.5)
    return linear


def principal_components(table: Tensor, d: int) -> Tensor:
    """Return the first d principal components (N, d) of the rows of `table` (N, width), without their mean."""
    centred = (table - table.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.t() @ centred)
    return (centred @ vectors.flip(1)[:, :d]).to(table.dtype)


def make_codebook(config: VQGANLCConfig, table: Tensor | None, entries: int) -> Codebook:
    """Return the codebook of a configuration; random ones come from torch's generator.

    Args:
        table: features (N, width), for the codebooks made of them.
        entries: N.
    """
    kind, d, chunk = config.codebook, config.code_dim, config.chunk
    if kind in ("frozen_features", "tuned_features"):
        assert table is not None
        learns = kind == "tuned_features"
        if config.projector == "none":
            return Codebook(principal_components(table, d), learns, chunk=chunk)
        return Codebook(table, learns, make_projector(config.projector, table.shape[1], d), chunk=chunk)
    if kind == "factorized":
        return Codebook(torch.randn(entries, d), True, normalised=True, chunk=chunk)
    random = torch.empty(entries, d).uniform_(-1 / entries, 1 / entries)
    if kind == "ema":
        return EMACodebook(random, config.ema_decay, chunk)
    return Codebook(random, kind == "random_tuned", chunk=chunk)
