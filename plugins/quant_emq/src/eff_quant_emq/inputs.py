"""What expressions read, by layer in the order of execution; and the hand-made proxies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_emq.config import EMQConfig
from eff_quant_kit.layers import CONVOLUTIONS, check_layers, execution_order, find_layers, warn_left_in_float
from eff_quant_kit.sensitivity import hessian_traces

PLUGIN = "quant_emq"
HAND_MADE = ("snip", "synflow", "plain", "fisher", "hawq_trace")


def choose_layers(model: nn.Module, run: Run) -> tuple[list[str], list[str]]:
    """Return the layers that get bits (convolutions, else linear layers), and those fixed at 8: the first and the last.

    Raises:
        UnsupportedModelError: fewer than two layers are left to choose for.
    """
    found = find_layers(model)
    check_layers(PLUGIN, model, found, ())
    warn_left_in_float(PLUGIN, model, run)
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(2))
    order = execution_order(model, found, lambda: model(*inputs))
    middle = order[1:-1]
    convolutions = [name for name in middle if isinstance(found[name], CONVOLUTIONS)]
    chosen = convolutions or middle
    if len(chosen) < 2:
        raise UnsupportedModelError(
            f"{PLUGIN}: {type(model).__name__} has {len(chosen)} layers between its first and its last; at least 2 are needed"
        )
    return chosen, [name for name in order if name not in chosen]


def collect(model: nn.Module, names: list[str], config: EMQConfig, run: Run) -> dict[str, list[Tensor]]:
    """Return activations, weights and gradients by kind, one detached tensor a layer; leaves the model as it was."""
    with eval_mode(model):
        batch = next(run.batches("train", config.batch_size, config.batch_size))
        weights: dict[str, Tensor] = {name: model.get_submodule(name).weight for name in names}  # type: ignore[misc]
        seen: dict[str, Tensor] = {}
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda *call, name=name: seen.__setitem__(name, call[2].detach())
            )
            for name in names
        ]
        try:
            with torch.enable_grad():
                loss = run.task.loss(run.forward(model, batch), batch)
                gradients = torch.autograd.grad(loss, list(weights.values()))
        finally:
            for handle in handles:
                handle.remove()
        ones = tuple(torch.ones_like(value) for value in (item.to(run.device) for item in run.task.example_inputs(1)))
        with torch.enable_grad():
            virtual = torch.autograd.grad(model(*ones).sum(), list(weights.values()))
    found = {
        "act": [seen[name] for name in names],
        "weight": [weight.detach() for weight in weights.values()],
        "grad": [value.detach() for value in gradients],
        "virtual_grad": [value.detach() for value in virtual],
    }
    if not config.align_gradients:
        found |= {name: found[name][::-1] for name in ("grad", "virtual_grad")}
    if config.use_hessian:
        found["hessian_trace"] = [torch.tensor(value) for value in traces(model, names, batch, run).values()]
    return found


def traces(model: nn.Module, names: list[str], batch: Any, run: Run) -> dict[str, float]:
    """Return the Hessian trace of each layer's weight."""
    weights = {name: model.get_submodule(name).weight for name in names}
    with eval_mode(model):
        found = hessian_traces(
            model, weights, lambda: [(run.task.loss(run.forward(model, batch), batch), 1.0)],  # type: ignore[arg-type]
            run.generator(f"{PLUGIN}/traces"), draws=30,
        )  # fmt: skip
    return {name: trace for name, (trace, _) in found.items()}


def hand_made(
    model: nn.Module, names: list[str], inputs: dict[str, list[Tensor]], config: EMQConfig, run: Run
) -> dict[str, Tensor]:
    """Return the layer scores (L,) of the known proxies.

    snip sum|g w|, plain sum g w, fisher sum g^2, synflow sum|w dR/dw| with |w| and ones as input, hawq_trace tr(H) / n.
    """
    pairs = list(zip(inputs["grad"], inputs["weight"], strict=True))
    batch = next(run.batches("train", config.batch_size, config.batch_size))
    trace = traces(model, names, batch, run)
    found = {
        "snip": [(g * w).abs().sum() for g, w in pairs],
        "plain": [(g * w).sum() for g, w in pairs],
        "fisher": [g.square().sum() for g, _ in pairs],
        "synflow": _synflow(model, names, run),
        "hawq_trace": [torch.tensor(trace[name] / w.numel()) for name, w in zip(names, inputs["weight"], strict=True)],
    }
    return {name: torch.stack([value.double() for value in values]) for name, values in found.items()}


def _synflow(model: nn.Module, names: list[str], run: Run) -> list[Tensor]:
    linear = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.abs_()
    weights = [linear.get_submodule(name).weight for name in names]
    ones = tuple(torch.ones_like(value) for value in (item.to(run.device) for item in run.task.example_inputs(1)))
    with torch.enable_grad():
        gradients = torch.autograd.grad(linear(*ones).sum(), weights)  # type: ignore[arg-type]
    return [(w * g).abs().sum().detach() for w, g in zip(weights, gradients, strict=True)]  # type: ignore[operator]
