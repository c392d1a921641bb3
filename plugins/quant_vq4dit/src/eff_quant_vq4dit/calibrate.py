"""Calibration without data: student and teacher see the teacher's own sampling path, and the blocks' outputs are compared.

One update per sampler step; the teacher's prediction makes the next input, so the student never follows its own samples.
    L_d = mean over blocks of the MSE of their outputs,   L_r = mean over unsettled layers of n_cand mean R (1 - R)
    gated: L_d where L_r is the lowest of this path so far, else L_d + L_r
"""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, RequestError, UnsupportedModelError, did_you_mean
from eff.run import Run
from eff_quant_kit.diffusion.lookup import blocks
from eff_quant_kit.diffusion.sampling import guided_noise
from eff_quant_kit.diffusion.task import Diffusion
from eff_quant_kit.layers import replace_module
from eff_quant_vq4dit.config import VQ4DiTConfig
from eff_quant_vq4dit.soft import SoftLinear

PLUGIN = "quant_vq4dit"
ALPHA = 0.9
NO_BEST = 1000.0


def task_of(run: Run) -> Diffusion:
    """Return the run's task.

    Raises:
        RequestError: it is another one.
    """
    if not isinstance(run.task, Diffusion):
        raise RequestError(f"{PLUGIN}: needs a diffusion transformer; this model's task is {run.task.name}")
    return run.task


def choose_layers(model: nn.Module, config: VQ4DiTConfig) -> list[str]:
    """Return the linear layers to quantize: those in the blocks, or all but `ignore`.

    Raises:
        UnsupportedModelError: no blocks, no linear layer in them, or weights that hold NaN. ConfigError: `ignore` fits
            nothing, or d does not divide a layer's inputs.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = tuple(f"{name}." for name in blocks(model))
    if config.ignore is None:
        chosen = [name for name in linear if name.startswith(inside)]
    else:
        for pattern in config.ignore:
            if not any(fnmatchcase(name, pattern) for name in linear):
                raise ConfigError(
                    f"{PLUGIN}: ignore '{pattern}' fits no linear layer{did_you_mean(pattern, linear)}; "
                    f"there are {', '.join(list(linear)[:6])}"
                )
        chosen = [name for name in linear if not any(fnmatchcase(name, pattern) for pattern in config.ignore)]
    if not chosen:
        raise UnsupportedModelError(f"{PLUGIN}: {type(model).__name__} has no linear layer to quantize in its blocks")
    for name in chosen:
        if linear[name].in_features % config.d:
            raise ConfigError(
                f"{PLUGIN}: d = {config.d} does not divide the {linear[name].in_features} inputs of '{name}'; choose another "
                "d or name the layer in ignore"
            )
        if not bool(torch.isfinite(linear[name].weight).all()):
            raise UnsupportedModelError(
                f"{PLUGIN}: the weight of '{name}' holds NaN or infinity; repair the model first"
            )
    return chosen


def insert(model: nn.Module, config: VQ4DiTConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Return `model` with soft layers; notes sizes in `structure`."""
    plan: dict[str, Any] = {}
    for name in choose_layers(model, config):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rows = layer.weight.numel() // config.d
        k = min(config.k, 2 ** ((rows // 4).bit_length() - 1)) if rows >= 8 else 1
        if k < config.k:
            run.warn(f"{PLUGIN}: '{name}' has {rows} sub-vectors; its codebook is reduced from {config.k} to {k}")
        candidates = min(config.n_candidates, k)
        if candidates < config.n_candidates:
            run.warn(f"{PLUGIN}: '{name}' has {k} codewords; it chooses among {candidates}")
        generator = run.generator(f"{PLUGIN}/kmeans/{name}")
        new = SoftLinear.of(layer, k, config.d, candidates, config.kmeans_iters, generator)
        error = float((new.codebook[new.candidates[:, 0]].view(new.shape) - layer.weight).detach().square().mean())
        plan[name] = {
            "shape": [layer.out_features, layer.in_features], "k": k, "candidates": candidates, "bias": layer.bias is not None,
            "kmeans_mse": error,
        }  # fmt: skip
        replace_module(model, name, new)
    structure["layers"] = plan
    return model


def soft_layers(model: nn.Module) -> dict[str, SoftLinear]:
    """Return the layers that are being calibrated by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SoftLinear)}


class Calibration:
    """Teacher, student, their blocks and the optimiser."""

    def __init__(self, teacher: nn.Module, student: nn.Module, config: VQ4DiTConfig, run: Run):
        self.config, self.run, self.task = config, run, task_of(run)
        self.teacher, self.student = teacher.eval().requires_grad_(False), student.eval().requires_grad_(False)
        self.layers = soft_layers(student)
        self.timesteps = self.task.schedule.respaced(min(config.sampler_steps, self.task.schedule.steps))
        self.steps = config.trajectories * len(self.timesteps)
        groups: list[dict[str, Any]] = [
            {"params": [layer.logits for layer in self.layers.values()], "lr": config.lr_ratio},
            {"params": [layer.codebook for layer in self.layers.values()], "lr": config.lr_codebook},
            {"params": [layer.bias for layer in self.layers.values() if layer.bias is not None], "lr": config.lr_bias},
        ]
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
        for layer in self.layers.values():
            if bool(layer.hard):
                layer.logits.requires_grad_(False)
        self.optimizer = torch.optim.RMSprop([group for group in groups if group["params"]], alpha=ALPHA)
        self.seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        for which, model in (("teacher", teacher), ("student", student)):
            for block in blocks(model).values():
                block.register_forward_hook(lambda *call, which=which: self.seen[which].append(_first(call[2])))
        self.x: Tensor | None = None
        self.labels: Tensor | None = None
        self.best = NO_BEST

    @property
    def done(self) -> bool:
        """Whether every layer is fixed; calibration of codes ends there."""
        return self.config.n_candidates > 1 and all(bool(layer.hard) for layer in self.layers.values())

    def step(self, index: int) -> Tensor:
        """Do one sampler step and one update; return the loss. Does nothing once every layer is fixed."""
        if self.done:
            return torch.zeros(())
        config = self.config
        path, place = divmod(index, len(self.timesteps))
        generator = self.run.generator(f"{PLUGIN}/path/{path}/{place}")
        device = next(self.student.parameters()).device
        if place == 0 or self.x is None:
            labels = self.task.labels(config.labels_per_step, generator)
            self.labels = labels.to(device) if isinstance(labels, Tensor) else None
            self.x = torch.randn(config.labels_per_step, *self.task.shape, generator=generator).to(device)
            self.best = NO_BEST
        t = self.timesteps[place]
        with torch.no_grad():
            target = self._outputs("teacher", self.teacher, t)
            wanted = list(self.seen["teacher"])
        for layer in self.layers.values():
            layer.codebook.requires_grad_(config.codebook_schedule == "joint" or bool(layer.hard))
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            self._outputs("student", self.student, t)
            loss = self._loss(wanted)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        for layer in self.layers.values():
            layer.freeze(config.freeze_row, config.freeze_layer)
        to = self.timesteps[place + 1] if place + 1 < len(self.timesteps) else -1
        fresh = torch.randn(self.x.shape, generator=generator).to(device)
        self.x = self.task.schedule.step(self.x, target, t, to, 1.0, fresh)
        return loss.detach()

    def _outputs(self, which: str, model: nn.Module, t: int) -> Tensor:
        self.seen[which].clear()
        assert self.x is not None
        return guided_noise(model, self.x, t, self.labels, self.config.cfg_scale, self.task.null)

    def _loss(self, wanted: list[Tensor]) -> Tensor:
        config = self.config
        errors = [(own - other).square().mean() for own, other in zip(self.seen["student"], wanted, strict=True)]
        distance = torch.stack(errors).mean()
        soft = [layer.ratio_loss() for layer in self.layers.values() if not bool(layer.hard)]
        if not soft:
            return distance
        ratio = torch.stack(soft).mean()
        if config.ratio_loss == "always":
            return config.lambda_d * distance + config.lambda_r * ratio
        if float(ratio.detach()) <= self.best:
            self.best = float(ratio.detach())
            return distance
        return distance + ratio

    def finish(self) -> float:
        """Fix what is left; return the share of sub-vectors that had to be forced."""
        rows = sum(len(layer.frozen) for layer in self.layers.values())
        forced = sum(int((~layer.frozen).sum()) for layer in self.layers.values())
        for layer in self.layers.values():
            layer.settle()
        return forced / max(1, rows)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser and the place on the path."""
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict(), "best": self.best}
        return state | ({} if self.x is None else {"x": self.x, "labels": self.labels})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.x, self.labels = state["best"], state.get("x"), state.get("labels")


def _first(output: Any) -> Tensor:
    """Return a block's output; blocks of some models give a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def teacher_of(model: nn.Module) -> nn.Module:
    """Return a frozen copy."""
    return copy.deepcopy(model).eval().requires_grad_(False)
