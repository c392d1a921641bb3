"""Finding the parts of a denoiser: its blocks, and the layers that see the time but not the image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff.modes import eval_mode

BLOCK_LISTS = ("transformer_blocks", "blocks", "layers")


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks by name: the longest ModuleList called transformer_blocks, blocks or layers.

    Raises:
        UnsupportedModelError: there is none; the lists that there are are named.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    fitting = {name: module for name, module in lists.items() if name.rpartition(".")[2] in BLOCK_LISTS}
    if not fitting:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks called {', '.join(BLOCK_LISTS)}; "
            f"it has {', '.join(lists) or 'no ModuleList'}"
        )
    name = max(fitting, key=lambda key: len(fitting[key]))
    return {f"{name}.{index}": block for index, block in enumerate(fitting[name])}


@torch.no_grad()
def time_layers(model: nn.Module, names: Iterable[str], forward: Callable[[int], Any]) -> list[str]:
    """Return the layers whose inputs stay the same when only the image changes.

    Args:
        names: candidates.
        forward: runs the model on the image number 0 or 1, at the same timesteps and labels.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name in seen
    ]
    try:
        with eval_mode(model):
            forward(0)
            forward(1)
    finally:
        for handle in handles:
            handle.remove()
    return [
        name for name, inputs in seen.items() if len(inputs) >= 2 and torch.equal(inputs[0], inputs[len(inputs) // 2])
    ]
