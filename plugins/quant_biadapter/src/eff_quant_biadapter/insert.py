"""Adapters around a model: beside its MLPs (AdaptFormer) or its query and value projections (LoRA)."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff_quant_biadapter.config import BiAdapterConfig
from eff_quant_biadapter.qlinear import QLinear

PLUGIN = "quant_biadapter"
MLPS = ("mlp", "ffn", "feed_forward", "feedforward")
PROJECTIONS = ("qkv", "query", "value", "q_proj", "v_proj", "to_q", "to_v", "q", "v")


class Adapter(nn.Module):
    """s up(dropout(relu(down(x)))), for LoRA without the ReLU."""

    def __init__(self, inputs: int, outputs: int, config: BiAdapterConfig):
        super().__init__()
        self.scale, self.relu = config.scale, config.placement == "adaptformer"
        self.down = QLinear(inputs, config.dim, config.bits, config.codebook, small=False)
        self.up = QLinear(config.dim, outputs, config.bits, config.codebook, small=True)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., outputs) of x (..., inputs)."""
        y = self.down(x)
        out: Tensor = self.scale * self.up(self.drop(y.relu() if self.relu else y))
        return out


class Tap(nn.Module):
    """A norm that keeps its input for the adapter beside what follows."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x."""
        self.seen = x
        y: Tensor = self.layer(x)
        return y


class BesideMLP(nn.Module):
    """An MLP plus an adapter that reads what came before the norm, or the MLP's own input where there is none."""

    def __init__(self, layer: nn.Module, adapter: Adapter, tap: Tap | None):
        super().__init__()
        self.layer = layer
        self.adapter = adapter
        self._tap = [tap]  # in a list: it stays a module of its block alone

    def forward(self, x: Tensor) -> Tensor:
        """Return MLP(x) plus the adapter's output."""
        (tap,) = self._tap
        source = x
        if tap is not None and tap.seen is not None:
            source, tap.seen = tap.seen, None
        y: Tensor = self.layer(x) + self.adapter(source)
        return y


class BesideProjection(nn.Module):
    """A projection plus adapters on its parts: query and value of a fused one, or the whole."""

    def __init__(self, layer: nn.Module, adapters: Iterable[Adapter], fused: bool):
        super().__init__()
        self.layer = layer
        self.adapters = nn.ModuleList(adapters)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        """Return the projection with the adapters' outputs added."""
        y: Tensor = self.layer(x)
        if not self.fused:
            return y + self.adapters[0](x)  # type: ignore[no-any-return]
        query, value = (adapter(x) for adapter in self.adapters)
        return y + torch.cat([query, torch.zeros_like(query), value], -1)


def insert(model: nn.Module, config: BiAdapterConfig, structure: dict[str, Any], order: list[str] | None) -> nn.Module:
    """Return `model` with adapters, everything else frozen but the head.

    Args:
        model: the base model.
        config: the options.
        structure: filled with the names of targets, norms and head, or followed where `order` is None.
        order: linear layers in order of execution.

    Raises:
        UnsupportedModelError: nothing to put an adapter beside, or no head. ConfigError: a target or head that is not there.
    """
    if order is not None:
        structure["targets"] = find_targets(model, config)
        structure["head"] = find_head(model, config, order)
    model.requires_grad_(False)
    for name in structure["targets"]:
        _put(model, name, _beside_mlp if config.placement == "adaptformer" else _beside_projection, config)
    head = model.get_submodule(structure["head"])
    if config.binary_head:
        linear = _linear_of(head)
        assert linear is not None
        new = QLinear(linear.in_features, linear.out_features, 1, "l1_normal", small=False)
        _set(model, structure["head"], new)
    else:
        head.requires_grad_(True)
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            module.name = name
    return model


def find_targets(model: nn.Module, config: BiAdapterConfig) -> list[str]:
    """Return the names of the modules that get an adapter."""
    wanted = MLPS if config.placement == "adaptformer" else PROJECTIONS
    fits = _is_mlp if config.placement == "adaptformer" else _is_projection
    candidates = [name for name, module in model.named_modules() if name and fits(module)]
    if not config.targets:
        found = [name for name in candidates if name.rpartition(".")[2].lower() in wanted]
    else:
        for pattern in config.targets:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise ConfigError(
                    f"{PLUGIN}: target '{pattern}' fits nothing{did_you_mean(pattern, candidates)}; candidates: {_some(candidates)}"
                )
        found = [name for name in candidates if any(fnmatchcase(name, pattern) for pattern in config.targets)]
    found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not found:
        what = "MLPs called " + ", ".join(MLPS) if config.placement == "adaptformer" else ", ".join(PROJECTIONS)
        raise UnsupportedModelError(
            f"{PLUGIN}: {type(model).__name__} has no {what}; name what gets an adapter with targets, candidates: {_some(candidates)}"
        )
    return found


def find_head(model: nn.Module, config: BiAdapterConfig, order: list[str]) -> str:
    """Return the name of the head."""
    linear = [name for name in order if _linear_of(model.get_submodule(name)) is not None]
    if not linear:
        raise UnsupportedModelError(f"{PLUGIN}: {type(model).__name__} has no linear layer to be the head")
    if config.head and config.head not in linear:
        raise ConfigError(f"{PLUGIN}: head '{config.head}' is no linear layer{did_you_mean(config.head, linear)}")
    return config.head or linear[-1]


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "none"


def _linear_of(module: nn.Module) -> nn.Linear | None:
    """Return the linear layer that a module is, or wraps as quantized layers do."""
    inner = getattr(module, "layer", module)
    return inner if isinstance(inner, nn.Linear) else None


def _is_projection(module: nn.Module) -> bool:
    return _linear_of(module) is not None


def _is_mlp(module: nn.Module) -> bool:
    """Whether a module is a chain of linear layers that leads back to the width it came from."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    chained = all(one.out_features == other.in_features for one, other in zip(layers, layers[1:], strict=False))
    return len(layers) >= 2 and chained and layers[0].in_features == layers[-1].out_features


def _put(model: nn.Module, name: str, make: Any, config: BiAdapterConfig) -> None:
    parent_name, _, key = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, key, make(parent, parent.get_submodule(key), config))


def _set(model: nn.Module, name: str, new: nn.Module) -> None:
    parent_name, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent_name), key, new)


def _beside_mlp(parent: nn.Module, module: nn.Module, config: BiAdapterConfig) -> nn.Module:
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    width = layers[0].in_features
    norms = [key for key, child in parent.named_children() if isinstance(child, nn.LayerNorm)]
    before = [key for key in norms if list(parent._modules).index(key) < _place(parent, module)]
    tap = None
    if before:  # the norm that stands last before the MLP feeds it: x + MLP(norm(x))
        tap = Tap(getattr(parent, before[-1]))
        setattr(parent, before[-1], tap)
    return BesideMLP(module, Adapter(width, layers[-1].out_features, config), tap)


def _place(parent: nn.Module, module: nn.Module) -> int:
    return next(index for index, child in enumerate(parent._modules.values()) if child is module)


def _beside_projection(parent: nn.Module, module: nn.Module, config: BiAdapterConfig) -> nn.Module:
    linear = _linear_of(module)
    assert linear is not None
    fused = linear.out_features == 3 * linear.in_features
    width = linear.in_features if fused else linear.out_features
    return BesideProjection(
        module, [Adapter(linear.in_features, width, config) for _ in range(2 if fused else 1)], fused
    )


def adapter_layers(model: nn.Module) -> dict[str, QLinear]:
    """Return the adapters' (and a binary head's) linear layers by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


def unfix(model: nn.Module) -> None:
    """Quantize decoded weights again from now on: for training them further."""
    for layer in adapter_layers(model).values():
        layer.fixed.zero_()
