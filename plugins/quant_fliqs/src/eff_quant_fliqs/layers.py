"""Layers that can take any of the formats, and what each costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ConfigError, RequestError
from eff.run import Run
from eff_kernels.packing import pack_bits
from eff_quant_fliqs.config import FLIQSConfig
from eff_quant_fliqs.formats import Format, best_share, magnitude, parse, quantize, scale_of
from eff_quant_kit.layers import check_layers, execution_order, find_layers, replace_module, warn_left_in_float
from eff_quant_kit.packed import Packed

PLUGIN = "quant_fliqs"
FIXED = "int8"


class FormatLayer(nn.Module):
    """A convolution or linear layer whose weight and input take the format `choice`."""

    def __init__(self, layer: nn.Module, formats: tuple[Format, ...], config: FLIQSConfig):
        super().__init__()
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.layer, self.formats, self.config = layer, formats, config
        self.choice = 0
        self.dims = tuple(range(1, weight.ndim)) if config.per_channel else None
        self.weight_scale: Tensor
        """Scale of the finished weight; 0 while it follows the weight."""
        self.register_buffer(
            "weight_scale", torch.zeros(len(weight) if config.per_channel else (), device=weight.device)
        )

    @property
    def format(self) -> Format:
        """The current format."""
        return self.formats[self.choice]

    def scale(self) -> Tensor:
        """Return the scale of the weight, shaped to spread over it."""
        weight: Tensor = self.layer.weight  # type: ignore[assignment]
        if bool(self.weight_scale.any()):
            return self.weight_scale.view(-1, *[1] * (weight.ndim - 1)) if self.dims else self.weight_scale
        clip = self.config.clip
        share = best_share(weight, self.format, self.dims, self.config.symmetric) if clip == "mse" else clip
        return scale_of(magnitude(weight, self.dims) * share, self.format)

    def fix(self) -> None:
        """Keep the current scale from now on."""
        self.weight_scale.copy_(self.scale().detach().view(self.weight_scale.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the current format."""
        layer, symmetric = self.layer, self.config.symmetric
        if not self.config.weight_only:
            dims = (x.ndim - 1,) if self.config.per_token and isinstance(layer, nn.Linear) else None
            x = quantize(x, self.format, scale_of(magnitude(x, dims), self.format), symmetric)
        weight = quantize(layer.weight, self.format, self.scale(), symmetric)  # type: ignore[arg-type]
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        output: Tensor = layer._conv_forward(x, weight, layer.bias)  # type: ignore[operator]
        return output

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the weight: codes of the format's bits, its values as a table, scales."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator]
        if not bool(self.weight_scale.any()):
            self.fix()
        table = self.format.levels(self.config.symmetric)
        values = self.format.round((weight / self.scale()).float(), self.config.symmetric).cpu()
        codes = torch.searchsorted(table, values.contiguous())
        details: dict[str, Any] = {
            "kind": "levels", "bits": self.format.bits, "q_min": 0, "shape": list(weight.shape),
            "axis": 0 if self.dims else None, "scale": f"{prefix}weight_scale", "offset": None,
            "dtype": str(weight.dtype).removeprefix("torch."), "table": table.tolist(),
        }  # fmt: skip
        return {f"{prefix}layer.weight": Packed(pack_bits(codes, self.format.bits), details)}

    def extra_repr(self) -> str:
        """Return the format for printing."""
        return f"{self.format.name} of {[item.name for item in self.formats]}"


def insert(model: nn.Module, config: FLIQSConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Return `model` with switchable layers; fills `structure` with decisions, costs and fixed layers, or follows it.

    Raises:
        UnsupportedModelError, ConfigError: nothing to quantize, or a name or pattern that fits nothing.
    """
    formats = tuple(parse(name) for name in config.formats)
    found = find_layers(model)
    if not run.restoring:
        places: dict[str, int] = dict.fromkeys(found, 0)
        inputs = tuple(value.to(run.device) for value in run.task.example_inputs(1))

        def forward() -> Any:
            return model(*inputs)

        handles = [module.register_forward_hook(_counter(places, name)) for name, module in found.items()]
        order = execution_order(model, found, forward)
        for handle in handles:
            handle.remove()
        skip = tuple(dict.fromkeys((order[0], order[-1]))) if config.skip is None and order else config.skip or ()
        check_layers(PLUGIN, model, found, skip)
        warn_left_in_float(PLUGIN, model, run)
        structure["fixed"] = list(skip)
        structure["decisions"] = decisions([name for name in order if name not in skip], config)
        structure["macs"] = {name: places[name] * found[name].weight.numel() for name in order}  # type: ignore[union-attr,operator]
        structure["weights"] = {name: found[name].weight.numel() for name in order}  # type: ignore[union-attr,operator]
    for name in structure["weights"]:
        own = (parse(FIXED),) if name in structure["fixed"] else formats
        replace_module(model, name, FormatLayer(found[name], own, config))
    if chosen := structure.get("chosen"):
        set_choices(model, structure, [int(index) for index in chosen])
    return model


def _counter(places: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        places[name] += output[0].numel() // output.shape[1 if not isinstance(module, nn.Linear) else -1]

    return count


def decisions(names: list[str], config: FLIQSConfig) -> list[list[str]]:
    """Return the layers of each decision.

    Raises:
        ConfigError: a layer fits no pattern, or several.
    """
    if config.granularity == "layer":
        return [[name] for name in names]
    if config.granularity == "single":
        return [names]
    groups: list[list[str]] = [[] for _ in config.block_patterns]
    for name in names:
        fits = [place for place, pattern in enumerate(config.block_patterns) if re.fullmatch(pattern, name)]
        if len(fits) != 1:
            what = "no pattern" if not fits else f"{len(fits)} patterns"
            raise ConfigError(f"{PLUGIN}: layer '{name}' fits {what} of block_patterns; each must fit exactly one")
        groups[fits[0]].append(name)
    return [group for group in groups if group]


def format_layers(model: nn.Module) -> dict[str, FormatLayer]:
    """Return the switchable layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FormatLayer)}


def set_choices(model: nn.Module, structure: Mapping[str, Any], choices: list[int]) -> None:
    """Give every layer the format of its decision."""
    layers = format_layers(model)
    for group, choice in zip(structure["decisions"], choices, strict=True):
        for name in group:
            layers[name].choice = choice


def cost(structure: Mapping[str, Any], config: FLIQSConfig, choices: list[int]) -> float:
    """Return the cost of choices, fixed layers included, relative to 8 bits everywhere."""
    bits = dict.fromkeys(structure["fixed"], 8)
    for group, choice in zip(structure["decisions"], choices, strict=True):
        bits |= dict.fromkeys(group, parse(config.formats[choice]).bits)
    if config.cost_type == "memory":
        return sum(structure["weights"][name] * b for name, b in bits.items()) / (
            8 * sum(structure["weights"].values())
        )
    inputs = {name: 16 if config.weight_only else b for name, b in bits.items()}
    whole = sum(structure["macs"].values()) * (((8 + 16) / 2) ** 2 if config.weight_only else 64)
    return float(sum(structure["macs"][name] * ((b + inputs[name]) / 2) ** 2 for name, b in bits.items()) / whole)


def check_target(structure: Mapping[str, Any], config: FLIQSConfig) -> None:
    """Raise where no choice reaches the target.

    Raises:
        RequestError: it lies outside the costs of the smallest and the largest format everywhere.
    """
    widths = [parse(name).bits for name in config.formats]
    count = len(structure["decisions"])
    low, high = (cost(structure, config, [widths.index(pick(widths))] * count) for pick in (min, max))
    if not low <= config.target_cost <= high:
        raise RequestError(
            f"{PLUGIN}: target_cost is {config.target_cost:g}; these formats reach {low:.4g} to {high:.4g} of the cost "
            "of 8 bits everywhere"
        )
