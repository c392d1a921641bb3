"""Activation quantizers with a set of scales and zero points per timestep.

    x_hat = (clip(round(x / s_t) + z_t, 0, 2^b - 1) - z_t) s_t

The gradient passes through round; outside the range it reaches s_t and z_t and not x.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import RunError

SMALLEST_SCALE = 1e-8


class TimeAwareQuantizer(nn.Module):
    """Holds `scale` and `zero_point` (S, C), the sets of S timesteps; C is 1 per tensor, else the channels of `axis`.

    `follow_timesteps` tells it which timesteps a batch has. `timesteps` of length 1 make a static quantizer.
    """

    def __init__(self, bits: int, timesteps: Sequence[int], channels: int = 1, axis: int | None = None):
        super().__init__()
        self.bits, self.axis = bits, axis
        self.q_max = 2**bits - 1
        self.timesteps: Tensor
        self.initialised: Tensor
        self.register_buffer("timesteps", torch.tensor(list(timesteps)))
        self.register_buffer("initialised", torch.zeros(len(timesteps), dtype=torch.bool))
        self.scale = nn.Parameter(torch.ones(len(timesteps), channels))
        self.zero_point = nn.Parameter(torch.zeros(len(timesteps), channels), requires_grad=False)
        self.active: Tensor | None = None
        """Set of each sample, (N,), or (1,) where all share one."""

    def select(self, t: Tensor) -> None:
        """Use for each sample of t (N,) the set of the nearest timestep, on a tie the later (noisier) one."""
        order = self.timesteps.argsort(descending=True)
        distance = (t.reshape(-1, 1) - self.timesteps[order]).abs()
        chosen = order[distance.argmin(1)]
        self.active = chosen[:1] if bool((chosen == chosen[0]).all()) else chosen

    def set_range(self, index: int, low: Tensor, high: Tensor) -> int:
        """Take the range [low, high] (C,) for a set; return how many channels were constant.

        The range is widened to hold 0, so a constant channel gets the range between 0 and its constant and is exact.
        """
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise RunError(f"activations at timestep {int(self.timesteps[index])} hold NaN or infinity")
        constant = int((low == high).sum())
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / self.q_max).clamp(min=SMALLEST_SCALE)
        with torch.no_grad():
            self.scale[index] = scale
            self.zero_point[index] = (-low / scale).round()
            self.initialised[index] = True
        return constant

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        assert self.active is not None
        chosen = values[self.active]
        if len(chosen) not in (1, len(x)):
            if len(x) % len(chosen):
                raise RunError(f"a batch of {len(x)} rows does not divide among {len(chosen)} timesteps")
            chosen = chosen.repeat_interleave(len(x) // len(chosen), 0)  # tokens or heads folded into the batch
        shape = [len(chosen)] + [1] * (x.ndim - 1)
        if self.axis is not None:
            shape[self.axis % x.ndim] = values.shape[1]
        return chosen.view(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` fake-quantized with the sets of its timesteps.

        Raises:
            RunError: no timestep has been selected, or its set was never calibrated.
        """
        if self.active is None:
            raise RunError("a time-aware quantizer was called outside a model that follow_timesteps was applied to")
        if not bool(self.initialised[self.active].all()):
            raise RunError("no timestep has been calibrated; apply the method first")
        scale, zero = self._spread(self.scale, x).to(x.dtype), self._spread(self.zero_point, x).to(x.dtype)
        u = x / scale
        level = (u + (u.round() - u).detach() + zero).clamp(0, self.q_max)
        return (level - zero) * scale

    def extra_repr(self) -> str:
        """Return bits and sets for printing."""
        return f"bits={self.bits}, sets={len(self.timesteps)}, axis={self.axis}"


def time_aware(model: nn.Module) -> dict[str, TimeAwareQuantizer]:
    """Return the time-aware quantizers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TimeAwareQuantizer)}


def set_timestep(model: nn.Module, t: Tensor | int) -> None:
    """Select the sets of t for all quantizers of `model`."""
    quantizers = time_aware(model).values()
    moments = torch.as_tensor(t).reshape(-1)
    for quantizer in quantizers:
        quantizer.select(moments.to(quantizer.timesteps.device))
    sets = next((item.timesteps for item in quantizers if len(item.timesteps) > 1), None)
    if sets is not None and not bool(torch.isin(moments.to(sets.device), sets).all()):
        # A constant message: Python shows it once, however many timesteps have no set.
        warnings.warn("a timestep without a set of scales takes those of the nearest calibrated one", stacklevel=2)


def _select(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    t = arguments[1] if len(arguments) > 1 else keywords.get("timestep", keywords.get("t"))
    if t is None:
        raise RunError(
            f"{type(module).__name__} was called without a timestep; call it as model(x, t, class_labels=...)"
        )
    set_timestep(module, t)


def follow_timesteps(model: nn.Module) -> nn.Module:
    """Make every call of `model(x, t, ...)` select the sets of its t first; survives copying."""
    model.register_forward_pre_hook(_select, with_kwargs=True)
    return model


def keep_positive(model: nn.Module) -> None:
    """Lift scales that an optimiser has pushed to 0 or below."""
    with torch.no_grad():
        for quantizer in time_aware(model).values():
            quantizer.scale.clamp_(min=SMALLEST_SCALE)
