"""Batch normalisation folded into the convolution or linear layer before it.

    W' = W gamma / sqrt(var + eps),   b' = (b - mean) gamma / sqrt(var + eps) + beta

Which norm follows which layer is seen by running the model, not by reading it: so shared layers, functional calls,
concatenations and any `forward` are dealt with in one way. A fold that changes the outputs is taken back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant_kit.layers import CONVOLUTIONS, replace_module
from eff_quant_kit.neighbours import layer_of, remembered_outputs

TOLERANCE = 1e-3
"""Largest change of an output, relative to the largest output, that folding may make in float32."""

Norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Folded:
    """One fold, with what later steps need of the norm: gamma and beta are the channels' std and mean after it."""

    layer: str
    norm: str
    gamma: Tensor
    beta: Tensor
    eps: float


@dataclass(frozen=True)
class Folding:
    """What `fold_batch_norms` did: the folds, in the order of execution, and the norms it left, each with a reason."""

    folded: tuple[Folded, ...]
    left: dict[str, str]

    @property
    def pairs(self) -> list[list[str]]:
        """(layer, norm) as JSON values, for a method's `structure`."""
        return [[item.layer, item.norm] for item in self.folded]


def fold_batch_norms(model: nn.Module, forward: Callable[[], Any]) -> Folding:
    """Fold every batch norm that only ever sees the output of one layer; the model is changed in place.

    Args:
        model: put into eval mode.
        forward: runs `model` on one batch and returns its output (a tensor, or containers of tensors).

    Returns:
        The folds, and why other batch norms were left.
    """
    model.eval()
    pairs, left = _pairs(model, forward)
    with torch.no_grad():
        before = _tensors(forward())
    folded = [_fold(model, layer, norm) for layer, norm in pairs]
    with torch.no_grad():
        same = _equal(before, _tensors(forward()))
    if same:
        return Folding(tuple(item[0] for item in folded), left)
    for _, undo in reversed(folded):  # somebody else reads a layer's output: find out whose, one by one
        undo(model)
    kept = []
    for layer, norm in pairs:
        record, undo = _fold(model, layer, norm)
        with torch.no_grad():
            fits = _equal(before, _tensors(forward()))
        if fits:
            kept.append(record)
        else:
            undo(model)
            left[norm] = f"the output of {layer} is used elsewhere too"
    return Folding(tuple(kept), left)


def fold_pairs(model: nn.Module, pairs: Sequence[Sequence[str]]) -> nn.Module:
    """Fold the named (layer, norm) pairs without running the model: for a checkpoint that is being rebuilt."""
    model.eval()
    for layer, norm in pairs:
        _fold(model, layer, norm)
    return model


def _pairs(model: nn.Module, forward: Callable[[], Any]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Return (layer, norm) pairs in the order of execution, and the norms that cannot be folded with the reason."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, *CONVOLUTIONS))}
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    seen: dict[str, list[str | None]] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda module, arguments: seen.setdefault(name, []).append(layer_of(outputs, arguments[0]))

    handles = [module.register_forward_pre_hook(look(name)) for name, module in norms.items()]
    try:
        with remembered_outputs(layers) as outputs, torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(name for name, _ in outputs)
    left: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for name in [*seen, *(name for name in norms if name not in seen)]:
        if reason := _obstacle(norms[name], seen.get(name, []), calls):
            left[name] = reason
        else:
            pairs.append((str(seen[name][0]), name))
    for layer in {layer for layer, _ in pairs}:  # one layer cannot take two norms
        claimed = [norm for other, norm in pairs if other == layer]
        if len(claimed) > 1:
            left |= dict.fromkeys(claimed, f"{layer} feeds several norms")
    return [pair for pair in pairs if pair[1] not in left], left


def _obstacle(norm: nn.Module, sources: list[str | None], calls: Mapping[str, int]) -> str:
    if not isinstance(norm, Norm):
        return f"{type(norm).__name__} is no plain batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if not sources:
        return "the forward pass never reaches it"
    if len(sources) > 1:
        return f"it is called {len(sources)} times"
    if sources[0] is None:
        return "its input is not the output of a layer"
    if calls[sources[0]] > 1:
        return f"{sources[0]} is called {calls[sources[0]]} times"
    return ""


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> tuple[Folded, Callable[[nn.Module], None]]:
    """Fold one pair; return the record and what takes it back."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    weight, bias = layer.weight, layer.bias
    mean: Tensor = norm.running_mean.double()  # type: ignore[union-attr,operator,assignment]
    var: Tensor = norm.running_var.double()  # type: ignore[union-attr,operator,assignment]
    eps = float(norm.eps)  # type: ignore[arg-type]
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()  # type: ignore[operator]
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()  # type: ignore[operator]
    factor = gamma / (var + eps).sqrt()
    old_bias = torch.zeros_like(mean) if bias is None else bias.detach().double()  # type: ignore[operator]
    shape = (-1, *[1] * (weight.ndim - 1))  # type: ignore[union-attr,operator]
    like: Tensor = weight.detach()  # type: ignore[union-attr,operator,assignment]
    layer.weight = nn.Parameter((like.double() * factor.view(shape)).to(like.dtype))
    layer.bias = nn.Parameter(((old_bias - mean) * factor + beta).to(like.dtype))
    identity = nn.Identity()
    replace_module(model, norm_name, identity)

    def undo(model: nn.Module) -> None:
        layer.weight, layer.bias = weight, bias
        replace_module(model, norm_name, norm)

    record = Folded(layer_name, norm_name, gamma.to(like.dtype), beta.to(like.dtype), eps)
    return record, undo


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.clone()]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, (list, tuple)) else []


def _equal(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(
        bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=1e-6))
        for a, b in zip(after, before, strict=True)
        if b.is_floating_point() and b.numel()
    )
