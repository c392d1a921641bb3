"""Importance of output channels, and bits by it.

The paper's abstract names importance-based mixed precision without details. Here (our reading, named so in the report):

    I_j = mean over samples | sum_i w_ij dL/dw_ij |,  L = cross entropy to the float model's own prediction

softened by a temperature, because gradients of confident predictions vanish; divided by the channel's number of weights.
Bits start at the smallest candidate and go where I_j (err_j(b) - err_j(b')) per bit spent is largest.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.modes import gradients_for
from eff.run import Run
from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.grid import fake_quantize, level_range, search_scale
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.layers import CONVOLUTIONS
from eff_quant_kit.sensitivity import read_sensitivity

TEMPERATURE = 4.0


def channel_importance(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: CalibrationSet, run: Run
) -> dict[str, Tensor]:
    """Return I_j (C,) per layer, double.

    sum_i w_ij dL/dw_ij of one sample is sum over positions of (output_j - bias_j) dL/doutput_j, so one backward pass
    gives it for all samples of a batch.
    """
    totals = {name: torch.zeros(len(layer.weight), dtype=torch.float64) for name, layer in layers.items()}  # type: ignore[arg-type]
    outputs: list[tuple[str, Tensor]] = []
    handles = [layer.register_forward_hook(_keep(outputs, name)) for name, layer in layers.items()]
    try:
        with gradients_for(model, model.parameters()):
            for batch in calibration:
                outputs.clear()
                with torch.enable_grad():
                    loss = own_loss(run.forward(model, batch))
                    gradients = torch.autograd.grad(loss, [output for _, output in outputs], allow_unused=True)
                for (name, output), gradient in zip(outputs, gradients, strict=True):
                    if gradient is not None:
                        totals[name] += _saliency(layers[name], output.detach(), gradient).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: total / len(calibration) / layers[name].weight[0].numel()  # type: ignore[index,operator,union-attr]
        for name, total in totals.items()
    }


def _keep(outputs: list[tuple[str, Tensor]], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        outputs.append((name, output))
        return output.clone()  # what follows may work in place

    return hook


def own_loss(output: Tensor) -> Tensor:
    """Return the summed loss to the model's own prediction: classes by softened cross entropy, else half the squares."""
    if output.ndim == 2 and output.shape[1] > 1:
        return F.cross_entropy(output / TEMPERATURE, output.detach().argmax(1), reduction="sum")
    return 0.5 * output.square().sum()


def _saliency(layer: nn.Module, output: Tensor, gradient: Tensor) -> Tensor:
    """Return |sum_i w_ij dL/dw_ij| summed over samples, (C,)."""
    is_map = isinstance(layer, CONVOLUTIONS)
    if layer.bias is not None:
        shape = (-1, *[1] * (output.ndim - 2)) if is_map else (-1,)
        output = output - layer.bias.detach().view(shape)  # type: ignore[operator]
    product = (output * gradient).double()
    if is_map:
        return product.flatten(2).sum(2).abs().sum(0)
    return product.flatten(1, -2).sum(1).abs().sum(0) if product.ndim > 2 else product.abs().sum(0)


def errors_by_bits(layer: nn.Module, candidates: Sequence[int], config: GradPTQConfig) -> Tensor:
    """Return the squared weight error of each channel at each candidate, (C, K), double."""
    rows: Tensor = layer.weight.detach().flatten(1)  # type: ignore[operator,union-attr]
    found = []
    for candidate in candidates:
        bits = torch.full((len(rows),), candidate, device=rows.device)
        scale, zero = search_scale(rows, bits, config.symmetric, False, config.search_p)
        low, high = (item.to(rows.dtype)[:, None] for item in level_range(bits, config.symmetric, False))
        quantized = fake_quantize(rows, scale[:, None], zero[:, None], low, high)
        found.append((quantized - rows).double().square().sum(1))
    return torch.stack(found, 1).cpu()


def greedy_bits(gains: Tensor, sizes: Tensor, candidates: Sequence[int], mean_bits: float) -> list[int]:
    """Return the candidate per item, spending bits where the gain per bit is largest.

    Args:
        gains: (items, K) importance times error; falls with the bits.
        sizes: (items,) number of weights.
        candidates: ascending bits.
        mean_bits: budget per weight.
    """
    budget = mean_bits * float(sizes.sum()) - candidates[0] * float(sizes.sum())
    chosen = [0] * len(gains)
    heap: list[tuple[float, int, int]] = []

    def offer(item: int) -> None:
        """Offer the step up with the best gain per bit; it may skip a candidate."""
        at = chosen[item]
        steps = [
            (float(gains[item, at] - gains[item, to]) / ((candidates[to] - candidates[at]) * float(sizes[item])), to)
            for to in range(at + 1, len(candidates))
        ]
        for rate, to in steps:
            heapq.heappush(heap, (-rate, item, to))

    for item in range(len(gains)):
        offer(item)
    while heap:
        _, item, to = heapq.heappop(heap)
        cost = (candidates[to] - candidates[chosen[item]]) * float(sizes[item])
        if to <= chosen[item] or cost > budget + 1e-9:
            continue
        budget -= cost
        chosen[item] = to
        offer(item)
    return [candidates[index] for index in chosen]


def bits_of_file(path: Path, layers: Mapping[str, nn.Module], config: GradPTQConfig) -> dict[str, Tensor]:
    """Return bits (C,) per layer with mean at most `config.bits`, by the Fisher information in a file of `eff sensitivity`.

    Raises:
        RequestError: the file is missing, or lacks a layer, a candidate or the measure.
    """
    candidates = sorted(config.candidates)
    gains = torch.tensor(
        read_sensitivity(path).table("fisher", candidates, list(layers), "quant_gradptq"), dtype=torch.float64
    )
    sizes = torch.tensor([float(layer.weight.numel()) for layer in layers.values()])  # type: ignore[union-attr,operator]
    chosen = greedy_bits(gains, sizes, candidates, config.bits)
    return {name: torch.full((len(layer.weight),), b) for (name, layer), b in zip(layers.items(), chosen, strict=True)}  # type: ignore[arg-type]


def assign_bits(
    importance: Mapping[str, Tensor], layers: Mapping[str, nn.Module], config: GradPTQConfig
) -> dict[str, Tensor]:
    """Return bits (C,) per layer with mean at most `config.bits`."""
    candidates = sorted(config.candidates)
    gains, sizes, owners = [], [], []
    for name, layer in layers.items():
        errors = errors_by_bits(layer, candidates, config) * importance[name][:, None]
        count = layer.weight[0].numel()  # type: ignore[index,operator,union-attr]
        if config.mixed == "layer":
            gains.append(errors.sum(0, keepdim=True))
            sizes.append(torch.tensor([float(count * len(errors))]))
            owners.append((name, len(errors)))
        else:
            gains.append(errors)
            sizes.append(torch.full((len(errors),), float(count)))
            owners += [(name, 1)] * len(errors)
    chosen = greedy_bits(torch.cat(gains), torch.cat(sizes), candidates, config.bits)
    found: dict[str, list[int]] = {}
    for (name, repeats), bits in zip(owners, chosen, strict=True):
        found.setdefault(name, []).extend([bits] * repeats)
    return {name: torch.tensor(bits) for name, bits in found.items()}
