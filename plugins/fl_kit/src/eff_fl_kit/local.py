"""Local training that the methods share: clipped SGD with a correction, and the gradient at an ascent point.

    w <- w - lr [ clip(g + c) + (weight_decay + pull) w ]

c is constant over a client's steps. A proximal term (mu/2)|w - w_t|^2 is c = -mu w_t with pull = mu, so
that its part in w works like weight decay and lies outside the clipping, as in FL-Simulator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eff_fl_kit.flat import frozen_statistics

if TYPE_CHECKING:
    from eff.data import Batch
    from eff_fl_kit.protocol import Client

NORM_GUARD = 1e-7
"""Added to the norm of the ascent gradient and of a clipped one; a zero gradient gives no ascent."""


def descend(
    client: Client, correction: Tensor | None = None, pull: float = 0.0, ascent: float = 0.0, mix: float = 1.0
) -> None:
    """Do the client's local steps in place.

    Args:
        client: its model holds the starting point.
        correction: c, added to every gradient before the clipping; None for none.
        pull: factor of w added to the weight decay.
        ascent: radius rho of the ascent point; 0 takes the plain gradient.
        mix: share alpha of the gradient at the ascent point.
    """
    weights = client.model.weights
    decay = (client.run.train.weight_decay or 0.0) + pull
    limit = client.run.train.clip_norm or 0.0
    for batch in client.batches():
        loss, gradient = ascent_gradient(client, batch, ascent, mix)
        if correction is not None:
            gradient.add_(correction)
        if limit:
            gradient.mul_((limit / (torch.linalg.vector_norm(gradient) + NORM_GUARD)).clamp(max=1.0))
        gradient.add_(weights, alpha=decay)
        weights.sub_(gradient, alpha=client.lr)
        client.losses.append(loss)
        client.steps += 1


def ascent_gradient(client: Client, batch: Batch, radius: float, mix: float) -> tuple[Tensor, Tensor]:
    """Return the loss at w and (1 - mix) g(w) + mix g(w + e), e = radius g(w) / (|g(w)| + 1e-7), on one batch.

    The second pass leaves running statistics alone: they belong to w, and the batch is seen once.
    """
    loss, gradient = client.gradient(batch)
    if radius == 0.0 or mix == 0.0:
        return loss, gradient
    weights = client.model.weights
    start = weights.clone()
    plain = gradient.clone() if mix < 1.0 else None
    weights.add_(gradient * (radius / (torch.linalg.vector_norm(gradient) + NORM_GUARD)))
    with frozen_statistics(client.model.module):
        _, gradient = client.gradient(batch)
    weights.copy_(start)  # exactly back, before any correction is added
    if plain is not None:
        gradient.mul_(mix).add_(plain, alpha=1.0 - mix)
    return loss, gradient
