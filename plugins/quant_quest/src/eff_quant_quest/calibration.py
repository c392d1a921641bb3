"""Before finetuning: the float model's path, the ranges, and which layers are which.

Haoxuan Wang, Shang, Yuan, Wu, Yan, Yan: QuEST, ICCV 2025, arXiv:2402.03666.
    q(w) = (clip(round(w / delta) + zp, 0, 2^b - 1) - zp) delta, a range per output channel, shrunk by 0 to 79 %
    activations: a set (delta, zp) per timestep; max and min are quantiles q and 1 - q, q of 0.999, 0.9999, 0.99999
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, RequestError, did_you_mean
from eff.run import Run
from eff_quant_kit.diffusion.inputs import (
    Operand,
    affine,
    calibrate,
    find_operands,
    full_range,
    insert,
    set_weights,
    shrunk_range,
    to_structure,
)  # fmt: skip
from eff_quant_kit.diffusion.lookup import time_layers
from eff_quant_kit.diffusion.sampling import Trajectories, path_error, predict_noise, trajectories
from eff_quant_kit.diffusion.task import Diffusion
from eff_quant_kit.layers import check_layers, execution_order, find_layers, is_matmul
from eff_quant_quest.config import QuESTConfig

QUANTILES = (0.999, 0.9999, 0.99999)
MOMENTUM = 0.95
FEW = 8
"""Samples per timestep that the search for sensitive layers looks at."""


def quantile_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return per row of (C, M) the quantile range of least squared error."""
    some = x[:, :: max(1, x.numel() // (1 << 22))]
    at = torch.tensor([*QUANTILES, *(1 - q for q in QUANTILES)], device=x.device, dtype=some.dtype)
    ends = some.quantile(at, dim=1)
    best = torch.full_like(ends[0], float("inf"))
    low, high = ends[3].clone(), ends[0].clone()
    for index in range(len(QUANTILES)):
        a, b = ends[3 + index], ends[index]
        scale, zero = affine(a.clamp(max=0), b.clamp(min=0), bits)
        level = ((some / scale[:, None]).round() + zero[:, None]).clamp(0, 2**bits - 1)
        error = ((level - zero[:, None]) * scale[:, None] - some).square().mean(1)
        better = error < best
        best = torch.where(better, error, best)
        low, high = torch.where(better, a, low), torch.where(better, b, high)
    return low, high


def running_range(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return running minimum and maximum of each row over eight pieces, momentum 0.95."""
    pieces = x.chunk(8, 1)
    low, high = pieces[0].amin(1), pieces[0].amax(1)
    for piece in pieces[1:]:
        low = MOMENTUM * low + (1 - MOMENTUM) * piece.amin(1)
        high = MOMENTUM * high + (1 - MOMENTUM) * piece.amax(1)
    return low, high


def task_of(run: Run) -> Diffusion:
    """Return the run's task.

    Raises:
        RequestError: it is another one.
    """
    if not isinstance(run.task, Diffusion):
        raise RequestError(
            f"quant_quest: needs a diffusion model, called as model(x, t, class_labels=...); this task is {run.task.name}"
        )
    return run.task


def calibrated_timesteps(config: QuESTConfig, task: Diffusion) -> list[int]:
    """Return the calibrated timesteps, noisiest first.

    Raises:
        ConfigError: more than the schedule has, or one outside it.
    """
    last = task.schedule.steps - 1
    if isinstance(config.calib_steps, int):
        if config.calib_steps > last + 1:
            raise ConfigError(f"quant_quest: calib_steps must be at most {last + 1}, got {config.calib_steps}")
        return task.schedule.respaced(config.calib_steps)
    for t in config.calib_steps:
        if not 0 <= t <= last:
            raise ConfigError(f"quant_quest: calib_steps names timestep {t}; the schedule has 0 to {last}")
    return sorted(set(config.calib_steps), reverse=True)


def match(option: str, globs: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that fit any glob.

    Raises:
        ConfigError: a glob that fits none.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ConfigError(f"quant_quest: {option} '{glob}' fits no layer{did_you_mean(glob, names)}")
    return [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]


class Calibrated:
    """The quantized model with its float teacher, the recorded path, and the roles of its layers."""

    def __init__(self, model: nn.Module, config: QuESTConfig, structure: dict[str, Any], run: Run):
        task = task_of(run)
        self.config, self.run = config, run
        layers = find_layers(model, matmuls=True)
        check_layers("quant_quest", model, layers, ())
        timesteps = calibrated_timesteps(config, task)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.path = record_path(self.teacher, task, timesteps, config, run, "calibration")
        x, t, labels = self.path.x, timesteps[len(timesteps) // 2], self.path.labels

        def forward(which: int = 0) -> Tensor:
            moments = torch.full((x.shape[1],), t, device=x.device)
            return predict_noise(self.teacher, x[which * (len(x) - 1)], moments, labels)

        self.order = execution_order(self.teacher, layers, forward)
        linear = [name for name in self.order if isinstance(layers[name], nn.Linear)]
        self.time = (
            time_layers(self.teacher, linear, forward if len(x) > 1 else lambda which: forward(0))
            if config.time_layers == "auto"
            else match("time_layers", config.time_layers, linear)
        )
        if len(x) == 1 and config.time_layers == "auto":
            self.time = []  # one timestep: nothing tells them apart
        if not self.time:
            run.warn("quant_quest: found no layer that only the time reaches; stage 1 is skipped")
        if not any(is_matmul(layers[name]) for name in layers):
            run.warn("quant_quest: the model has no MatMul modules; q, k, v and softmax stay in float inside attention")
        self.operands = self._with_bits(find_operands(self.teacher, self.order, forward), config.act_bits)
        self.timesteps = timesteps if config.time_aware else timesteps[:1]
        self.weights = {name: config.weight_bits for name in self.order if not is_matmul(layers[name])}
        structure.update(to_structure(self.operands, self.weights, self.timesteps))
        model.eval()
        self.model = self._quantized(model, self.operands, self.weights)
        self.sensitive = self._sensitive() if config.finetune and config.main_epochs else []

    def _with_bits(self, operands: Sequence[Operand], bits: int) -> list[Operand]:
        """Give bits and granularity: 8 at the ends, softmax its own; time layers and softmax per tensor."""
        config, image = self.config, [name for name in self.order if name not in self.time]
        made = []
        for item in operands:
            own = bits
            if item.name in (image[0], image[-1]):
                own = config.first_last_act_bits
            if item.probability:
                own = config.softmax_bits
            per_channel = config.act_granularity == "channel" or (config.act_granularity == "auto" and own < 8)
            # a time layer's input is one vector per timestep: ranges per channel would be empty
            axis = item.axis if per_channel and item.name not in self.time and not item.probability else None
            made.append(replace(item, bits=own, axis=axis))
        return made

    def _quantized(self, model: nn.Module, operands: Sequence[Operand], weights: dict[str, int]) -> nn.Module:
        config = self.config
        ranges = quantile_range
        if config.act_init == "minmax":
            ranges = running_range if config.running_stats else full_range
        insert(model, operands, weights, self.timesteps)
        set_weights(model, shrunk_range)
        calibrate(model, self.teacher, operands, self.path, ranges, self.run)
        return model

    def _sensitive(self) -> list[str]:
        """Return the layers of stage 2: named, or those whose low bits raise the output's error most per weight."""
        candidates = [name for name in self.weights if name not in self.time]
        if self.config.sensitive_layers != "auto":
            return match("sensitive_layers", self.config.sensitive_layers, candidates)
        eight = [replace(item, bits=8, axis=None) for item in self.operands]
        wide = self._quantized(copy.deepcopy(self.teacher), eight, dict.fromkeys(self.weights, 8))
        few = replace_samples(self.path, FEW)
        floor = sum(path_error(wide, few))
        groups: dict[str, list[str]] = {}
        for name in candidates:
            groups.setdefault(re.sub(r"\d+", "*", name.rpartition(".")[0]) + "." + name.rpartition(".")[2], []).append(
                name
            )
        size = {name: self.teacher.get_submodule(name).weight.numel() for name in candidates}  # type: ignore[operator]
        rise: dict[str, float] = {}
        for group, names in groups.items():
            kept = {name: wide.get_submodule(name) for name in names}
            for name in names:
                wide.set_submodule(name, self.model.get_submodule(name))
            rise[group] = (sum(path_error(wide, few)) - floor) / sum(size[name] for name in names)
            for name, module in kept.items():
                wide.set_submodule(name, module)
        left = self.config.sensitive_budget * sum(size.values())
        chosen: list[str] = []
        for group in sorted(groups, key=lambda key: -rise[key]):
            cost = sum(size[name] for name in groups[group])
            if cost <= left:
                chosen += groups[group]
                left -= cost
        return chosen


def record_path(
    teacher: nn.Module, task: Diffusion, timesteps: Sequence[int], config: QuESTConfig, run: Run, name: str
) -> Trajectories:
    """Sample from the float model with random classes; the kept predictions are unguided, as both halves are imitated."""
    generator = run.generator(f"quant_quest/{name}")
    labels = task.labels(config.calib_samples, generator)
    path = trajectories(
        teacher, task.schedule, timesteps, labels, task.shape, generator, guidance=config.guidance, null=task.null
    )
    if config.guidance == 1.0 or path.labels is None or task.null is None:
        return path
    x = torch.cat([path.x, path.x], 1)
    both = torch.cat([path.labels, torch.full_like(path.labels, task.null)])
    with torch.no_grad():
        noise = [
            predict_noise(teacher, each, torch.full((len(each),), t, device=each.device), both)
            for each, t in zip(x, path.t, strict=True)
        ]
    return Trajectories(x, path.t, both, torch.stack(noise), path.samples)


def replace_samples(path: Trajectories, count: int) -> Trajectories:
    """Return the path of the first `count` samples."""
    labels = None if path.labels is None else path.labels[:count]
    return Trajectories(path.x[:, :count], path.t, labels, path.noise[:, :count], path.samples[:count])
