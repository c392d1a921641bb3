"""Joint training of all widths, and the supernet of widths by layer.

    after every width: weights step at lr, scales at  eta_b (lr - mean_i min(max|clip(ds_i, 1)|, 1)),  not below 0   (ALRS)
    eta_b = 10^(-D/2) for even D = h - b, 5 10^(-(D+1)/2) for odd
As printed the bracket is negative where gradients exceed the rate; a negative rate would be ascent, so it ends at 0.
    supernet: each width in turn is the default of one pass; a layer draws its own where u < sigma (epoch + 1) / epochs  (HASB)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.run import Run, Step, StepResult
from eff.schemas import Metric
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.layers import SwitchNorm, switch, switch_layers
from eff_quant_kit.quantizer import SMALLEST_SCALE, keep_scales_positive


def eta(shift: int) -> float:
    """Return the paper's factor of the scales' learning rate for D = `shift`."""
    return float(10.0 ** (-shift / 2) if shift % 2 == 0 else 5 * 10.0 ** (-(shift + 1) / 2))


def is_scale(name: str) -> bool:
    """Whether a parameter is a scale of weights or inputs, by its name."""
    return name.endswith(".scale")


class Trainer:
    """What the steps share."""

    def __init__(
        self, model: nn.Module, config: DoubleRoundingConfig, structure: dict[str, Any], teacher: nn.Module | None
    ):
        self.config, self.structure, self.teacher = config, structure, teacher
        self.gradients: dict[str, list[float]] = {}
        """By width: sum over the steps of the mean largest scale gradient, and the steps."""
        self.in_supernet = False

    def step(self, step: Step) -> StepResult:
        """Train all widths, or the supernet, on one batch."""
        optimizer, config = step.optimizer, self.config
        assert optimizer is not None
        model, highest = step.module, config.widths[0]
        scales = [p for name, p in model.named_parameters() if is_scale(name)]
        ids = {id(p) for p in scales}
        groups = [group for group in optimizer.param_groups if id(group["params"][0]) in ids]
        rates = [group["lr"] for group in groups]
        if self._supernet(step):
            self._enter_supernet(model)
        target: Tensor | None = None
        losses = []
        for width in config.widths:
            switch(model, self.structure, self._widths(model, width, step) if self.in_supernet else width)
            loss, output = step.loss(step.model, step.batch)
            losses.append(loss.detach())
            if config.distill != "none" and (self.teacher is not None or width != highest):
                goal = step.run.forward(self.teacher, step.batch).detach() if self.teacher is not None else target
                if goal is not None:
                    loss = loss + F.cross_entropy(output, goal.softmax(1))
            if width == highest:
                target = output.detach()
            step.backward(loss)
            largest = self._note(width, scales)
            if not config.accumulate:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = self._scale_rate(rate, highest - width, largest)
                self._update(step, optimizer)
        if config.accumulate:
            self._update(step, optimizer)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        switch(model, self.structure, highest)
        metrics = {f"loss_{b}": Metric(value=float(one)) for b, one in zip(config.widths, losses, strict=True)}
        return StepResult(torch.stack(losses).mean(), metrics)

    def _scale_rate(self, rate: float, shift: int, largest: float) -> float:
        if self.config.alrs == "off":
            return rate
        return eta(shift) * (rate if self.config.alrs == "ratio" else max(0.0, rate - largest))

    def _note(self, width: int, scales: list[nn.Parameter]) -> float:
        """Return mean_i min(max|clip(ds_i)|, 1) over the scales that have a gradient, and remember it."""
        found = [min(float(p.grad.abs().max()), 1.0) for p in scales if p.grad is not None]
        mean = sum(found) / max(1, len(found))
        total = self.gradients.setdefault(str(width), [0.0, 0.0])
        total[0], total[1] = total[0] + mean, total[1] + 1
        return mean

    def _update(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        keep_scales_positive(step.module)
        with torch.no_grad():
            for layer in switch_layers(step.module).values():
                layer.scale.clamp_(min=SMALLEST_SCALE)
        for parameter in step.module.parameters():
            parameter.grad = None

    def _supernet(self, step: Step) -> bool:
        first = self._first_supernet_step(step.run)
        return self.config.mixed and step.index >= first

    def _first_supernet_step(self, run: Run) -> int:
        total = max(1, len(run.split("train")) // (run.train.batch_size or 64)) * (run.train.epochs or 0)
        return round(total * (1 - self.config.mixed_share))

    def _enter_supernet(self, model: nn.Module) -> None:
        """Start the norms of each pair of widths from those of the later width, once."""
        if self.in_supernet:
            return
        self.in_supernet = True
        if self.structure.get("in_supernet"):  # a resumed run has them
            return
        self.structure["in_supernet"] = True
        for norm in (module for module in model.modules() if isinstance(module, SwitchNorm)):
            for name, other in norm.norms.items():
                if "_" in name:
                    other.load_state_dict(copy.deepcopy(norm.norms[name.split("_")[1]].state_dict()))

    def _widths(self, model: nn.Module, default: int, step: Step) -> dict[str, int]:
        """Draw the width of each layer: sensitive ones by roulette with shares b / sum b, others evenly."""
        traces: dict[str, float] = self.structure["traces"]
        mean = sum(traces.values()) / len(traces)
        first = self._first_supernet_step(step.run)
        total = max(1, first / (1 - self.config.mixed_share) - first)
        threshold = self.config.hasb_sigma * min(1.0, (step.index - first + 1) / total)
        found = {}
        for name in switch_layers(model):
            draw, second = torch.rand(2).tolist()
            found[name] = (
                roulette(self.config.widths, traces[name] >= mean > 0, second) if draw < threshold else default
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"gradients": self.gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.gradients = {key: list(row) for key, row in state["gradients"].items()}


def roulette(widths: tuple[int, ...], sensitive: bool, draw: float) -> int:
    """Return a width for a uniform draw in [0, 1): evenly, or for a sensitive layer in proportion to the widths."""
    shares = [b / sum(widths) if sensitive else 1 / len(widths) for b in widths]
    total = 0.0
    for width, share in zip(widths, shares, strict=True):
        total += share
        if draw < total:
            return width
    return widths[-1]
