"""Putting LSQ's quantizers into a model: which tensors, which bits, which initial steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import DataError, RunError
from eff.run import Run
from eff_quant_kit.layers import (
    QuantLayer,
    QuantMatMul,
    check_layers,
    execution_order,
    find_layers,
    initialise_inputs,
    is_matmul,
    name_quantizers,
    quant_layers,
    replace_module,
)
from eff_quant_kit.observers import minmax_symmetric
from eff_quant_kit.quantizer import Quantizer
from eff_quant_lsq.config import LSQConfig
from eff_quant_lsq.initial import gradient_scale, lsq_plus_input, lsq_plus_weight_step, lsq_step

PLUGIN = "quant_lsq"


def keep_teacher(model: nn.Module) -> nn.Module:
    """Return a frozen copy of the model as it came."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)


def insert_quantizers(model: nn.Module, config: LSQConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Return `model` with quantized layers; fills `structure`, or follows it where `run.restoring`.

    Raises:
        UnsupportedModelError: no convolution or linear layer. ConfigError: `exclude` names no layer.
        DataError: there is no training data to initialise from. RunError: NaN or infinity in it.
    """
    found = find_layers(model, config.matmuls)
    check_layers(PLUGIN, model, {n: m for n, m in found.items() if not is_matmul(m)}, config.exclude)
    if not run.restoring:
        batch = next(iter(run.batches("train", config.init_batch, config.init_batch)), None)
        if batch is None:
            raise DataError(
                f"{PLUGIN}: the training split is empty; input steps are initialised from data, use ?train=N above 0"
            )
        weighted = {name: module for name, module in found.items() if not is_matmul(module)}
        order = execution_order(model, weighted, lambda: run.forward(model, batch))
        structure.update(first=order[0], last=order[-1], signed={}, act_count={})
    first_last = {structure["first"], structure["last"]}
    for name, module in found.items():
        if name not in config.exclude:
            replace_module(model, name, _quantized(name, module, config, structure, name in first_last))
    name_quantizers(model)
    model.to(run.device)
    _prepare_weights(model, config, run)
    if not run.restoring:
        _initialise_inputs(model, config, structure, run, batch)
    _set_input_gradients(model, config, structure)
    return model


def _quantized(
    name: str, module: nn.Module, config: LSQConfig, structure: dict[str, Any], first_last: bool
) -> nn.Module:
    weight_bits = config.first_last_bits if first_last else config.weight_bits
    act_bits = config.first_last_bits if first_last else config.act_bits

    def input_quantizer(role: str) -> Quantizer | None:
        if act_bits is None:
            return None
        signed = bool(structure["signed"].get(f"{name}.{role}", False))
        return Quantizer(act_bits, signed, narrow_range=config.narrow_range and signed, with_offset=config.offset)

    if is_matmul(module):
        return QuantMatMul(module, input_quantizer("left_quantizer"), input_quantizer("right_quantizer"))
    weight: Tensor = module.weight  # type: ignore[assignment]
    axis = 0 if config.per_channel_weight else None
    quantizer = None
    if weight_bits is not None:
        quantizer = Quantizer(weight_bits, True, channels=len(weight), axis=axis, narrow_range=config.narrow_range)
    return QuantLayer(module, quantizer, input_quantizer("input_quantizer"))


def _prepare_weights(model: nn.Module, config: LSQConfig, run: Run) -> None:
    """Set the gradient scale of every weight step and, unless restoring, its initial value."""
    at_floor = []
    for layer in quant_layers(model).values():
        quantizer = layer.weight_quantizer
        if quantizer is None:
            continue
        weight: Tensor = layer.layer.weight  # type: ignore[assignment]
        count = weight.numel() // quantizer.scale.numel()
        quantizer.grad_scale = gradient_scale(config, count, quantizer.q_max)
        if not run.restoring:
            step = _weight_step(weight, quantizer, config)
            if quantizer.set_scale(step):
                at_floor.append(quantizer.name)
    if at_floor:
        others = f" and {len(at_floor) - 1} others" if len(at_floor) > 1 else ""
        run.warn(
            f"{PLUGIN}: {at_floor[0]}{others}: weights are all zero (in a channel); their steps start at the floor"
        )


def _weight_step(weight: Tensor, quantizer: Quantizer, config: LSQConfig) -> Tensor:
    if config.init == "minmax":
        return minmax_symmetric(weight, quantizer.q_max, quantizer.axis)
    if config.offset:
        return lsq_plus_weight_step(weight, quantizer.bits, quantizer.axis)
    return lsq_step(weight, quantizer.q_max, quantizer.axis)


def _initialise_inputs(model: nn.Module, config: LSQConfig, structure: dict[str, Any], run: Run, batch: Any) -> None:
    def initialise(quantizer: Quantizer, x: Tensor) -> None:
        x = x.detach()
        if not bool(torch.isfinite(x).all()):
            raise RunError(
                f"{PLUGIN}: {quantizer.name}: the first batch holds NaN or infinity; check the data and the model"
            )
        quantizer.set_signed(_is_signed(config, x))
        if quantizer.signed and config.narrow_range:
            quantizer.narrow_range = True
            quantizer.set_signed(True)
        structure["signed"][quantizer.name] = quantizer.signed
        structure["act_count"][quantizer.name] = x[0].numel() if config.act_count == "features" else x.numel()
        if config.offset:
            scale, offset = lsq_plus_input(x, quantizer.q_min, quantizer.q_max, config.offset_init)
            at_floor = quantizer.set_scale(scale, offset)
        else:
            whole = config.init == "minmax"
            at_floor = quantizer.set_scale((minmax_symmetric if whole else lsq_step)(x, quantizer.q_max))
        if at_floor:
            run.warn(f"{PLUGIN}: {quantizer.name}: the first batch is constant here; its step starts at the floor")

    initialise_inputs(model, initialise, lambda: run.forward(model, batch))
    for module in model.modules():
        if isinstance(module, Quantizer) and not bool(module.initialised):
            run.warn(f"{PLUGIN}: {module.name}: the forward pass never reaches it; left at step 1")
            module.set_scale(torch.ones_like(module.scale))


def _is_signed(config: LSQConfig, x: Tensor) -> bool:
    if config.act_signed != "auto":
        return config.act_signed == "true"
    # LSQ+ recommends the unsigned range with an offset: the offset takes the negative part.
    return not config.offset and bool((x < 0).any())


def _set_input_gradients(model: nn.Module, config: LSQConfig, structure: dict[str, Any]) -> None:
    for module in model.modules():
        if isinstance(module, Quantizer) and module.name in structure["act_count"]:
            module.grad_scale = gradient_scale(config, int(structure["act_count"][module.name]), module.q_max)
