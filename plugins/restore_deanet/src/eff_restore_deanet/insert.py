"""Putting DEConvs into a network and folding them again."""

from __future__ import annotations

import copy

import torch
from torch import nn

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff_restore_deanet.deconv import DEConv

PLUGIN = "restore_deanet"


def deconvs_of(model: nn.Module) -> dict[str, DEConv]:
    """Return the DEConvs of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DEConv)}


def why_not(module: nn.Module) -> str:
    """Return why a module cannot become a DEConv; empty where it can."""
    if type(module) is not nn.Conv2d:
        return f"it is a {type(module).__name__}, not a Conv2d"
    found = {
        "kernel": module.kernel_size,
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
        "padding mode": module.padding_mode,
    }
    wanted = {
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "padding mode": "zeros",
    }
    return ", ".join(f"its {key} is {found[key]}, not {wanted[key]}" for key in wanted if found[key] != wanted[key])


def choose_convs(model: nn.Module, include: tuple[str, ...], exclude: tuple[str, ...]) -> list[str]:
    """Return the names of the convolutions to replace.

    Raises:
        ConfigError: a name is no module, or one that is included cannot be replaced.
        UnsupportedModelError: none can be.
    """
    modules = dict(model.named_modules())
    inside = {f"{name}." for name in deconvs_of(model)}
    for option, names in (("include", include), ("exclude", exclude)):
        for name in names:
            if name not in modules:
                raise ConfigError(
                    f"{PLUGIN}: {option} names '{name}', which the model lacks{did_you_mean(name, modules)}"
                )
    for name in include:
        if reason := why_not(modules[name]):
            raise ConfigError(f"{PLUGIN}: include names '{name}', which cannot become a DEConv: {reason}")
    chosen = [
        name
        for name, module in modules.items()
        if not why_not(module)
        and name not in exclude
        and (name in include if include else True)
        and not any(name.startswith(prefix) for prefix in inside)
    ]
    if not chosen:
        raise UnsupportedModelError(
            f"{PLUGIN}: found no 3x3 convolution with stride 1 in {type(model).__name__} ({len(modules)} modules); "
            "nothing to insert"
        )
    return chosen


def insert_deconvs(model: nn.Module, names: list[str], branches: str, init: str) -> nn.Module:
    """Replace convolutions by DEConvs whose vanilla branch takes over the weights; changes `model`.

    Args:
        model: the network.
        names: convolutions of it, as `choose_convs` gives them.
        branches: letters of "chva".
        init: "zero": the network computes what it did; "default": new branches start as convolutions do.
    """
    for name in names:
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)  # choose_convs saw to it
        made = DEConv(conv.in_channels, conv.out_channels, branches, conv.bias is not None).to(conv.weight)
        with torch.no_grad():
            if init == "zero":
                for parameter in made.parameters():
                    parameter.zero_()
            vanilla = made.get_submodule("vanilla")
            vanilla.load_state_dict(conv.state_dict())
        made.train(conv.training)
        model = _replaced(model, conv, made)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Replace every DEConv by the one convolution that does the same; changes `model`.

    Raises:
        UnsupportedModelError: the branches of a DEConv cannot be summed; the message names it.
    """
    made = []
    for name, module in deconvs_of(model).items():
        try:
            made.append((module, module.folded()))
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{PLUGIN}: {name or 'the model'}: {error}") from error
    for module, conv in made:
        model = _replaced(model, module, conv)
    return model


def folded_copy(model: nn.Module) -> nn.Module:
    """Return a folded copy; `model` stays as it is."""
    return fold(copy.deepcopy(model))


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands, under every name it has."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model


@torch.no_grad()
def fold_error(model: nn.Module) -> float:
    """Return the largest difference, over all DEConvs, of the folded one from its convolutions in parallel.

    The input is standard-normal, (1, C, 32, 32), seeded.
    """
    largest = 0.0
    for module in deconvs_of(model).values():
        weight = module.get_submodule("vanilla").weight
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, weight.shape[1], 32, 32, generator=generator).to(weight)  # type: ignore[index, arg-type]
        largest = max(largest, float((module.folded()(x) - module.parallel(x)).abs().max()))
    return largest
