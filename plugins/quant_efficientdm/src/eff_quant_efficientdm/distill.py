"""Calibration, then distillation along the float model's path (sec. 3): one optimiser step per sampler step.

loss = sum of (e_fp - e_q)^2, both guided, at the same x_t;  x_{t-1} from e_fp
learning rate of a layer's adapters: mean(delta_w) / 2500
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, RequestError
from eff.run import Run
from eff_quant_efficientdm.adapters import adapt, merge
from eff_quant_efficientdm.config import EfficientDMConfig
from eff_quant_kit.diffusion.inputs import (
    calibrate,
    find_operands,
    full_range,
    insert,
    operand_quantizer,
    set_weights,
    shrunk_range,
    to_structure,
)  # fmt: skip
from eff_quant_kit.diffusion.sampling import Trajectories, guided_noise, predict_noise, trajectories
from eff_quant_kit.diffusion.task import Diffusion
from eff_quant_kit.diffusion.time_aware import keep_positive
from eff_quant_kit.layers import check_layers, execution_order, find_layers
from eff_quant_kit.quantizer import SMALLEST_SCALE

END_BITS = 8


def task_of(run: Run) -> Diffusion:
    """Return the run's task.

    Raises:
        RequestError: it is another one.
    """
    if not isinstance(run.task, Diffusion):
        raise RequestError(
            "quant_efficientdm: needs a diffusion model, called as model(x, t, class_labels=...); "
            f"this task is {run.task.name}"
        )
    return run.task


class Distillation:
    """The calibrated model with its adapters, and the steps that train them."""

    def __init__(self, model: nn.Module, config: EfficientDMConfig, structure: dict[str, Any], run: Run):
        self.config, self.run, self.task = config, run, task_of(run)
        schedule = self.task.schedule
        if config.steps > schedule.steps:
            raise ConfigError(
                f"quant_efficientdm: steps must be at most the schedule's {schedule.steps}, got {config.steps}"
            )
        layers = find_layers(model)
        check_layers("quant_efficientdm", model, layers, ())
        self.timesteps = schedule.respaced(config.steps)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        generator = run.generator("quant_efficientdm/calibration")
        labels = self.task.labels(config.calib_samples, generator)
        self.path = trajectories(
            self.teacher, schedule, self.timesteps, labels, self.task.shape, generator,
            eta=config.eta, guidance=config.guidance, null=self.task.null,
        )  # fmt: skip
        x, device = self.path.x[0], self.path.x.device

        def forward() -> Tensor:
            moments = torch.full((len(x),), self.timesteps[0], device=device)
            return predict_noise(self.teacher, x, moments, self.path.labels)

        order = execution_order(self.teacher, layers, forward)
        ends = {*order[: config.n_first8], *order[len(order) - config.n_last8 :]}
        if len(ends) >= len(order):
            raise ConfigError(
                f"quant_efficientdm: n_first8 and n_last8 leave none of {len(order)} layers at {config.bits_w} bits"
            )
        self.weight_bits = {name: END_BITS if name in ends else config.bits_w for name in order}
        self.operands = [
            replace(item, bits=END_BITS if item.name in ends else config.bits_a, axis=None)
            for item in find_operands(self.teacher, order, forward)
        ]
        sets = self.timesteps if config.temporal else self.timesteps[:1]
        structure.update(to_structure(self.operands, self.weight_bits, sets))
        self.model = insert(model.eval(), self.operands, self.weight_bits, sets)
        set_weights(self.model, full_range if config.weight_init == "max" else shrunk_range)
        self._calibrate()
        self.ptq = copy.deepcopy(self.model)
        grouped = [name for name in order if getattr(layers[name], "groups", 1) > 1]
        if grouped:
            run.warn(f"quant_efficientdm: no adapters in grouped convolutions: {', '.join(grouped[:5])}")
        names = [name for name in order if name not in ends and name not in grouped]
        self.adapted = adapt(self.model, names, config.rank, config.base == "packed")
        self.steps = config.epochs * len(self.timesteps)
        self.optimizer = self._optimizer()
        self.x: Tensor | None = None

    def _calibrate(self) -> None:
        """One range from inputs spread over the path; every step's set starts there."""
        steps, count = self.path.x.shape[:2]
        index = torch.arange(count) * steps // count
        rows = torch.arange(count)
        ranges = full_range if self.config.act_init == "max" else shrunk_range
        moments = torch.tensor(self.timesteps)[index].to(self.path.x.device)
        stored = self.path.x[index, rows]
        sampled = _Stored(self.teacher, moments)
        flat = Trajectories(stored[None], (0,), self.path.labels, stored[None], stored)
        quantizers = [operand_quantizer(self.model, item) for item in self.operands]
        kept = [quantizer.timesteps for quantizer in quantizers]
        for quantizer in quantizers:
            quantizer.timesteps = quantizer.timesteps[:1]
        calibrate(self.model, sampled, self.operands, flat, ranges, self.run)
        with torch.no_grad():
            for quantizer, timesteps in zip(quantizers, kept, strict=True):
                quantizer.timesteps = timesteps
                quantizer.scale.copy_(quantizer.scale[:1].expand_as(quantizer.scale))
                quantizer.zero_point.copy_(quantizer.zero_point[:1].expand_as(quantizer.zero_point))
                quantizer.initialised.fill_(True)

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        rates = {name: float(item.scale.detach().mean()) / config.lora_lr_div for name, item in self.adapted.items()}
        mean = sum(rates.values()) / max(1, len(rates))
        groups: list[dict[str, Any]] = []
        for name, item in self.adapted.items():
            groups.append({"params": [item.down, item.up], "lr": rates[name] if config.scale_aware else mean})
        groups.append({"params": [item.scale for item in self.adapted.values()], "lr": config.lr_delta_w})
        quantizers = [operand_quantizer(self.model, item) for item in self.operands]
        for quantizer in quantizers:
            quantizer.requires_grad_(True)  # z is learned as a real number
        groups.append({"params": [p for q in quantizers for p in (q.scale, q.zero_point)], "lr": config.lr_act})
        made = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        self.rates = [group["lr"] for group in made.param_groups]
        return made

    def step(self, index: int) -> Tensor:
        """Do one sampler step and one optimiser step; return the loss."""
        config, schedule = self.config, self.task.schedule
        epoch, place = divmod(index, len(self.timesteps))
        generator = self.run.generator(f"quant_efficientdm/trajectory/{epoch}/{place}")
        device = self.path.x.device
        if place == 0 or self.x is None:
            labels = self.task.labels(config.batch, generator)
            self.labels = labels.to(device) if isinstance(labels, Tensor) else None
            self.x = torch.randn(config.batch, *self.task.shape, generator=generator).to(device)
        t = self.timesteps[place]
        to = self.timesteps[place + 1] if place + 1 < len(self.timesteps) else -1
        with torch.no_grad():
            target = guided_noise(self.teacher, self.x, t, self.labels, config.guidance, self.task.null)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 - index / self.steps)  # linear to zero
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            said = guided_noise(self.model, self.x, t, self.labels, config.guidance, self.task.null)
            loss = (said - target).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        keep_positive(self.model)
        with torch.no_grad():
            for item in self.adapted.values():
                item.scale.clamp_(min=SMALLEST_SCALE)
        fresh = torch.randn(self.x.shape, generator=generator).to(device)
        self.x = schedule.step(self.x, target, t, to, config.eta, fresh)
        return loss.detach()

    def finish(self) -> dict[str, float]:
        """Merge the adapters; return the share of integers changed by layer."""
        return merge(self.model, self.config.bits_w)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser and the place on the trajectory."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.x is not None:
            state |= {"x": self.x, "labels": self.labels}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.x, self.labels = state.get("x"), state.get("labels")


class _Stored(nn.Module):
    """The float model asked at each stored input's own timestep."""

    def __init__(self, model: nn.Module, moments: Tensor):
        super().__init__()
        self.model, self.moments = model, moments

    def get_submodule(self, target: str) -> nn.Module:
        return self.model.get_submodule(target)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return predict_noise(self.model, x, self.moments, class_labels)


def evaluation_path(
    teacher: nn.Module, task: Diffusion, timesteps: Sequence[int], run: Run, count: int
) -> Trajectories:
    """Return a fresh, unguided path of the float model."""
    generator = run.generator("quant_efficientdm/evaluation")
    labels = task.labels(count, generator)
    return trajectories(teacher, task.schedule, timesteps, labels, task.shape, generator)
