"""Symmetric rounding of weights, one scale per output channel.

    s = max|w| / (2^(bits-1) - 1),   w_hat = round(w / s) * s
"""

import torch
from eff.errors import UnsupportedModelError
from torch import Tensor, nn


def round_to_levels(weight: Tensor, bits: int) -> Tensor:
    """Return `weight` (out, ...) rounded to 2^bits - 1 levels per output channel."""
    largest = weight.abs().flatten(1).amax(1).clamp(min=torch.finfo(weight.dtype).tiny)
    scale = (largest / (2 ** (bits - 1) - 1)).view(-1, *[1] * (weight.ndim - 1))
    return (weight / scale).round() * scale


def round_weights(model: nn.Module, bits: int) -> nn.Module:
    """Round the weights of all convolutions and linear layers in place and return the model.

    Raises:
        UnsupportedModelError: there are none.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))]
    if not layers:
        raise UnsupportedModelError(f"{{ cookiecutter.plugin }}: found no Linear or Conv in {type(model).__name__}; nothing to round")
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(round_to_levels(layer.weight, bits))
    return model
