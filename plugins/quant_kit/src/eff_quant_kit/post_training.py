"""How every post-training method begins: fold, find the layers, order them, say what stays in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff.run import Run
from eff_quant_kit.folding import Folded, fold_batch_norms, fold_pairs
from eff_quant_kit.layers import check_layers, execution_order, find_layers, warn_left_in_float
from eff_quant_kit.neighbours import Activation, activations_after


@dataclass(frozen=True)
class Prepared:
    """A folded model's layers by name, the order in which they run, and the ReLU after each where there is one."""

    folded: tuple[Folded, ...]
    layers: dict[str, nn.Module]
    order: list[str]
    activations: dict[str, Activation]


def prepare(
    plugin: str,
    model: nn.Module,
    forward: Callable[[], Any],
    structure: dict[str, Any],
    run: Run,
    exclude: Sequence[str] = (),
) -> Prepared:
    """Fold batch norms in place and return the layers to quantize; `structure` gets the folds or, on a resume, gives them.

    Args:
        plugin: for messages.
        model: put into eval mode.
        forward: runs the model on one batch.
        structure: the method's; the key "folded" holds (layer, norm) pairs.
        run: `run.restoring` says that a run is resumed on the float model.
        exclude: layers to leave alone.

    Raises:
        UnsupportedModelError: no convolution or linear layer. ConfigError: `exclude` names none.
    """
    model.eval()
    found = find_layers(model)
    check_layers(plugin, model, found, exclude)
    warn_left_in_float(plugin, model, run)
    if run.restoring:
        modules = dict(model.named_modules())
        folded = tuple(_record(modules, *pair) for pair in structure["folded"])
        fold_pairs(model, structure["folded"])
    else:
        folding = fold_batch_norms(model, forward)
        for name, reason in folding.left.items():
            run.warn(f"{plugin}: batch norm {name} is left as it is: {reason}")
        folded = folding.folded
        structure["folded"] = folding.pairs
    layers = {name: module for name, module in found.items() if name not in exclude}
    return Prepared(folded, layers, execution_order(model, layers, forward), activations_after(layers, forward))


def _record(modules: Mapping[str, nn.Module], layer: str, norm: str) -> Folded:
    module = modules[norm]
    running: Tensor = module.running_mean  # type: ignore[assignment]
    gamma = torch.ones_like(running) if module.weight is None else module.weight.detach().clone()  # type: ignore[operator]
    beta = torch.zeros_like(running) if module.bias is None else module.bias.detach().clone()  # type: ignore[operator]
    return Folded(layer, norm, gamma, beta, float(module.eps))  # type: ignore[arg-type]
