"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
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
