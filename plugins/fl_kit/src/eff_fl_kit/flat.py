"""A model's trainable parameters as one vector, so that federated updates are written as the papers write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from eff.errors import RequestError, UnsupportedModelError


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained and sent: the parameters that require a gradient.

    Raises:
        RequestError: there are none. UnsupportedModelError: they do not have one floating type.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise RequestError(
            "nothing in the model requires a gradient, so there is nothing to train or send; use --epochs 0"
        )
    types = {parameter.dtype for parameter in found.values()}
    if len(types) > 1:
        raise UnsupportedModelError(
            f"the trained parameters have the types {', '.join(sorted(map(str, types)))}; convert the model to one"
        )
    return found


def normalisation_layers(model: nn.Module) -> list[_NormBase]:
    """Return the layers that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None
    ]


def _statistics(model: nn.Module) -> list[Tensor]:
    both = [value for layer in normalisation_layers(model) for value in (layer.running_mean, layer.running_var)]
    return [value for value in both if value is not None]


def flat_weights(model: nn.Module) -> Tensor:
    """Return a copy of the trained parameters as one vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in trained_parameters(model).values()])


def load_flat_weights(model: nn.Module, weights: Tensor) -> None:
    """Write a vector of `flat_weights` back into the parameters."""
    parameters = list(trained_parameters(model).values())
    with torch.no_grad():
        for parameter, piece in zip(parameters, _split(weights, parameters), strict=True):
            parameter.copy_(piece)


def flat_statistics(model: nn.Module) -> Tensor | None:
    """Return the running means and variances of all normalisation layers as one vector; None where there are none."""
    values = _statistics(model)
    return torch.cat([value.reshape(-1).float() for value in values]) if values else None


def load_flat_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Write a vector of `flat_statistics` back."""
    buffers = _statistics(model)
    for buffer, piece in zip(buffers, _split(statistics, buffers), strict=True):
        buffer.copy_(piece)


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


class FlatModel:
    """A module whose trained parameters and their gradients are views of two vectors.

    Made by `flattened`, which gives the parameters their own memory again.
    """

    def __init__(self, module: nn.Module):
        parameters = list(trained_parameters(module).values())
        self.module = module
        self.weights = flat_weights(module)
        """The trained parameters; changing it in place changes the module."""
        self.gradient = torch.zeros_like(self.weights)
        """Filled by `backward`."""
        self.parameters = parameters
        for parameter, value, gradient in zip(
            parameters, _split(self.weights, parameters), _split(self.gradient, parameters), strict=True
        ):
            parameter.data = value
            parameter.grad = gradient

    def release(self) -> None:
        """Give every parameter its own memory."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
            parameter.grad = None


@contextmanager
def flattened(module: nn.Module) -> Iterator[FlatModel]:
    """Give `module` as a `FlatModel` while the block runs.

    The batch counters of normalisation layers are put back afterwards: the server does not train.
    """
    counters = [(layer, layer.num_batches_tracked) for layer in normalisation_layers(module)]
    before = [None if counter is None else counter.clone() for _, counter in counters]
    flat = FlatModel(module)
    try:
        yield flat
    finally:
        flat.release()
        for (_, counter), value in zip(counters, before, strict=True):
            if counter is not None and value is not None:
                counter.copy_(value)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch as in training, but leave the running statistics alone."""
    layers = normalisation_layers(module)
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
