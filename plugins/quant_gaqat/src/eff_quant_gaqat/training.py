"""One step: the task gradient, the gradient at the perturbed point, and their mix, by scale.

SAGM (Wang et al., CVPR 2023): e = g_task (rho / (||g_task|| + 1e-12) - alpha), g = (g_task + g_smooth) / 2.
A frozen scale takes g_smooth / 2 alone. Weights are put back from a copy: subtracting e would leave rounding behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eff.run import Run, Step, StepResult
from eff.schemas import Metric
from eff_quant_gaqat.config import GAQATConfig
from eff_quant_gaqat.disorder import Tracker
from eff_quant_kit.quantizer import SMALLEST_SCALE, keep_scales_positive

SCALE = "_quantizer.scale"


def scale_names(model: nn.Module) -> list[str]:
    """Return the names of the learned steps."""
    return [name for name, parameter in model.named_parameters() if name.endswith(SCALE) and parameter.requires_grad]


class Trainer:
    """What the steps of a run share."""

    def __init__(self, model: nn.Module, config: GAQATConfig, run: Run):
        self.config = config
        self.scales = scale_names(model)
        self.tracker = Tracker(self.scales, config)
        self.warned = False
        self.run = run

    def step(self, step: Step) -> StepResult:
        """Do one step."""
        config, optimizer = self.config, step.optimizer
        assert optimizer is not None
        parameters = {name: p for name, p in step.module.named_parameters() if p.requires_grad}
        random = torch.get_rng_state()
        loss, _ = step.loss(step.model, step.batch)
        step.backward(loss)
        task = _gradients(parameters)
        if not _finite(task):  # nothing to climb along
            self.tracker.skipped += 1
            return StepResult(loss.detach(), self._metrics(loss.detach()))
        perturbed = loss.detach()
        smooth: dict[str, Tensor] | None = None
        if config.flat_optimizer != "none":
            torch.set_rng_state(random)  # the same dropout masks
            with self._perturbed(parameters, task), frozen_statistics(step.module):
                for parameter in parameters.values():
                    parameter.grad = None
                moved, _ = step.loss(step.model, step.batch)
                step.backward(moved)
                perturbed = moved.detach()
                smooth = _gradients(parameters)
        if smooth is not None and not _finite(smooth):
            self.tracker.skipped += 1
            return StepResult(loss.detach(), self._metrics(perturbed))
        for name, parameter in parameters.items():
            parameter.grad = self._mixed(name, task, smooth)
        sums = torch.stack([task[name].sum() for name in self.scales])
        others = torch.stack([smooth[name].sum() for name in self.scales]) if smooth is not None else None
        self.tracker.note(sums, others, self.run.generator(f"freeze/{step.index}"))
        optimizer.step()
        keep_scales_positive(step.module)
        return StepResult(loss.detach(), self._metrics(perturbed))

    def _mixed(self, name: str, task: dict[str, Tensor], smooth: dict[str, Tensor] | None) -> Tensor:
        """Return the gradient that the optimiser gets."""
        if smooth is None:
            return task[name]
        if self.config.flat_optimizer == "sam":
            return smooth[name]
        if name in self.scales and bool(self.tracker.frozen[self.scales.index(name)]):
            left = task[name] if self.config.freeze_policy == "freeze_smooth" else smooth[name]
            return left if self.config.renormalise else 0.5 * left
        return 0.5 * (task[name] + smooth[name])

    @contextmanager
    def _perturbed(self, parameters: dict[str, nn.Parameter], task: dict[str, Tensor]) -> Iterator[None]:
        """Move the parameters along the task gradient, and put them back exactly."""
        config = self.config
        moved = {name: p for name, p in parameters.items() if config.perturb_scales or not name.endswith(SCALE)}
        norm = torch.stack([task[name].norm() for name in moved]).norm()
        look_ahead = config.alpha if config.flat_optimizer == "sagm" else 0.0
        if look_ahead * float(norm) > config.rho and not self.warned:
            self.run.warn(
                f"quant_gaqat: alpha times the gradient's norm ({look_ahead * float(norm):.3g}) is above rho, so the "
                "perturbation descends; use a smaller alpha"
            )
            self.warned = True
        factor = config.rho / (norm + 1e-12) - look_ahead
        kept = {name: p.detach().clone() for name, p in moved.items()}
        with torch.no_grad():
            for name, p in moved.items():
                p.add_(task[name] * factor)
                if name.endswith(SCALE):
                    p.clamp_(min=SMALLEST_SCALE)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in moved.items():
                    p.copy_(kept[name])

    def _metrics(self, perturbed: Tensor) -> dict[str, Metric]:
        frozen = float(self.tracker.frozen.float().mean())
        return {
            "perturbed_loss": Metric(value=float(perturbed)),
            "frozen": Metric(value=100 * frozen, unit="%"),
            "conflict": Metric(value=100 * self.tracker.conflict_rate(), unit="%"),
        }


def _gradients(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in parameters.items()}


def _finite(gradients: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in gradients.values())


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Keep batch norms from updating their running statistics."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [
        (norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
