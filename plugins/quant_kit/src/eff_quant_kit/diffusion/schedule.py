"""The noise schedule and one sampler step (Ho et al., 2020, arXiv:2006.11239; Song et al., 2021, arXiv:2010.02502).

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps                                     DDPM eq. 4, a_t the product of 1 - beta
x_s = sqrt(a_s) x_0' + sqrt(1 - a_s - sigma^2) eps' + sigma z               DDIM eq. 12
sigma = eta sqrt((1 - a_s) / (1 - a_t)) sqrt(1 - a_t / a_s)                 DDIM eq. 16; eta = 1 is DDPM
"""

from __future__ import annotations

import torch
from torch import Tensor


class Schedule:
    """Linear betas; cumulative products are kept in float64."""

    def __init__(self, steps: int = 100, beta_start: float = 1e-3, beta_end: float = 0.2):
        if steps < 1 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"need steps >= 1 and 0 < beta_start <= beta_end < 1, got {steps}, {beta_start}, {beta_end}"
            )
        self.steps = steps
        self.alphas = (1 - torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)).cumprod(0)

    def alpha(self, t: Tensor, like: Tensor) -> Tensor:
        """Return a_t in the dtype of `like`, shaped to multiply it; a_{-1} is 1."""
        known = torch.cat([self.alphas, torch.ones(1, dtype=torch.float64)])[t.cpu()]
        return known.to(like).view(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t for clean `x` (N, ...), `noise` like it and t (N,)."""
        a = self.alpha(t, x)
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def respaced(self, count: int) -> list[int]:
        """Return `count` timesteps from steps - 1 down to 0, evenly spaced.

        Raises:
            ValueError: more timesteps than there are.
        """
        if not 1 <= count <= self.steps:
            raise ValueError(f"sampler steps must be between 1 and {self.steps}, got {count}")
        return torch.linspace(self.steps - 1, 0, count, dtype=torch.float64).round().long().tolist()

    def step(
        self, x: Tensor, predicted: Tensor, t: int, to: int, eta: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """Return x at timestep `to` (-1: clean) from x at `t` and the noise predicted there."""
        a, b = self.alpha(torch.tensor([t]), x), self.alpha(torch.tensor([to]), x)
        clean = (x - (1 - a).sqrt() * predicted) / a.sqrt()
        sigma = eta * ((1 - b) / (1 - a) * (1 - a / b)).clamp(min=0).sqrt()
        out = b.sqrt() * clean + (1 - b - sigma**2).clamp(min=0).sqrt() * predicted
        if eta and to >= 0:
            if noise is None:
                raise ValueError("eta above 0 needs noise")
            out = out + sigma * noise
        return out
