"""What PaCA reports: trained parameters, bytes kept for the backward pass, step time, exactness of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Batch, Data, move_batch
from eff.measure import time_calls
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_peft_kit.freezing import parameter_metrics
from eff_peft_paca.config import PaCAConfig
from eff_peft_paca.insert import adapted, trained_columns, trained_parameter
from eff_peft_paca.layer import PartialLayer, partial_layers
from eff_peft_paca.packed import PackedLinear

_SAMPLES = 8
_CHECKED = 4  # layers whose gradients are compared
_BUDGET_S = 0.3


@dataclass
class Kept:
    """Bytes kept between forward and backward, parameters and buffers left out.

    Attributes:
        layers: what the given modules keep, each counted by itself.
        total: all distinct memory that the whole model keeps.
    """

    layers: int = 0
    total: int = 0
    _seen: set[int] = field(default_factory=set)


@contextmanager
def record_kept(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[Kept]:
    """Count what autograd keeps while the block runs.

    Args:
        model: its parameters and buffers are there anyway and are not counted.
        layers: modules counted separately; memory that two of them keep counts twice in `layers`, and once in
            `total`.
    """
    kept = Kept()
    resident = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # a freed tensor's address could be used again and be taken for seen
    inside: list[set[int]] = []

    def enter(*_: Any) -> None:
        inside.append(set())

    def leave(*_: Any) -> None:
        inside.pop()

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in resident or not storage.nbytes():
            return tensor
        alive.append(tensor.detach())
        if address not in kept._seen:
            kept._seen.add(address)
            kept.total += storage.nbytes()
        if inside and address not in inside[-1]:
            inside[-1].add(address)
            kept.layers += tensor.numel() * tensor.element_size()
        return tensor

    handles = []
    for module in layers.values():
        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield kept
    finally:
        for handle in handles:
            handle.remove()


def gradient_error(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Return the largest relative error of the columns' gradients over a few layers.

    The reference is the gradient of the whole weight, dy^T x in float64, cut down to the columns; error and
    reference are compared in their norms. Linear layers only.
    """
    layers = [layer for layer in partial_layers(model).values() if not isinstance(layer.layer, nn.Conv2d)]
    if not layers:
        return 0.0
    chosen = [layers[index * (len(layers) - 1) // max(1, _CHECKED - 1)] for index in range(_CHECKED)]
    inputs: dict[PartialLayer, list[Tensor]] = {layer: [] for layer in chosen}
    outputs: dict[PartialLayer, list[Tensor]] = {layer: [] for layer in chosen}
    handles = []
    for layer in inputs:

        def note(layer: nn.Module, taken: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(layer, PartialLayer)
            quantize = None if layer.in_place else getattr(layer.layer, "input_quantizer", None)
            with torch.no_grad():
                inputs[layer].append(taken[0].detach() if quantize is None else quantize(taken[0]).detach())
            output.retain_grad()
            outputs[layer].append(output)

        handles.append(layer.register_forward_hook(note))
    try:
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    worst = 0.0
    for layer in inputs:
        assert layer.p.grad is not None
        whole = torch.zeros((), dtype=torch.float64, device=layer.p.device)
        for x, output in zip(inputs[layer], outputs[layer], strict=True):
            assert output.grad is not None
            whole = whole + output.grad.flatten(0, -2).double().t() @ x.flatten(0, -2).double()
        reference = whole[:, layer.index] * layer.scale
        error = (layer.p.grad.double() - reference).norm() / reference.norm().clamp(min=1e-30)
        worst = max(worst, float(error))
    return worst


def diagnose(
    model: nn.Module, data: Data | None, run: Run, structure: Mapping[str, Any], config: PaCAConfig
) -> Metrics:
    """Return the metrics of an adapted model; nothing for a model that is not."""
    if not structure.get("columns"):
        return Metrics()
    columns = trained_columns(model, structure)
    whole = sum(trained_parameter(model, name).numel() for name in structure["trained"])
    trained = sum(values.numel() for _, values in columns.values())
    total = sum(parameter.numel() for parameter in model.parameters())
    if not structure["merged"]:
        total -= trained  # p repeats columns of the weight
    total += sum(math.prod(module.shape) for module in model.modules() if isinstance(module, PackedLinear))
    values = parameter_metrics(trained + whole, total)
    with adapted(model, structure, config) as works:
        if works and data is not None and data.test is not None:
            batch = move_batch(data.test.batch(range(min(_SAMPLES, len(data.test)))), run.device)
            values |= _measured(model, batch, run)
    return Metrics(values=values)


def _measured(model: nn.Module, batch: Batch, run: Run) -> dict[str, Metric]:

    def loss() -> Tensor:
        return run.task.loss(run.forward(model, batch), batch)

    with eval_mode(model), torch.inference_mode(False), torch.enable_grad():
        with record_kept(model, partial_layers(model)) as kept:
            kept_loss = loss()
        kept_loss.backward()
        model.zero_grad(set_to_none=True)
        error = gradient_error(model, loss)
        step = time_calls(lambda: loss().backward(), run.device, _BUDGET_S)
    return {
        "kept_in_layers": Metric(value=kept.layers, unit="B", better="lower"),
        "kept_for_backward": Metric(value=kept.total, unit="B", better="lower"),
        "step_time": Metric(value=step.median, unit="ms", better="lower"),
        "gradient_error": Metric(value=error, better="lower"),
    }
