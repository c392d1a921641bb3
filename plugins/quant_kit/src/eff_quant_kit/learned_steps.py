"""Quantizers whose steps are learned with the weights: which tensors, which bits, which initial steps, which gradients.

LSQ (Esser et al., ICLR 2020, arXiv:1902.08153): 2 mean|v| / sqrt(QP), gradients times 1 / sqrt(N QP); LSQ+ (Bhalgat et al.,
CVPR workshops 2020, arXiv:2004.09576) for quantizers with offset.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

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
    warn_left_in_float,
)
from eff_quant_kit.observers import minmax_affine, minmax_symmetric, mse_affine
from eff_quant_kit.quantizer import Quantizer


class StepOptions(Protocol):
    """What insertion asks of a method's options; quant_lsq's have the meanings."""

    @property
    def weight_bits(self) -> int | None: ...
    @property
    def act_bits(self) -> int | None: ...
    @property
    def first_last_bits(self) -> int | None: ...
    @property
    def per_channel_weight(self) -> bool: ...
    @property
    def act_signed(self) -> str: ...
    @property
    def grad_scale(self) -> str: ...
    @property
    def act_count(self) -> str: ...
    @property
    def offset(self) -> bool: ...
    @property
    def offset_init(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def narrow_range(self) -> bool: ...
    @property
    def matmuls(self) -> bool: ...
    @property
    def init_batch(self) -> int: ...
    @property
    def exclude(self) -> tuple[str, ...]: ...


def insert_quantizers(
    plugin: str, model: nn.Module, config: StepOptions, structure: dict[str, Any], run: Run
) -> nn.Module:
    """Return `model` with quantized layers; fills `structure`, or follows it where `run.restoring`.

    Raises:
        UnsupportedModelError: no convolution or linear layer. ConfigError: `exclude` names no layer.
        DataError: there is no training data to initialise from. RunError: NaN or infinity in it.
    """
    found = find_layers(model, config.matmuls)
    check_layers(plugin, model, {n: m for n, m in found.items() if not is_matmul(m)}, config.exclude)
    warn_left_in_float(plugin, model, run)
    if not run.restoring:
        batch = next(iter(run.batches("train", config.init_batch, config.init_batch)), None)
        if batch is None:
            raise DataError(
                f"{plugin}: the training split is empty; input steps are initialised from data, use ?train=N above 0"
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
    _prepare_weights(plugin, model, config, run)
    if not run.restoring:
        _initialise_inputs(plugin, model, config, structure, run, batch)
    _set_input_gradients(model, config, structure)
    return model


def _quantized(
    name: str, module: nn.Module, config: StepOptions, structure: dict[str, Any], first_last: bool
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


def _prepare_weights(plugin: str, model: nn.Module, config: StepOptions, run: Run) -> None:
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
            f"{plugin}: {at_floor[0]}{others}: weights are all zero (in a channel); their steps start at the floor"
        )


def _weight_step(weight: Tensor, quantizer: Quantizer, config: StepOptions) -> Tensor:
    if config.init == "minmax":
        return minmax_symmetric(weight, quantizer.q_max, quantizer.axis)
    if config.offset:
        return lsq_plus_weight_step(weight, quantizer.bits, quantizer.axis)
    return lsq_step(weight, quantizer.q_max, quantizer.axis)


def _initialise_inputs(
    plugin: str, model: nn.Module, config: StepOptions, structure: dict[str, Any], run: Run, batch: Any
) -> None:
    def initialise(quantizer: Quantizer, x: Tensor) -> None:
        x = x.detach()
        if not bool(torch.isfinite(x).all()):
            raise RunError(
                f"{plugin}: {quantizer.name}: the first batch holds NaN or infinity; check the data and the model"
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
            run.warn(f"{plugin}: {quantizer.name}: the first batch is constant here; its step starts at the floor")

    initialise_inputs(model, initialise, lambda: run.forward(model, batch))
    for module in model.modules():
        if isinstance(module, Quantizer) and not bool(module.initialised):
            run.warn(f"{plugin}: {module.name}: the forward pass never reaches it; left at step 1")
            module.set_scale(torch.ones_like(module.scale))


def _is_signed(config: StepOptions, x: Tensor) -> bool:
    if config.act_signed != "auto":
        return config.act_signed == "true"
    # LSQ+ recommends the unsigned range with an offset: the offset takes the negative part.
    return not config.offset and bool((x < 0).any())


def _set_input_gradients(model: nn.Module, config: StepOptions, structure: dict[str, Any]) -> None:
    for module in model.modules():
        if isinstance(module, Quantizer) and module.name in structure["act_count"]:
            module.grad_scale = gradient_scale(config, int(structure["act_count"][module.name]), module.q_max)


def lsq_step(v: Tensor, q_max: int, axis: int | None = None) -> Tensor:
    """Return 2 mean|v| / sqrt(QP), per tensor or per index of `axis` (LSQ sec. 2.1)."""
    magnitude = v.detach().float().abs()
    mean = magnitude.mean() if axis is None else magnitude.mean([index for index in range(v.ndim) if index != axis])
    return 2 * mean / math.sqrt(q_max)


def lsq_plus_weight_step(v: Tensor, bits: int, axis: int | None = None) -> Tensor:
    """Return max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(bits-1) (LSQ+ sec. 3.2)."""
    dims = None if axis is None else [index for index in range(v.ndim) if index != axis]
    v = v.detach().float()
    mu, sigma = v.mean(dims), v.std(dims, correction=0)
    return (mu - 3 * sigma).abs().maximum((mu + 3 * sigma).abs()) / 2 ** (bits - 1)


def lsq_plus_input(x: Tensor, q_min: int, q_max: int, how: str) -> tuple[Tensor, Tensor]:
    """Return scale and offset for inputs, by least squares or min-max (LSQ+ sec. 3.2)."""
    return mse_affine(x, q_min, q_max) if how == "mse" else minmax_affine(x, q_min, q_max)


def gradient_scale(config: StepOptions, count: int, q_max: int) -> float:
    """Return g for a step that covers `count` elements (LSQ sec. 2.2)."""
    if config.grad_scale == "none":
        return 1.0
    return 1.0 / math.sqrt(count * (q_max if config.grad_scale == "lsq" else 1))
