"""FAB-T: the nearest adversarial image, one target class at a time (Croce and Hein, ICML 2020, arXiv:1907.02044).

At x_i the boundary between label and target is taken as the hyperplane {z : w (z - x_i) + b = 0}, with w and b
the gradient and the value of z_t - z_y. With d_i and d_0 the smallest moves inside [0, 1] from x_i and from the
clean x onto it,

    alpha = min(|d_i| / (|d_i| + |d_0|), 0.1)
    x_{i+1} = clip((1 - alpha) (x_i + 1.05 d_i) + alpha (x + 1.05 d_0))

and an adversarial x_{i+1} nearer than the best so far is kept, then the search goes on from x + 0.9 (x_{i+1} - x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_adv_kit.apgd import for_each_target
from eff_adv_kit.classifier import Classifier
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.losses import logit_margin_targeted
from eff_adv_kit.threat import Norm, Threat, per_sample

ALPHA_MAX = 0.1
OVERSHOOT = 1.05  # eta
BACKWARD = 0.9  # beta
_TINY = 1e-12


def to_hyperplane(x: Tensor, w: Tensor, b: Tensor, norm: Norm) -> Tensor:
    """Return the smallest d with w (x + d) + b = 0 and x + d in [0, 1]; nearest to it where none is.

    Each coordinate moves towards the plane until it meets the box. Coordinate i gains rate_i per unit of
    the multiplier up to its cap, so the total is piecewise linear in it and one sort finds the root. The
    multiplier is the common move (Linf) or the factor of |w_i| (L2).

    Args:
        x: points in the box, (N, D).
        w: normals, (N, D).
        b: offsets, (N,).
        norm: which length of d is smallest.
    """
    x, w, b = x.double(), w.double(), b.double()
    need = -((w * x).sum(1) + b)  # what w d must be
    sign = w.sign() * need.sign()[:, None]
    room = torch.where(sign > 0, 1 - x, x).clamp(min=0)
    size = w.abs()
    rate = size if norm == "linf" else size * size
    meets = room if norm == "linf" else torch.where(size > 0, room / size.clamp(min=_TINY), 0)
    meets, order = meets.sort(1)
    cap = (size * room).gather(1, order).cumsum(1)
    rate = rate.gather(1, order)
    rest = rate.flip(1).cumsum(1).flip(1)  # rate of the coordinates that are still free before each meeting
    reached = torch.cat([torch.zeros_like(cap[:, :1]), cap[:, :-1]], 1) + rest * meets  # gain at each meeting
    need = need.abs()[:, None]
    at = torch.searchsorted(reached, need).clamp(max=x.shape[1] - 1)
    before = torch.where(at > 0, cap.gather(1, (at - 1).clamp(min=0)), 0)
    multiplier = (need - before) / rest.gather(1, at).clamp(min=_TINY**2)
    move = multiplier if norm == "linf" else multiplier * size
    return sign * torch.minimum(move.expand_as(room), room)


@dataclass
class Search:
    """The nearest adversarial images found so far, of a working batch."""

    x: Tensor
    y: Tensor
    best: Tensor
    distance: Tensor
    """Length of best - x; infinite where none was found."""


def search_boundary(
    classifier: Classifier, norm: Norm, x: Tensor, y: Tensor, target: Callable[[], Tensor], steps: int,
    found: Callable[[Search], Tensor] | None = None,
) -> Search:  # fmt: skip
    """Search the nearest adversarial image of each sample towards its target class.

    Args:
        classifier: the model.
        norm: which distance is small.
        x: clean images.
        y: labels.
        target: gives the target classes of the samples that are still searched.
        steps: gradients per sample.
        found: called after each step; returns the mask of the samples to go on with.
    """
    length = Threat(norm).distance
    state = Search(x, y, x.clone(), torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device))
    x_i = x
    for _ in range(steps):
        if not len(x_i):
            break
        t, y = target(), state.y
        logits, w = classifier.gradient(x_i, lambda z, y=y, t=t: logit_margin_targeted(z, y, t))
        value = logit_margin_targeted(logits, y, t)
        shape, flat, clean = x_i.shape, x_i.flatten(1), state.x.flatten(1)
        b = value.double() - (w.flatten(1).double() * flat.double()).sum(1)
        both = to_hyperplane(
            torch.cat([flat, clean]), w.flatten(1).repeat(2, 1), b.repeat(2), norm
        ).to(x_i.dtype)  # fmt: skip
        d_i, d_0 = (part.view(shape) for part in both.chunk(2))
        a_i, a_0 = length(d_i, torch.zeros_like(d_i)), length(d_0, torch.zeros_like(d_0))
        alpha = per_sample((a_i / (a_i + a_0).clamp(min=_TINY)).clamp(max=ALPHA_MAX), x_i)
        x_i = ((1 - alpha) * (x_i + OVERSHOOT * d_i) + alpha * (state.x + OVERSHOOT * d_0)).clamp(0, 1)
        broken = classifier.logits(x_i).argmax(1) != y
        distance = length(x_i, state.x)
        nearer = broken & (distance < state.distance)
        state.best = torch.where(per_sample(nearer, x_i), x_i, state.best)
        state.distance = torch.where(nearer, distance, state.distance)
        x_i = torch.where(per_sample(broken, x_i), state.x + BACKWARD * (x_i - state.x), x_i)
        if found is not None:
            on = found(state)
            x_i = x_i[on]
            state = Search(state.x[on], state.y[on], state.best[on], state.distance[on])
    return state


@dataclass(frozen=True)
class TargetedFAB:
    """FAB-T: a sample is broken where the nearest adversarial image found lies in the ball."""

    steps: int = 100
    targets: int = 9
    name: str = "fab_t"

    def ticks(self, classes: int) -> int:
        """Return the gradients per sample."""
        return self.steps * min(self.targets, classes - 1)

    def __call__(self, classifier: Classifier, threat: Threat, hunt: Hunt) -> None:
        """Attack the working batch."""

        def towards(rank: int, target: Callable[[], Tensor]) -> None:
            search_boundary(
                classifier, threat.norm, hunt.x, hunt.y, target, self.steps,
                lambda state: hunt.drop(state.best, state.distance <= threat.eps),
            )  # fmt: skip

        for_each_target(classifier, hunt, self.targets, towards)
