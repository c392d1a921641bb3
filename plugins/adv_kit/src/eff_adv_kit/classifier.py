"""A model as attacks see it: images in [0, 1] to logits, with gradients, and everything counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eff.errors import DataError, RunError, UnsupportedModelError
from eff_adv_kit.losses import CLASSES_NEEDED, CLASSES_NEEDED_TARGETED

if TYPE_CHECKING:
    from eff.run import Run

Objective = Callable[[Tensor], Tensor]
"""Logits (N, K) -> values to raise (N,)."""


class Classifier:
    """Logits and input gradients of a model.

    Args:
        forward: images (N, C, H, W) in [0, 1] -> logits (N, K); normalises by itself.
        eot: forward passes that are averaged, for randomised models (Athalye et al., ICML 2018).
        eight_bit: show the model images rounded to 256 levels; gradients pass the rounding unchanged.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], eot: int = 1, eight_bit: bool = False):
        self._forward = forward
        self.eot = eot
        self.eight_bit = eight_bit
        self.forwards = 0
        """Images passed forward so far, those with a gradient included."""
        self.gradients = 0
        """Images passed backward so far."""
        self.tick: Callable[[], None] = lambda: None
        """Called at every gradient or query of an attack; progress hangs here."""

    def _once(self, x: Tensor) -> Tensor:
        """Return the logits of one forward pass."""
        if self.eight_bit:
            x = x + ((x * 255).round() / 255 - x).detach()
        logits = self._forward(x).to(x.dtype)  # half precision would tie small differences
        self.forwards += len(x)
        if logits.ndim != 2:
            raise UnsupportedModelError(
                f"the model returns a tensor of shape {tuple(logits.shape)}; attacks need logits (N, classes)"
            )
        if not bool(torch.isfinite(logits.detach()).all()):
            raise RunError("the model returned NaN or infinite logits; attacks need finite ones")
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (N, K) without a gradient, averaged over `eot` passes."""
        with torch.no_grad():
            total = self._once(x)
            for _ in range(self.eot - 1):
                total = total + self._once(x)
            return total / self.eot

    def query(self, x: Tensor) -> Tensor:
        """Return logits (N, K); one step of an attack that needs no gradient."""
        self.tick()
        return self.logits(x)

    def gradient(self, x: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        """Return logits (N, K) and the gradient of each sample's objective in its image.

        Both are averaged over `eot` passes. The gradient is 0 where none flows back (a model cut off by
        rounding) and where it is not finite.
        """
        self.tick()
        self.gradients += self.eot * len(x)
        logits, gradient = self._one_gradient(x, objective)
        for _ in range(self.eot - 1):
            more_logits, more_gradient = self._one_gradient(x, objective)
            logits, gradient = logits + more_logits, gradient + more_gradient
        return logits / self.eot, gradient / self.eot

    def _one_gradient(self, x: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            image = x.detach().requires_grad_(True)
            logits = self._once(image)
            if not logits.requires_grad:
                return logits, torch.zeros_like(x)
            total = objective(logits).sum()
            gradient = torch.autograd.grad(total, image, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            return logits.detach(), torch.zeros_like(x)
        return logits.detach(), gradient.nan_to_num(0.0, 0.0, 0.0)


@contextmanager
def attacked(model: nn.Module, run: Run, eot: int = 1, eight_bit: bool = False) -> Iterator[Classifier]:
    """Give `model` as a `Classifier`: in eval mode and with frozen weights, all put back at the end.

    Inside, gradients work also where the caller has switched them off.
    """
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)  # no gradients of weights: half the backward pass
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield Classifier(lambda image: run.forward(model, {"image": image}), eot, eight_bit)
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)


def check_images(x: Tensor, first: int = 0) -> None:
    """Raise unless images (N, C, H, W) lie in [0, 1]; `first` is the index of the first sample.

    Raises:
        DataError: a pixel outside [0, 1], or NaN.
    """
    inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)  # NaN is outside too
    if not bool(inside.all()):
        at = int((~inside).nonzero().flatten()[0])
        low, high = float(x[at].min()), float(x[at].max())
        raise DataError(
            f"image {first + at} of the test split has pixels from {low:.4g} to {high:.4g}; attacks need images in "
            "[0, 1] (the model's normalisation is applied by eff, not by the data)"
        )


def check_labels(y: Tensor, classes: int, first: int = 0) -> None:
    """Raise unless labels (N,) are among the model's classes; `first` is the index of the first sample.

    Raises:
        DataError: a label without an output.
    """
    wrong = (y < 0) | (y >= classes)
    if bool(wrong.any()):
        at = int(wrong.nonzero().flatten()[0])
        raise DataError(
            f"image {first + at} of the test split has label {int(y[at])}; the model has classes 0 to {classes - 1}"
        )


def check_classes(classes: int, losses: tuple[str, ...] = (), targeted: tuple[str, ...] = ()) -> None:
    """Raise where the model has too few classes for a loss.

    Raises:
        UnsupportedModelError: fewer than 2 classes, than 3 for DLR, than 4 for targeted DLR.
    """
    if classes < 2:
        raise UnsupportedModelError(f"the model has {classes} output; an attack needs at least 2 classes")
    for name in losses:
        if classes < CLASSES_NEEDED.get(name, 2):
            raise UnsupportedModelError(
                f"the model has {classes} classes, loss '{name}' needs {CLASSES_NEEDED[name]}; use loss margin or pm"
            )
    for name in targeted:
        if classes < CLASSES_NEEDED_TARGETED.get(name, 2):
            raise UnsupportedModelError(
                f"the model has {classes} classes, targeted '{name}' needs {CLASSES_NEEDED_TARGETED[name]}; "
                "use target_loss=margin"
            )


def looks_like_probabilities(output: Tensor) -> bool:
    """Tell whether each row is non-negative and sums to 1."""
    sums = output.double().sum(1)
    return bool((output >= 0).all()) and bool(((sums - 1).abs() < 1e-4).all())
