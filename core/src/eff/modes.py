"""Eval mode, and other parameters to take gradients, for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block `model` is in eval mode; afterwards, also after an error, each module is in the mode it was in.

    `model.train(model.training)` would not do: modules that a method froze in eval mode would train again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # from the outside in, as train() reaches the modules inside
            if module.training != training:
                module.train(training)


@contextmanager
def gradients_for(model: nn.Module, wanted: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block only `wanted` of the model's parameters ask for gradients; afterwards, also after an error, as before."""
    chosen = set(wanted)
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, asked in before.items():
            parameter.requires_grad_(asked)
