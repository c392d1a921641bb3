"""Following a training: norms, effective steps and detections, per layer and epoch.

The effective step is how far a step moves the normalised weight, |w'/|w'| - w/|w||: of a weight followed by
normalisation only this matters. The cosine of successive normalised weights is 1 - step^2 / 2. lr |u| / |w|
differs from it by the radial part of the step and terms of second order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.schemas import TableRow
from eff_kernels.adamp_step.projection import detect

_TINY = 1e-12
_CHANNEL, _LAYER, _STEP, _SQUARE, _COUNT = range(5)


class Track:
    """Sums over the steps of each epoch for the weights with more than one dimension."""

    def __init__(self, names: list[str], first_norms: Tensor):
        self.names = names
        self.first_norms = first_norms
        self.last_norms = first_norms
        self.epochs: dict[int, Tensor] = {}
        """Per epoch (layers, 5): steps projected by channel, by layer, sums of effective steps and their squares, steps."""

    @classmethod
    def of(cls, model: nn.Module) -> Track:
        """Start with the model as it is."""
        chosen = _matrices(model)
        return cls(list(chosen), _norms(list(chosen.values())))

    def weights(self, model: nn.Module) -> list[Tensor]:
        """Return copies of the weights, to be compared with those after a step."""
        chosen = _matrices(model)
        return [chosen[name].detach().clone() for name in self.names]

    def add(self, model: nn.Module, before: list[Tensor], epoch: int, delta: float, eps: float) -> None:
        """Take in one step; layers without a gradient are left out of its counts."""
        chosen = _matrices(model)
        after = [chosen[name].detach() for name in self.names]
        used = [index for index, name in enumerate(self.names) if chosen[name].grad is not None]
        if not used:
            return
        # In float32 a mixed-precision model is compared as its master weights are.
        old = [before[index].float() for index in used]
        new = [after[index].float() for index in used]
        gradients = [chosen[self.names[index]].grad.float() for index in used]  # type: ignore[union-attr]
        found = detect(old, gradients, delta, eps)
        old_norms, new_norms = _norms(old), _norms(new)
        scaled = torch._foreach_div(new, list(new_norms.clamp_min(_TINY).unbind()))
        torch._foreach_sub_(scaled, torch._foreach_div(old, list(old_norms.clamp_min(_TINY).unbind())))
        steps = _norms(list(scaled))
        rows = torch.stack(
            (found.channel.float(), found.layer.float(), steps, steps.square(), torch.ones_like(steps)), 1
        )
        sums = self.epochs.setdefault(epoch, rows.new_zeros(len(self.names), rows.shape[1]))
        sums[torch.tensor(used, device=rows.device)] += rows
        self.last_norms = _norms(after)

    def projected_share(self) -> float:
        """Return the share of all updates of weights that were projected, in %."""
        total = self._sum(list(self.epochs))
        return 100.0 * float(total[:, : _LAYER + 1].sum() / total[:, _COUNT].sum())

    def late_steps(self) -> Tensor:
        """Return each layer's mean effective step over the last third of the epochs, (layers,)."""
        return _mean(self._sum(self._third(last=True)), _STEP)

    def table(self) -> list[TableRow]:
        """Return one row per layer."""
        whole = self._sum(list(self.epochs))
        early = _mean(self._sum(self._third(last=False)), _STEP)
        late = self.late_steps()
        return [
            {
                "layer": name,
                "projected_by_channel": _mean(whole, _CHANNEL)[index].item(),
                "projected_by_layer": _mean(whole, _LAYER)[index].item(),
                "norm_before": self.first_norms[index].item(),
                "norm_after": self.last_norms[index].item(),
                "effective_step_first_third": early[index].item(),
                "effective_step_last_third": late[index].item(),
                "cosine_of_successive": 1.0 - 0.5 * _mean(whole, _SQUARE)[index].item(),
            }
            for index, name in enumerate(self.names)
        ]

    def _third(self, last: bool) -> list[int]:
        epochs = sorted(self.epochs)
        size = max(1, len(epochs) // 3)
        return epochs[-size:] if last else epochs[:size]

    def _sum(self, epochs: list[int]) -> Tensor:
        return torch.stack([self.epochs[epoch] for epoch in epochs]).double().sum(0)

    def state(self) -> dict[str, Any]:
        """Return what `from_state` reads back."""
        return {
            "names": list(self.names),
            "first_norms": self.first_norms,
            "last_norms": self.last_norms,
            "epochs": dict(self.epochs),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Track:
        """Return the track that `state` was taken of."""
        track = cls(list(state["names"]), state["first_norms"])
        track.last_norms = state["last_norms"]
        track.epochs = dict(state["epochs"])
        return track


def mean_norm(model: nn.Module) -> float:
    """Return the mean norm of the weights with more than one dimension; 0 where there is none."""
    chosen = list(_matrices(model).values())
    return _norms(chosen).mean().item() if chosen else 0.0


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and parameter.numel() and parameter.requires_grad
    }


def _norms(tensors: list[Any]) -> Tensor:
    if not tensors:
        return torch.zeros(0)
    return torch.stack([norm.float() for norm in torch._foreach_norm([tensor.detach() for tensor in tensors])])


def _mean(sums: Tensor, column: int) -> Tensor:
    return sums[:, column] / sums[:, _COUNT].clamp_min(1)
