"""The two stages of QuEST; the float model's own predictions on its own path are the targets.

stage 1   sum over time layers k of [MSE(out_k^q, out_k^fp) + MSE(eps^q, eps^fp)]; time layers, and their scales at t
stage 2   MSE(eps^q, eps^fp); sensitive layers, and the scales of all other layers at t
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.seeding import named_generator
from eff_quant_kit.diffusion.inputs import operand_quantizer
from eff_quant_kit.diffusion.sampling import predict_noise
from eff_quant_kit.diffusion.time_aware import SMALLEST_SCALE, TimeAwareQuantizer
from eff_quant_quest.calibration import Calibrated

TIME_BATCHES, TIME_BATCH, MAIN_BATCH = 4, 2, 4


class Stage:
    """Adam on some layers' weights and some quantizers' scales, one (timestep, batch) after the other."""

    def __init__(
        self,
        calibrated: Calibrated,
        layers: Sequence[str],
        quantizers: Sequence[TimeAwareQuantizer],
        rates: tuple[float, float],
        batches: tuple[int, int],
        local: Sequence[str],
        global_weight: float,
    ):
        self.calibrated, self.quantizers, self.rates = calibrated, list(quantizers), rates
        self.local, self.global_weight = list(local), global_weight
        samples = calibrated.path.x.shape[1]
        self.size = min(batches[1], samples)
        self.batches = max(1, min(batches[0], samples // self.size))
        self.per_epoch = self.batches * len(calibrated.path.t)
        self.layers = list(layers)
        self.weights = [p for name in layers for p in calibrated.model.get_submodule(name).layer.parameters()]  # type: ignore[union-attr]
        self.scales = [quantizer.scale for quantizer in self.quantizers]
        self.by_weight = torch.optim.Adam(self.weights, rates[0]) if self.weights else None
        self.by_scale: torch.optim.Optimizer | None = None

    def place(self, index: int) -> tuple[int, int]:
        """Return which timestep and which batch step `index` uses."""
        epoch, rest = divmod(index, self.per_epoch)
        position, batch = divmod(rest, self.batches)
        if self.calibrated.config.shuffle_timesteps:
            generator = named_generator(self.calibrated.run.seed, f"quant_quest/order/{epoch}")
            position = int(torch.randperm(len(self.calibrated.path.t), generator=generator)[position])
        return position, batch

    def step(self, index: int) -> Tensor:
        """Do one update and return its loss."""
        calibrated, path = self.calibrated, self.calibrated.path
        position, batch = self.place(index)
        if batch == 0 or self.by_scale is None:  # anew at every timestep: no momentum moves another's set
            fresh = torch.optim.Adam(self.scales, self.rates[1]) if self.scales else None
            self.by_scale = fresh
        rows = slice(batch * self.size, (batch + 1) * self.size)
        x, labels = path.x[position, rows], None if path.labels is None else path.labels[rows]
        t = torch.full((len(x),), path.t[position], device=x.device)
        calibrated.model.requires_grad_(False)
        for parameter in (*self.weights, *self.scales):
            parameter.requires_grad_(True)
            parameter.grad = None
        outputs = {model: _Outputs(model, self.local) for model in (calibrated.teacher, calibrated.model)}
        with torch.no_grad():
            predict_noise(calibrated.teacher, x, t, labels) if self.local else None
        with torch.enable_grad():
            predicted = predict_noise(calibrated.model, x, t, labels)
            loss = self.global_weight * F.mse_loss(predicted, path.noise[position, rows])
            targets, own = (outputs[model].close() for model in (calibrated.teacher, calibrated.model))
            for name in self.local:
                loss = loss + F.mse_loss(own[name], targets[name])
            loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in (self.by_weight, self.by_scale):
            if optimizer is not None:
                optimizer.step()
        with torch.no_grad():
            for scale in self.scales:
                scale.clamp_(min=SMALLEST_SCALE)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return both optimisers."""
        return {
            "weight": self.by_weight.state_dict() if self.by_weight else {},
            "scale": self.by_scale.state_dict() if self.by_scale else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        if self.by_weight and state["weight"]:
            self.by_weight.load_state_dict(state["weight"])
        if state["scale"]:
            self.by_scale = torch.optim.Adam(self.scales, self.rates[1])
            self.by_scale.load_state_dict(state["scale"])


class _Outputs:
    """Keeps what some layers return until closed."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.found: dict[str, Tensor] = {}
        self.handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: self.found.__setitem__(name, output)
            )
            for name in names
        ]

    def close(self) -> dict[str, Tensor]:
        for handle in self.handles:
            handle.remove()
        return self.found


class Finetuning:
    """Stage 1, then stage 2, as one sequence of steps."""

    def __init__(self, calibrated: Calibrated):
        config = calibrated.config
        of_time = [q for q in self._quantizers(calibrated, True)]
        weight = len(calibrated.time) if config.global_weight is None else config.global_weight
        self.first = Stage(
            calibrated, calibrated.time, of_time, (config.lr_time_w, config.lr_time_a), (TIME_BATCHES, TIME_BATCH),
            calibrated.time, weight,
        )  # fmt: skip
        samples = calibrated.path.x.shape[1]
        local = calibrated.sensitive if config.main_local else ()
        self.second = Stage(
            calibrated, calibrated.sensitive, self._quantizers(calibrated, False), (config.lr_w, config.lr_a),
            (samples, MAIN_BATCH), local, 1.0,
        )  # fmt: skip
        self.first_steps = config.time_epochs * self.first.per_epoch if calibrated.time and config.finetune else 0
        self.steps = self.first_steps + (config.main_epochs * self.second.per_epoch if config.finetune else 0)

    @staticmethod
    def _quantizers(calibrated: Calibrated, of_time: bool) -> list[TimeAwareQuantizer]:
        return [
            operand_quantizer(calibrated.model, item)
            for item in calibrated.operands
            if (item.name in calibrated.time) is of_time
        ]

    def step(self, index: int) -> Tensor:
        """Do step `index` of both stages together."""
        return self.first.step(index) if index < self.first_steps else self.second.step(index - self.first_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimisers of both stages."""
        return {"first": self.first.state_dict(), "second": self.second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.first.load_state_dict(state["first"])
        self.second.load_state_dict(state["second"])
