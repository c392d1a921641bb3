"""From a network to its supernet and back: replace layers by mixtures, and mixtures by the chosen slices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from eff.modes import eval_mode
from eff_nas_kit.layers import ENTANGLED, DepthMixture, Entangled, Selection
from eff_nas_kit.slicing import sliced_layer
from eff_nas_kit.space import Chosen


def make_supernet(model: nn.Module, selection: Selection) -> nn.Module:
    """Replace the layers that the selection's space names by mixtures; changes `model` in place."""
    layers = selection.space.layers
    for name, axes in layers.items():
        if axes.depth is None:
            layer = model.get_submodule(name)
            model.set_submodule(name, ENTANGLED[type(layer)](layer, axes, selection))
    for name, axes in layers.items():  # after the layers inside, whose names change by this
        if axes.depth is not None:
            blocks = model.get_submodule(name)
            assert isinstance(blocks, nn.Sequential)
            model.set_submodule(name, DepthMixture(blocks, axes.depth, selection))
    return model


def discretise(model: nn.Module, selection: Selection, chosen: Chosen) -> nn.Module:
    """Replace the mixtures of a supernet by ordinary layers of the chosen sizes, weights inherited; in place.

    Also takes the network that the supernet was made of, to build a chosen network without its weights.

    Raises:
        ModelError: `chosen` is no network of the space.
    """
    space = selection.space
    space.check(chosen)
    for name, axes in space.layers.items():
        if axes.depth is not None:
            found = model.get_submodule(name)
            blocks = found.blocks if isinstance(found, DepthMixture) else found
            assert isinstance(blocks, nn.Sequential)
            model.set_submodule(name, blocks[: chosen[axes.depth]])
    for name, axes in space.layers.items():
        if axes.depth is None and _exists(model, name):
            found = model.get_submodule(name)
            layer = found.layer if isinstance(found, Entangled) else found
            model.set_submodule(name, sliced_layer(layer, axes, chosen, space.crop))
    return model


def subnet(supernet: nn.Module, selection: Selection, chosen: Chosen) -> nn.Module:
    """Return one network of a supernet with a copy of its weights; the supernet is left alone."""
    return discretise(copy.deepcopy(supernet), selection, chosen)


def reset_weights(model: nn.Module) -> nn.Module:
    """Give every layer fresh weights as its class starts them, to train a chosen network from scratch."""
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return model


def _exists(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:  # in a block that was not chosen
        return False
    return True


def expected_share(supernet: nn.Module) -> Tensor:
    """Return the mean size under the current coefficients over that of the largest network, 0-dim, differentiable."""
    shares: dict[nn.Module, Tensor] = {}
    for module in supernet.modules():
        if isinstance(module, DepthMixture):
            for block, share in zip(module.blocks, module.shares(), strict=True):
                for inner in block.modules():
                    shares[inner] = shares[inner] * share if inner in shares else share
    inside = {entangled.layer for entangled in supernet.modules() if isinstance(entangled, Entangled)}
    expected: Tensor | float = 0.0
    for module in supernet.modules():
        if module in inside:  # counted with the mixture around it
            continue
        if isinstance(module, Entangled):
            expected = expected + module.expected_parameters() * shares.get(module, 1.0)
        else:
            own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
            expected = expected + own * shares.get(module, 1.0)
    return torch.as_tensor(expected) / sum(parameter.numel() for parameter in supernet.parameters())


def recalibrate(model: nn.Module, batches: Iterable[object], forward: Callable[[nn.Module, object], object]) -> int:
    """Measure the statistics of all batch norms anew, as plain means over `batches`; weights stay.

    Returns:
        How many batch norms there are; without any, no batch is drawn.
    """
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) and m.track_running_stats]
    if not norms:
        return 0
    with eval_mode(model):
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return len(norms)
