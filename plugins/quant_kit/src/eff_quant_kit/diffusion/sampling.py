"""Asking a denoiser, sampling from it, and recording the path it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eff.errors import RunError, UnsupportedModelError
from eff.modes import eval_mode
from eff_quant_kit.diffusion.schedule import Schedule


def predict_noise(model: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Return the noise predicted for x (N, C, H, W) at t (N,); of twice as many channels the first half.

    Raises:
        UnsupportedModelError: the model cannot be called so, or returns something else.
    """
    try:
        output = model(x, t) if labels is None else model(x, t, class_labels=labels)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no denoiser: its forward must be model(x, t, class_labels=...); {error}"
        ) from error
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor) or output.ndim != x.ndim or output.shape[1] < x.shape[1]:
        raise UnsupportedModelError(f"{type(model).__name__} does not return noise of the shape of its input")
    return output[:, : x.shape[1]]


def guided_noise(
    model: nn.Module, x: Tensor, t: int, labels: Tensor | None, guidance: float = 1.0, null: int | None = None
) -> Tensor:
    """Return the noise under classifier-free guidance; both halves go through the model as one batch."""
    if labels is None or guidance == 1.0 or null is None:
        return predict_noise(model, x, torch.full((len(x),), t, device=x.device), labels)
    both = predict_noise(
        model,
        torch.cat([x, x]),
        torch.full((2 * len(x),), t, device=x.device),
        torch.cat([labels, torch.full_like(labels, null)]),
    )
    conditional, free = both.chunk(2)
    return free + guidance * (conditional - free)


@dataclass(frozen=True)
class Trajectories:
    """What a model saw and said on its sampler's path: S steps, N samples."""

    x: Tensor
    """(S, N, C, H, W), inputs; x[0] is pure noise."""
    t: tuple[int, ...]
    labels: Tensor | None
    noise: Tensor
    """(S, N, C, H, W), predictions, guided where asked for."""
    samples: Tensor
    """(N, C, H, W), the end of the path, in [-1, 1] and a little beyond."""


@torch.no_grad()
def trajectories(
    model: nn.Module,
    schedule: Schedule,
    timesteps: Sequence[int],
    labels: Tensor | int,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    eta: float = 0.0,
    guidance: float = 1.0,
    null: int | None = None,
    conditional: bool = True,
) -> Trajectories:
    """Sample from `model` in eval mode and keep every step.

    Args:
        labels: (N,) classes, or N alone for an unconditional model.
        shape: of one sample, (C, H, W).
        generator: on the CPU, so that every device starts from the same noise.

    Raises:
        RunError: the path holds NaN or infinity; the timestep is named.
    """
    device = next(model.parameters()).device
    count = labels if isinstance(labels, int) else len(labels)
    given = labels.to(device) if isinstance(labels, Tensor) and conditional else None
    x = torch.randn(count, *shape, generator=generator).to(device)
    seen, said = [], []
    with eval_mode(model):
        for t, to in zip(timesteps, [*timesteps[1:], -1], strict=True):
            noise = guided_noise(model, x, t, given, guidance, null)
            if not bool(torch.isfinite(noise).all()):
                raise RunError(f"the model's prediction at timestep {t} holds NaN or infinity; check its weights")
            seen.append(x)
            said.append(noise)
            fresh = torch.randn(x.shape, generator=generator).to(device) if eta else None
            x = schedule.step(x, noise, t, to, eta, fresh)
    return Trajectories(torch.stack(seen), tuple(timesteps), given, torch.stack(said), x)


@torch.no_grad()
def path_error(model: nn.Module, path: Trajectories) -> list[float]:
    """Return the mean squared error to the recorded (unguided) predictions at each step of a path."""
    errors = []
    with eval_mode(model):
        for x, t, noise in zip(path.x, path.t, path.noise, strict=True):
            errors.append(float((guided_noise(model, x, t, path.labels) - noise).square().mean()))
    return errors
