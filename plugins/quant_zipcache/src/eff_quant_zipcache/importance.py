"""How salient a token is: the attention it receives from a few probes, averaged over those that see it.

    p_i = sum over probes r of A[r, i],   p~_i = p_i / nnz_i,   nnz_i = number of probes whose mask admits i

with A = softmax(Q K^T * scale + mask) in float32. The sum alone favours early tokens, which more queries see. Probes are
the newest queries and some drawn from the earlier ones with replacement (the paper's formula; the released code divides by
the number of *all* queries that see a token, which with probes favours late ones: `nnz="full"`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eff_quant_zipcache.config import ZipCacheConfig


@dataclass(frozen=True)
class Probes:
    """Which queries are asked."""

    rows: Tensor
    """(batch, n) int64; positions among the queries."""
    used: Tensor
    """(batch, n) bool; sequences with fewer tokens have fewer probes."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: all `stored` ones, and of the new ones what `visible` says.

    Args:
        stored: keys from before the queries that are no padding, (batch, old) bool.
        present: queries that are no padding, (batch, queries) bool.
        visible: (batch, queries, queries) bool; None: causal, no padding. So the plain case makes no square matrix.
    """

    stored: Tensor
    present: Tensor
    visible: Tensor | None = None

    def rows(self, rows: Tensor) -> Tensor:
        """Return the mask of some queries (batch, n): (batch, n, old + queries) bool."""
        new = self.present.shape[1]
        if self.visible is None:
            seen = torch.arange(new, device=rows.device) <= rows[..., None]
        else:
            seen = self.visible.gather(1, rows[..., None].expand(-1, -1, new))
        both = torch.cat([self.stored[:, None].expand(-1, rows.shape[1], -1), seen], 2)
        return both & self.present.gather(1, rows)[..., None]

    def per_column(self) -> Tensor:
        """Return how many queries see a key, (batch, old + queries)."""
        if self.visible is None:
            seen = torch.arange(self.present.shape[1], 0, -1, device=self.present.device).expand(self.present.shape)
        else:
            seen = (self.visible & self.present[..., None]).sum(1)
        return torch.cat([self.stored * self.present.sum(1, keepdim=True), seen], 1)


def choose_probes(present: Tensor, recent: float, random: float, generator: torch.Generator) -> Probes:
    """Return int(recent L) newest rows and int(random L) of the earlier ones, at least one of each that is asked for.

    Args:
        present: which queries are no padding, (batch, queries) bool; L counts those.
        recent: share of the newest.
        random: share drawn from the earlier ones, with replacement.
        generator: CPU.
    """
    count = present.sum(1)  # L

    def share(part: float) -> Tensor:
        n = (count.double() * part).floor().long()
        return n.clamp(min=1).minimum(count) if part > 0 else torch.zeros_like(n)

    newest = share(recent)
    earlier = count - newest
    drawn = share(random).minimum(torch.where(earlier > 0, count, 0))
    n_newest, n_drawn = int(newest.max()), int(drawn.max())
    step = torch.arange(n_newest, device=present.device)
    uniform = torch.rand(len(present), n_drawn, generator=generator, dtype=torch.float64).to(present.device)
    local = torch.cat([count[:, None] - 1 - step, (uniform * earlier[:, None]).long()], 1)
    used = torch.cat([step < newest[:, None], torch.arange(n_drawn, device=present.device) < drawn[:, None]], 1)
    order = present.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices  # places of the L queries
    return Probes(order.gather(1, local.clamp(0, present.shape[1] - 1)), used)


def all_rows(present: Tensor) -> Probes:
    """Return every query, which makes the score that of the full attention matrix."""
    return Probes(torch.arange(present.shape[1], device=present.device).expand(present.shape), present)


def importance(query: Tensor, keys: Tensor, mask: Mask, probes: Probes, scale: float, config: ZipCacheConfig) -> Tensor:
    """Return the score of each token, (batch, heads, length) float32; infinite where no probe sees it.

    Args:
        query: all queries, (batch, query heads, queries, dim); with grouped queries, heads that read the same keys are
            summed.
        keys: (batch, heads, length, dim).
        mask: of the queries over the keys.
        probes: which queries are asked.
        scale: of the scores.
        config: metric and nnz.
    """
    seen = mask.rows(probes.rows) & probes.used[..., None]
    place = probes.rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
    grouped = query.gather(2, place).unflatten(1, (keys.shape[1], -1)).float()
    scores = torch.einsum("bhgrd,bhld->bhgrl", grouped, keys.float()) * scale
    attention = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    received = attention.nan_to_num(0.0).sum((2, 3))  # a row that sees nothing gives nothing
    if config.metric == "accumulated":
        return received
    nnz = (seen.sum(1) if config.nnz == "probe" else mask.per_column())[:, None]
    return torch.where(nnz > 0, received / nnz.clamp(min=1), torch.inf)


def least(score: Tensor, present: Tensor, ratio: float, per_head: bool) -> Tensor:
    """Return the int(ratio L) tokens of each head with the smallest scores, (batch, heads, length) bool.

    Args:
        score: (batch, heads, length).
        present: which tokens are no padding, (batch, length) bool; L counts those.
        ratio: share of the tokens.
        per_head: heads choose for themselves; false: by the mean of their scores, all alike.
    """
    shape = score.shape
    if not per_head:
        score = score.mean(1, keepdim=True)
    count = (present.sum(1).double() * ratio).floor().long()
    # Padding is ranked behind everything, also behind tokens that no probe sees.
    order = score.masked_fill(~present[:, None], torch.nan).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(shape[-1], device=score.device).expand_as(order))
    return (rank < count[:, None, None]).expand(shape)
