"""Layers of several widths: one stored weight, an input quantizer and a batch norm for each width."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import DataError, RequestError, RunError
from eff.modes import eval_mode
from eff.run import Run
from eff_kernels.packing import pack_bits
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.rounding import double_round, integers, limits, shifted, value
from eff_quant_kit.layers import check_layers, execution_order, find_layers, replace_module, warn_left_in_float
from eff_quant_kit.learned_steps import lsq_step
from eff_quant_kit.packed import Packed, packed_norms, packed_scales
from eff_quant_kit.quantizer import Quantizer

PLUGIN = "quant_double_rounding"


class SwitchLayer(nn.Module):
    """A convolution or linear layer at the width `width`."""

    def __init__(self, layer: nn.Module, config: DoubleRoundingConfig, signed: bool):
        super().__init__()
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        self.layer, self.config = layer, config
        self.high = self.width = config.widths[0]
        start = lsq_step(weight, limits(self.high)[1]).clamp(min=1e-8)
        self.scale = nn.Parameter(start)
        self.grad_scale = 1 / math.sqrt(weight.numel() * limits(self.high)[1])
        self.inputs = nn.ModuleDict({str(b): Quantizer(config.inputs(b), signed) for b in config.widths})

    def set_input_size(self, values: int) -> None:
        """Set the gradient scales of the inputs' scales for inputs of this many values a sample."""
        for quantizer in self.inputs.values():
            quantizer.grad_scale = 1 / math.sqrt(values * quantizer.q_max)  # type: ignore[assignment, operator]

    def stored(self) -> Tensor:
        """Return the integers of the highest width, int32."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator]
        return integers(weight, self.scale.detach(), self.high)

    def weight(self) -> Tensor:
        """Return the weight of the current width."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        return double_round(weight, self.scale, self.high, self.width, self.config.rounding, self.grad_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output at the current width."""
        x = self.inputs[str(self.width)](x)
        weight, bias = self.weight(), self.layer.bias
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, bias)  # type: ignore[arg-type]
        output: Tensor = self.layer._conv_forward(x, weight, bias)  # type: ignore[operator]
        return output

    def nested(self) -> bool:
        """Whether every width computes with the shift of the stored integers, bit for bit."""
        kept, stored, same = self.width, self.stored(), True
        with torch.no_grad():
            for width in self.config.widths:
                self.width = width
                expected = value(stored, self.scale, self.high, width, self.config.rounding)
                levels = shifted(stored, self.high, width, self.config.rounding)
                low, top = limits(width)
                same &= torch.equal(self.weight(), expected) and bool(((levels >= low) & (levels <= top)).all())
        self.width = kept
        return same

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the weight, integers of the highest width, and the inputs' scales."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        low = limits(self.high)[0]
        details = {
            "kind": "levels", "bits": self.high, "q_min": low, "shape": list(weight.shape), "axis": None,
            "scale": f"{prefix}scale", "offset": None, "dtype": str(weight.dtype).removeprefix("torch."),
        }  # fmt: skip
        weights = Packed(pack_bits(self.stored().cpu() - low, self.high), details)
        return {f"{prefix}layer.weight": weights, **packed_scales(self.inputs, f"{prefix}inputs.")}

    def extra_repr(self) -> str:
        """Return the width for printing."""
        return f"width={self.width} of {list(self.config.widths)}"


class SwitchNorm(nn.Module):
    """A batch norm with a set of weights and statistics per width, or per pair of widths of the layers before it."""

    def __init__(self, norm: nn.Module, config: DoubleRoundingConfig):
        super().__init__()
        names = [str(b) for b in config.widths]
        if config.mixed:
            names += [f"{one}_{other}" for one in config.widths for other in config.widths]
        self.norms = nn.ModuleDict({name: copy.deepcopy(norm) for name in names})
        self.active = names[0]

    @property
    def folds(self) -> bool:
        """Whether a set is a factor and a summand by channel where nothing is trained."""
        norm: Any = self.norms[self.active]
        return norm.weight is not None and norm.running_mean is not None

    def folded(self, name: str) -> Tensor:
        """Return the factors and summands (2, C) of a set with the values of float16, beyond its range as they are."""
        norm: Any = self.norms[name]
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        pair = torch.stack([factor, norm.bias - norm.running_mean * factor])
        half = pair.half().to(pair.dtype)
        return torch.where(torch.isfinite(half), half, pair)

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised by the current set; where nothing is trained, with what the file holds of it."""
        if self.training or not self.folds:
            y: Tensor = self.norms[self.active](x)
            return y
        factor, summand = self.folded(self.active).to(x.dtype).view(2, 1, -1, *[1] * (x.ndim - 2))
        return x * factor + summand

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the sets: four take as much as one batch norm in float32."""
        if not self.folds:
            return {}
        sets = torch.stack([self.folded(name) for name in self.norms])
        half = sets.half()
        return packed_norms(self.norms, half if bool(torch.isfinite(half).all()) else sets, f"{prefix}norms.")


def insert(model: nn.Module, config: DoubleRoundingConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Return `model` with switchable layers and norms; fills `structure` or follows it where `run.restoring`.

    Raises:
        UnsupportedModelError, ConfigError: nothing to quantize, or a name that is none.
        DataError: no training data to initialise the inputs from.
    """
    found = find_layers(model)
    batch: Any = None
    if not run.restoring:
        batch = next(iter(run.batches("train", config.init_batch, config.init_batch)), None)
        if batch is None:
            raise DataError(f"{PLUGIN}: the training split is empty; the inputs' scales are initialised from data")
        structure["layers"] = choose_layers(model, config, run)
        warn_left_in_float(PLUGIN, model, run)
        structure["signed"] = _signed(model, structure["layers"], lambda: run.forward(model, batch))
        norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        both = {**{name: found[name] for name in structure["layers"]}, **norms}
        structure["norms"] = _layers_before(execution_order(model, both, lambda: run.forward(model, batch)), norms)
    for name in structure["layers"]:
        replace_module(model, name, SwitchLayer(found[name], config, bool(structure["signed"][name])))
    for name in structure["norms"]:
        replace_module(model, name, SwitchNorm(model.get_submodule(name), config))
    model.to(run.device)
    for name, layer in switch_layers(model).items():
        for b, quantizer in layer.inputs.items():
            quantizer.name = f"{name}.inputs.{b}"  # type: ignore[assignment]
        if size := structure.get("input_sizes", {}).get(name):
            layer.set_input_size(int(size))
    if not run.restoring:
        _initialise(model, config, structure, run, batch)
    switch(model, structure, config.widths[0])
    return model


def choose_layers(model: nn.Module, config: DoubleRoundingConfig, run: Run) -> list[str]:
    """Return the layers to quantize in the order in which they run: all but the first and the last, or but `exclude`."""
    found = find_layers(model)
    inputs = tuple(item.to(run.device) for item in run.task.example_inputs(2))
    order = execution_order(model, found, lambda: model(*inputs))
    exclude = tuple(dict.fromkeys((order[0], order[-1]))) if config.exclude is None and order else config.exclude or ()
    check_layers(PLUGIN, model, found, exclude)
    return [name for name in order if name not in exclude]


def _signed(model: nn.Module, names: list[str], forward: Any) -> dict[str, bool]:
    """Return by layer whether its input has negative values."""
    seen: dict[str, bool] = dict.fromkeys(names, False)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.__setitem__(name, bool((arguments[0] < 0).any()))
        )
        for name in names
    ]
    with eval_mode(model), torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return seen


def _layers_before(order: list[str], norms: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return by norm the last two quantized layers before it, the later one last; fewer where there are not two."""
    passed: list[str] = []
    found = {}
    for name in order:
        if name in norms:
            found[name] = passed[-2:]
        else:
            passed.append(name)
    return found


def _initialise(
    model: nn.Module, config: DoubleRoundingConfig, structure: dict[str, Any], run: Run, batch: Any
) -> None:
    """Set the scales of the inputs, width by width, from what the layers see at that width."""
    sizes = structure.setdefault("input_sizes", {})
    for width in config.widths:
        switch(model, structure, width)
        handles = []
        for name, layer in switch_layers(model).items():

            def start(layer: nn.Module, arguments: tuple[Any, ...], name: str = name) -> None:
                assert isinstance(layer, SwitchLayer)
                quantizer: Any = layer.inputs[str(layer.width)]
                if not bool(quantizer.initialised):
                    quantizer.set_scale(lsq_step(arguments[0], quantizer.q_max))
                sizes[name] = arguments[0][0].numel()
                layer.set_input_size(sizes[name])

            handles.append(layer.register_forward_pre_hook(start))
        with eval_mode(model), torch.no_grad():
            run.forward(model, batch)
        for handle in handles:
            handle.remove()


def switch_layers(model: nn.Module) -> dict[str, SwitchLayer]:
    """Return the switchable layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SwitchLayer)}


def switch(model: nn.Module, structure: Mapping[str, Any], widths: int | Mapping[str, int]) -> None:
    """Set the width of all layers, or of each, with the norms that belong to it.

    Raises:
        RequestError: the model was not trained for a width. RunError: a norm has no set for a pair of widths.
    """
    layers = switch_layers(model)
    chosen = dict.fromkeys(layers, widths) if isinstance(widths, int) else dict(widths)
    for name, layer in layers.items():
        if chosen.get(name) not in layer.config.widths:
            raise RequestError(
                f"{PLUGIN}: {name} was not trained for {chosen.get(name)} bits; trained are "
                f"{', '.join(str(b) for b in layer.config.widths)}"
            )
        layer.width = chosen[name]  # type: ignore[assignment]
    for name, before in structure["norms"].items():
        norm = model.get_submodule(name)
        if not isinstance(norm, SwitchNorm):
            raise RunError(f"{PLUGIN}: {name} is no switchable norm")
        pair = [chosen[item] for item in before] or [next(iter(chosen.values()))]
        norm.active = str(pair[-1]) if isinstance(widths, int) else f"{pair[0]}_{pair[-1]}"
        if norm.active not in norm.norms:
            raise RunError(f"{PLUGIN}: {name} has no set of statistics for the widths {norm.active}")
