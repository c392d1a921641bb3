"""CoDeNet's quantizers (Huang et al., FPGA 2021, sec. 4.2, and the authors' code), and the walk that inserts them.

    weights       w' = w gamma / sqrt(var + eps),  b' = (b - mean) gamma / sqrt(var + eps) + beta     running statistics
                  t = max(|min w'|, |max w'|) per output channel,  q = clip(round(w' (2^(k-1) - 1) / t), -2^(k-1), 2^(k-1) - 1)
    activations   [low, high]: running averages of a tensor's min and max, 0 included;
                  scale (high - low) / (2^8 - 1), integer zero point, codes clamped to 0..255

Rounding passes the gradient on: for the weights all of it, for the activations where they lie within the range. Biases stay
in float, and so does the image. The range includes 0 because zero padding must be a code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff.run import Run
from eff_kernels.fake_quant import fake_quant
from eff_quant_codenet.config import CoDeNetConfig
from eff_quant_codenet.deform import DeformConv2d, Tap
from eff_quant_codenet.network import CoDeNet
from eff_quant_kit.folding import fold_batch_norms
from eff_quant_kit.layers import QuantLayer, check_layers, execution_order, find_layers, name_quantizers, replace_module
from eff_quant_kit.quantizer import SMALLEST_SCALE, Quantizer

PLUGIN = "quant_codenet"
FEW_WEIGHTS, FEW_SHARE = 10, 0.95
LOWER, UPPER = 0.001, 0.999
_FOLD_SAMPLES = 2


class RunningRange(Quantizer):
    """An activation quantizer whose range follows its tensor while training. One of these is shared by a stage.

    While `calibrating` it takes the union of what it sees and quantizes nothing.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float):
        super().__init__(bits, signed=False, with_offset=True)
        self.momentum = momentum
        self.calibrating = False
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.scale.requires_grad_(False)
        assert self.offset is not None
        self.offset.requires_grad_(False)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range towards that of `x`; the first one sets it."""
        low, high = (value.float() for value in x.detach().aminmax())
        if not bool(self.initialised):
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.calibrating:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)
        floor, ceiling = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = ((ceiling - floor) / self.q_max).clamp(min=SMALLEST_SCALE)
        self.set_scale(scale, (floor / scale).round() * scale)

    @property
    def zero_point(self) -> int:
        """The code of 0."""
        assert self.offset is not None
        return round(-float(self.offset.detach()) / float(self.scale.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` fake-quantized."""
        if self.calibrating:
            self.observe(x)
            return x
        if not self.training:
            return super().forward(x)
        self.observe(x)
        assert self.offset is not None
        scale, offset = self.scale.detach().clone(), self.offset.detach().clone()  # a stage's next block moves them on
        return fake_quant(x, scale, self.q_min, self.q_max, offset=offset)


class QuantConv(nn.Module):
    """A convolution that folds its batch norm and quantizes the product in every forward pass."""

    def __init__(
        self, layer: nn.Conv2d, norm: nn.BatchNorm2d | None, bits: int, percentile: bool, inputs: Quantizer | None
    ):
        super().__init__()
        self.layer, self.norm, self.percentile = layer, norm, percentile
        self.input_quantizer = inputs
        self.weight_quantizer = Quantizer(bits, channels=layer.out_channels, axis=0)
        self.weight_quantizer.scale.requires_grad_(False)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the norm's running statistics in them."""
        weight, bias, norm = self.layer.weight, self.layer.bias, self.norm
        if norm is None:
            return weight, bias
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        return weight * factor.view(-1, 1, 1, 1), shift * factor + norm.bias

    @torch.no_grad()
    def _levels_of(self, weight: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        quantizer.scale.copy_((weight_range(weight, self.percentile) / quantizer.q_max).clamp(min=SMALLEST_SCALE))
        quantizer.initialised.fill_(True)
        rounded: Tensor = quantizer(weight)
        return rounded

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for quantized weights."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight, bias = self.folded()
        weight = weight + (self._levels_of(weight) - weight).detach()
        return self.layer._conv_forward(x, weight, bias)

    def finished(self) -> QuantLayer:
        """Return the layer with the norm folded for good and its scales fixed."""
        with torch.no_grad():
            weight, bias = self.folded()
            self._levels_of(weight)
        layer = self.layer
        layer.weight = nn.Parameter(weight.detach().clone())
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        return QuantLayer(layer, self.weight_quantizer, self.input_quantizer)


def weight_range(weight: Tensor, percentile: bool) -> Tensor:
    """Return t per output channel: the larger of |min| and |max|, or of the percentiles that stand for them."""
    flat = weight.detach().flatten(1)
    count = flat.shape[1]
    low, high = flat.aminmax(dim=1)
    if percentile and count < FEW_WEIGHTS:
        low, high = FEW_SHARE * low, FEW_SHARE * high
    elif percentile:
        low = flat.kthvalue(math.ceil(count * LOWER), 1).values
        high = flat.kthvalue(math.ceil(count * UPPER), 1).values
    return torch.maximum(low.abs(), high.abs())


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
    was_training = model.training
    model.eval()
    for module in ranges:
        module.calibrating = True
    split = "train" if run.data is not None and run.data.train is not None else "test"
    with torch.no_grad():
        for batch in run.batches(split, config.calibration_samples):
            run.forward(model, batch)
    for module in ranges:
        module.calibrating = False
    model.train(was_training)


def finish(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Fold the norms for good and fix the scales, in place."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, QuantConv)]:
        replace_module(model, name, module.finished())
    structure["finished"] = True
    name_quantizers(model)
    return model
