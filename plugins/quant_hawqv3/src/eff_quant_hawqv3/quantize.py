"""Turning a trained model into the integer network, and its training loss with a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch
from eff.errors import UnsupportedModelError
from eff.run import Run
from eff_quant_hawqv3.bits import BITS, programme, sensitivities, uniform
from eff_quant_hawqv3.config import HAWQV3Config
from eff_quant_hawqv3.network import Network
from eff_quant_hawqv3.plan import PLUGIN, read_plan

ALPHA, TEMPERATURE = 0.95, 6.0


def quantize(model: nn.Module, config: HAWQV3Config, structure: dict[str, Any], run: Run) -> Network:
    """Return the network; its bits, and what chose them, go into `structure`. Bits that stand there are kept.

    Raises:
        UnsupportedModelError: the model has operations without an integer form.
        RequestError: the budget or the latency table does not fit.
    """
    if isinstance(model, Network):
        raise UnsupportedModelError(f"{PLUGIN}: the model runs on integers already")
    plan = read_plan(model, run.task.example_inputs(2)[0].to(run.device))
    bits: dict[str, int] = structure.get("bits") or uniform(plan, config)
    net = Network(model, plan, bits, config)
    if run.restoring:
        return net
    problem = None
    if config.bits == "mixed" and "bits" not in structure:
        problem = programme(plan, net, config, run)
    calibrate(net, config, run)
    if problem is not None:
        omega = sensitivities(problem.layers, net, config, run)
        solved = problem.solve(omega)
        for name, choice in zip(problem.layers, solved.choices, strict=True):
            bits[name] = net.layer(name).bits = BITS[choice]
        structure["omega"] = {name: row.tolist() for name, row in zip(problem.layers, omega, strict=True)}
        structure["constraint"] = {
            f"{problem.budget.name}_limit": problem.budget.limit,
            f"{problem.budget.name}_used": solved.used[problem.budget.name],
            "omega_sum": solved.cost,
        }
    structure["bits"] = dict(bits)
    return net


@torch.no_grad()
def calibrate(net: Network, config: HAWQV3Config, run: Run) -> None:
    """Set the ranges of all values from the float network."""
    net.eval()
    net.path, net.observing = "float", True
    for batch in run.batches("train", config.calibration_samples):
        run.forward(net, batch)
    net.path, net.observing = "integers", False


def distilled(loss: Callable[..., Any], teacher: nn.Module, run: Run) -> Callable[[nn.Module, Batch], Any]:
    """Return T^2 alpha KL(teacher || student) + (1 - alpha) loss, both softened by T."""

    def total(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        own, output = loss(model, batch)
        with torch.no_grad():
            target = run.forward(teacher, batch)
        divergence = F.kl_div(
            (output / TEMPERATURE).log_softmax(1), (target / TEMPERATURE).log_softmax(1), reduction="batchmean",
            log_target=True,
        )  # fmt: skip
        return TEMPERATURE**2 * ALPHA * divergence + (1 - ALPHA) * own, output

    return total
