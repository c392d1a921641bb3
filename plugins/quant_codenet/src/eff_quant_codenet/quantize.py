"""The walk that puts CoDeNet's quantizers into a detector, its calibration, and what is left of it after training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from eff.errors import UnsupportedModelError
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_codenet.config import CoDeNetConfig
from eff_quant_codenet.deform import DeformConv2d, Tap
from eff_quant_codenet.network import CoDeNet
from eff_quant_codenet.quantizers import QuantConv, RunningRange
from eff_quant_kit.folding import fold_batch_norms
from eff_quant_kit.layers import check_layers, execution_order, find_layers, name_quantizers, replace_module

PLUGIN = "quant_codenet"
_FOLD_SAMPLES = 2


def quantize(model: nn.Module, config: CoDeNetConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Insert the quantizers, in place, and set the first ranges on training data.

    Args:
        model: a CoDeNet, or another detector of convolutions, whose layers then quantize their inputs.
        config: the options.
        structure: gets the (layer, norm) pairs and the first layer, or gives them where `run.restoring`.
        run: for data.

    Raises:
        UnsupportedModelError: there is no convolution.
    """
    found = find_layers(model)
    check_layers(PLUGIN, model, found, ())
    convolutions = {name: layer for name, layer in found.items() if isinstance(layer, nn.Conv2d)}
    if not convolutions:
        raise UnsupportedModelError(f"{PLUGIN}: {type(model).__name__} has no 2-d convolution; nothing to quantize")
    if not run.restoring:
        _describe(model, convolutions, structure, run)
        for name in found:
            if name not in convolutions:
                run.warn(f"{PLUGIN}: {name} is no 2-d convolution and stays in float")
    finished = bool(structure.get("finished"))
    norms = dict(structure["pairs"])
    taps = isinstance(model, CoDeNet)
    for name, layer in convolutions.items():
        bits = config.stem_bits if name == structure["first"] else config.weight_bits
        inputs = None if taps or name == structure["first"] else RunningRange(config.act_bits, config.ema_momentum)
        norm = norms.get(name)
        module = model.get_submodule(norm) if norm is not None else None
        assert module is None or isinstance(module, nn.BatchNorm2d)
        wrapped = QuantConv(layer, module, bits, config.percentile, inputs)
        if norm is not None:
            replace_module(model, norm, nn.Identity())
        replace_module(model, name, wrapped.finished() if finished else wrapped)
    _quantize_taps(model, config)
    name_quantizers(model)
    if not run.restoring:
        calibrate(model, config, run)
    return model


def _quantize_taps(model: nn.Module, config: CoDeNetConfig) -> None:
    for module in model.modules():
        if isinstance(module, DeformConv2d):
            module.round_offsets, module.round_in_training = config.round_offsets, True
    unused = {
        id(module.offset_tap)
        for module in model.modules()
        if isinstance(module, DeformConv2d) and (module.offset is None or config.round_offsets)
    }
    for name, tap in [(name, module) for name, module in model.named_modules() if isinstance(module, Tap)]:
        if id(tap) not in unused:
            replace_module(model, name, RunningRange(config.act_bits, config.ema_momentum))


def _describe(model: nn.Module, convolutions: Mapping[str, nn.Module], structure: dict[str, Any], run: Run) -> None:
    """Put into `structure` which norm follows which layer, and which layer comes first."""
    probe = copy.deepcopy(model)
    batch = next(iter(run.batches("train" if run.data and run.data.train is not None else "test", _FOLD_SAMPLES)))
    folding = fold_batch_norms(probe, lambda: run.forward(probe, batch))
    for name, reason in folding.left.items():
        run.warn(f"{PLUGIN}: batch norm {name} is left as it is: {reason}")
    structure["pairs"] = [pair for pair in folding.pairs if isinstance(model.get_submodule(pair[1]), nn.BatchNorm2d)]
    structure["first"] = execution_order(model, dict(convolutions), lambda: run.forward(model, batch))[0]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms and all(norm.num_batches_tracked is not None and not int(norm.num_batches_tracked) for norm in norms):
        run.warn(
            f"{PLUGIN}: this model has not been trained; quantization-aware training starts from a trained float detector"
        )


def calibrate(model: nn.Module, config: CoDeNetConfig, run: Run) -> None:
    """Set the ranges of all activations from the network with quantized weights."""
    ranges = [module for module in model.modules() if isinstance(module, RunningRange)]
    with eval_mode(model):
        for module in ranges:
            module.calibrating = True
        split = "train" if run.data is not None and run.data.train is not None else "test"
        with torch.no_grad():
            for batch in run.batches(split, config.calibration_samples):
                run.forward(model, batch)
        for module in ranges:
            module.calibrating = False


def finish(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Fold the norms for good and fix the scales, in place."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantConv)]:
        replace_module(model, name, module.finished())
    structure["finished"] = True
    name_quantizers(model)
    return model
