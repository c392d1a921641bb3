"""Which layers an adapter method changes, and the output layer that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff.modes import eval_mode

ALL_LINEAR = "all-linear"
_SHOWN = 6  # names in a message


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D of transformers: a linear layer whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, also behind quantizers."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_quantized(module)


def has_computed_weight(module: nn.Module) -> bool:
    """Whether a module computes the weight of the layer it holds: `layer`, and `weight()` to compute with."""
    return isinstance(getattr(module, "layer", None), nn.Module) and callable(getattr(module, "weight", None))


def is_quantized(module: nn.Module) -> bool:
    """Whether a module quantizes the weight of a linear layer."""
    return has_computed_weight(module) and isinstance(module.layer, nn.Linear)


def is_adaptable(module: nn.Module) -> bool:
    """Whether adapters know what to do with a module: linear, or a plain 2-d convolution."""
    return is_linear(module) or (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def in_features(module: nn.Module) -> int:
    """Return the number of input features (channels) of an adaptable layer."""
    if is_quantized(module):
        return in_features(module.layer)  # type: ignore[arg-type]
    if isinstance(module, nn.Conv2d):
        return module.in_channels
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0] if is_conv1d(module) else weight.shape[1]


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can be adapted, by name, in module order.

    nn.MultiheadAttention uses its weights without calling its layers, so what is inside is left out.
    """
    found: dict[str, nn.Module] = {}
    left_out: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if left_out and name.startswith(left_out):
            continue
        if isinstance(module, nn.MultiheadAttention) or has_computed_weight(module):
            left_out = (*left_out, f"{name}." if name else "")
        if is_adaptable(module):
            found[name] = module
    return found


def output_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Return the name of the linear layer that `forward` calls last, the head; None where it calls none."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in adaptable_layers(model).items()
        if is_linear(module)
    ]
    try:
        with eval_mode(model), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return called[-1] if called else None


def matches(name: str, pattern: str) -> bool:
    """Whether a layer's name, or its end after a dot, fits a pattern such as "query" or "blocks.*.fc1"."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select_targets(
    plugin: str, model: nn.Module, targets: str | Sequence[str], head: str | None
) -> dict[str, nn.Module]:
    """Return the layers to adapt, by name.

    Args:
        plugin: who asks, for messages.
        model: the model.
        targets: "all-linear" for all linear layers, or patterns; a pattern may also name a convolution.
        head: the output layer, which is never adapted.

    Raises:
        UnsupportedModelError: the model has nothing to adapt, or a chosen weight is shared with another module.
        ConfigError: a pattern matches no layer.
    """
    layers = {name: module for name, module in adaptable_layers(model).items() if name != head}
    if targets == ALL_LINEAR:
        chosen = {name: module for name, module in layers.items() if is_linear(module)}
    else:
        patterns = (targets,) if isinstance(targets, str) else tuple(targets)
        for pattern in patterns:
            if not any(matches(name, pattern) for name in layers):
                ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
                raise ConfigError(
                    f"{plugin}: targets: '{pattern}' matches no layer{did_you_mean(pattern, [*ends, *layers])}; "
                    f"layers are {_some(list(layers))}"
                )
        chosen = {name: module for name, module in layers.items() if any(matches(name, item) for item in patterns)}
    if not chosen:
        modules = [f"'{name}': {type(module).__name__}" for name, module in model.named_modules() if name]
        example = f", e.g. {modules[0]}" if modules else ""
        kept = f" besides the output layer '{head}'" if head else ""
        raise UnsupportedModelError(
            f"{plugin}: found no linear layer{kept} in {type(model).__name__} ({len(modules)} modules{example}); "
            "nothing to adapt" + ("; name convolutions in targets to adapt them" if layers else "")
        )
    _check_unshared(plugin, model, chosen)
    return chosen


def _check_unshared(plugin: str, model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Refuse a weight that another module uses too: training columns of it would move that module."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(name)
    for name, module in chosen.items():
        layer = module.layer if is_quantized(module) else module
        others = sorted(users.get(id(layer.weight), set()) - {name, f"{name}.layer"})  # type: ignore[union-attr]
        if others:
            raise UnsupportedModelError(
                f"{plugin}: the weight of '{name}' is shared with '{others[0]}', which would change with it; "
                "leave it out of targets or untie the weights"
            )


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where `name` is, and everywhere else the same module is used."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        if parent is new:
            continue
        for key, child in list(parent._modules.items()):  # named_children() skips a second name of one module
            if child is old:
                setattr(parent, key, new)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more
