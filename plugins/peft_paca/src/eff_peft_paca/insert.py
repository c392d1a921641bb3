"""Putting trained columns into a model, and turning it back into plain layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, UnsupportedModelError
from eff.run import Run
from eff_peft_kit.delta import Delta, base_checksum, matrix
from eff_peft_kit.freezing import TrainBias, freeze
from eff_peft_kit.targets import has_computed_weight, is_quantized, output_layer, replace_module, select_targets
from eff_peft_paca.config import PaCAConfig
from eff_peft_paca.layer import PartialLayer, partial_layers
from eff_peft_paca.packed import PackedLinear
from eff_peft_paca.selection import PLUGIN, check_patterns, choose_columns, layer_option

_BIAS: dict[str, TrainBias] = {"none": "none", "paca_only": "targets", "all": "all"}


def insert_columns(model: nn.Module, config: PaCAConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Return `model` with trained columns; fills `structure`, or follows it where `run.restoring`.

    Raises:
        UnsupportedModelError: nothing to adapt, or a shared weight. ConfigError: an option fits no layer.
        DataError: gradient norms were asked for without training data.
    """
    if not run.restoring:
        _plan(model, config, structure, run)
    elif not structure["merged"]:  # training may go on
        kept = set(structure["trained"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in kept)
    for name in structure["columns"]:
        layer = model.get_submodule(name)
        if config.quantize_base != "none" and not isinstance(layer, PackedLinear):
            layer.requires_grad_(False)
            packed = PackedLinear(layer, config.quantize_base).to(run.device)
            if f"{name}.bias" in structure["trained"] and packed.bias is not None:
                packed.bias.requires_grad_(True)
            replace_module(model, name, packed)
    if not structure["merged"]:
        period = 2 * (run.train.accumulate or 1) if config.write_back == "reference" else 0
        wrap(model, structure, config, period, run.restoring)
    return model


def _plan(model: nn.Module, config: PaCAConfig, structure: dict[str, Any], run: Run) -> None:
    """Decide on layers, columns and what else is trained; freeze the rest."""
    inputs = tuple(value.to(run.device) for value in run.task.example_inputs(1))
    head = output_layer(model, lambda: model(*inputs))
    targets = select_targets(PLUGIN, model, config.targets, head)
    check_patterns(config, targets)
    for name, layer in targets.items():
        if config.quantize_base != "none" and (has_computed_weight(layer) or isinstance(layer, nn.Conv2d)):
            what = "has a quantized weight already" if has_computed_weight(layer) else "is a convolution"
            raise ConfigError(
                f"{PLUGIN}: quantize_base={config.quantize_base} packs linear layers, and '{name}' {what}; "
                "use quantize_base=none or leave it out of targets"
            )
        if not (layer.layer if is_quantized(layer) else layer).weight.is_floating_point():  # type: ignore[union-attr,operator]
            raise UnsupportedModelError(f"{PLUGIN}: the weight of '{name}' holds no floating point numbers")
    columns = choose_columns(model, targets, config, run)
    whole = [head] if head is not None and config.train_head else []
    structure["trained"] = freeze(model, whole, _BIAS[config.train_bias], targets)
    structure["columns"] = {name: index.tolist() for name, index in columns.items()}
    structure["merged"] = False


def wrap(
    model: nn.Module, structure: Mapping[str, Any], config: PaCAConfig, period: int = 0, restoring: bool = False
) -> None:
    """Put a `PartialLayer` around every adapted layer, in place."""
    for name, index in structure["columns"].items():
        layer = model.get_submodule(name)
        inner: Any = layer.layer if has_computed_weight(layer) else layer
        if isinstance(getattr(inner, "weight", None), nn.Parameter):
            inner.weight.requires_grad_(False)
        r = len(index)
        alpha = layer_option(name, config.alpha, config.alpha_pattern)
        partial = PartialLayer(layer, torch.tensor(index, dtype=torch.long), alpha / r, period, restoring)
        replace_module(model, name, partial)


def merge(model: nn.Module, structure: dict[str, Any], config: PaCAConfig, run: Run) -> nn.Module:
    """Return the model with plain layers, the trained columns in their weights; no number is added or moved.

    A quantized base takes them only when `merge=true` asks for it, since quantizing rounds them.
    """
    layers = partial_layers(model)
    for layer in layers.values():
        layer.write_back()
    is_quantized_base = any(not layer.in_place for layer in layers.values())
    if not (config.merge if config.merge is not None else not is_quantized_base):
        return model
    if is_quantized_base:
        run.warn(f"{PLUGIN}: merge=true rounds the trained columns to the grid of the quantized base")
    unwrap(model)
    structure["merged"] = True
    return model


def unwrap(model: nn.Module) -> None:
    """Put the layers back where they were, with their columns."""
    for name, partial in partial_layers(model).items():
        layer = partial.layer
        if isinstance(layer, PackedLinear):
            layer.repack(partial.dense_weight())
        elif not partial.in_place:  # a fake-quantized layer rounds when it computes
            weight = matrix(layer)
            weight[:, partial.index] = partial.columns().to(weight.dtype)
        replace_module(model, name, layer)


@contextmanager
def adapted(model: nn.Module, structure: Mapping[str, Any], config: PaCAConfig) -> Iterator[bool]:
    """Let a finished model be as it was in training, for measuring; yields whether it can.

    Only what was trained requires a gradient meanwhile.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    merged = bool(structure.get("merged"))
    if merged and any(has_computed_weight(model.get_submodule(name)) for name in structure["columns"]):
        yield False  # the columns have been rounded away
        return
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        if merged:
            wrap(model, structure, config)
        for layer in partial_layers(model).values():
            layer.p.requires_grad_(True)
        for name in structure["trained"]:
            trained_parameter(model, name).requires_grad_(True)
        yield True
    finally:
        if merged:
            unwrap(model)
        model.zero_grad(set_to_none=True)
        for parameter, flag in before:
            parameter.requires_grad_(flag)


def trained_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by the name it had in the base model."""
    owner, _, last = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if isinstance(module, PartialLayer):
        module = module.layer if module.in_place else module.layer.layer
    parameter: nn.Parameter = getattr(module, last)
    return parameter


def trained_columns(model: nn.Module, structure: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (index, columns) of every adapted layer."""
    found = {}
    for name, index in structure["columns"].items():
        layer = model.get_submodule(name)
        place = torch.tensor(index, dtype=torch.long)
        if isinstance(layer, PartialLayer):
            found[name] = (place, layer.columns())
        else:
            weight = layer.weight().detach() if has_computed_weight(layer) else matrix(layer)  # type: ignore[operator]
            found[name] = (place, weight[:, place.to(weight.device)])
    return found


def make_delta(
    model: nn.Module, structure: Mapping[str, Any], config: PaCAConfig, original: Mapping[str, Tensor]
) -> Delta:
    """Return what the fine-tuning changed.

    Args:
        model: the finished model.
        structure: of the method.
        config: of the method.
        original: layer -> its columns before training, for differences.

    Raises:
        UnsupportedModelError: differences were asked for, and the columns before training are not known.
    """
    columns = trained_columns(model, structure)
    bases = {}
    for name, (index, values) in columns.items():
        layer = model.get_submodule(name)
        inner = layer.layer if isinstance(layer, PartialLayer) else layer
        if not has_computed_weight(inner):
            bases[name] = base_checksum(matrix(inner), index)
        if config.delta == "difference":
            if name not in original:
                raise UnsupportedModelError(
                    f"{PLUGIN}: the columns before training are not kept in the model's file; "
                    "take model.delta of the run, or use delta=columns"
                )
            columns[name] = (index, values.to(original[name].dtype) - original[name].to(values.device))
    whole = {name: trained_parameter(model, name) for name in structure["trained"]}
    return Delta(config.delta, columns, whole, bases, PLUGIN)
