"""Threat models: which images x' an attack may show in the place of x.

Linf: |x' - x|_inf <= eps; L2: |x' - x|_2 <= eps over all pixels and channels; always x' in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from eff_adv_kit.draws import Draws

Norm = Literal["linf", "l2"]
_TINY = 1e-12


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values (N,) shaped to multiply `like` (N, ...)."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def l2_norm(x: Tensor) -> Tensor:
    """Return the Euclidean length of each sample, (N,)."""
    return x.flatten(1).norm(dim=1)


@dataclass(frozen=True)
class Threat:
    """A ball of radius `eps` in a norm, cut with the box [0, 1]."""

    norm: Norm = "linf"
    eps: float = 8 / 255

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the allowed image near `x_adv`: first into the ball, then into the box.

        For Linf this is the nearest one. For L2 the cut with the box comes second; it only brings the image
        nearer to `x`, which lies in the box.
        """
        if self.norm == "linf":
            return torch.maximum(torch.minimum(x_adv, x + self.eps), x - self.eps).clamp(0, 1)
        return (x + self.into_ball(x_adv - x)).clamp(0, 1)

    def into_ball(self, delta: Tensor) -> Tensor:
        """Return the perturbation of allowed size nearest to `delta`."""
        if self.norm == "linf":
            return delta.clamp(-self.eps, self.eps)
        return delta * per_sample((self.eps / l2_norm(delta).clamp(min=_TINY)).clamp(max=1), delta)

    def direction(self, gradient: Tensor) -> Tensor:
        """Return the steepest direction of size 1: the sign, or the gradient over its length (0 stays 0)."""
        if self.norm == "linf":
            return gradient.sign()
        # The largest entry is taken out first: squares of gradients below 1e-19 underflow in float32.
        scaled = gradient / per_sample(
            gradient.flatten(1).abs().amax(1).clamp(min=torch.finfo(gradient.dtype).tiny), gradient
        )
        return scaled / per_sample(l2_norm(scaled).clamp(min=_TINY), scaled)

    def random_start(self, x: Tensor, draws: Draws, name: str, clamp: bool = True) -> Tensor:
        """Return images drawn uniformly from the ball, cut to the box unless `clamp` is false."""
        shape = tuple(x.shape[1:])
        if self.norm == "linf":
            start = x + (self.eps * (2 * draws.uniform(name, shape) - 1)).to(x.dtype)
        else:
            noise = draws.normal(name, shape).to(x.dtype)
            share = draws.uniform(f"{name}/share", (1,))[:, 0].to(x.dtype) ** (1 / x[0].numel())
            start = x + self.eps * self.direction(noise) * per_sample(share, x)
        return start.clamp(0, 1) if clamp else start

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the size of each perturbation, (N,)."""
        delta = (x_adv - x).flatten(1)
        return delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)
