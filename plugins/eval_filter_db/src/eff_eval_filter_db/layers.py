"""Where the filters come from: every k x k convolution of a module, or of bare weights.

A filter is one k x k kernel: a weight (O, I/groups, k, k) holds O * I/groups of them, in rows of k * k
numbers. Transposed convolutions store (I, O/groups, k, k) and are brought into the same layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eff.errors import UnsupportedModelError

Array = NDArray[Any]
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Layer:
    """One convolution; its weights are read when they are needed."""

    model: str
    name: str
    index: int
    """Number of the convolution in its model, of all kernel sizes, in order of declaration."""
    depth: float
    """`index` over the largest, in [0, 1]."""
    shape: tuple[int, int]
    """(O, I/groups)."""
    groups: int | None
    """None where the layer itself is not known, only its weights."""
    read: Callable[[], Array]
    """Returns the weight (O, I/groups, k, k)."""
    tag: str = ""
    task: str = ""

    @property
    def count(self) -> int:
        """Number of filters."""
        return self.shape[0] * self.shape[1]

    def rows(self, dtype: str = "float64") -> Array:
        """Return the filters (count, k * k), not scaled."""
        weight = self.read()
        return weight.reshape(self.count, -1).astype(dtype, copy=False)


@dataclass(frozen=True)
class _Found:
    name: str
    weight: Tensor
    groups: int | None
    transposed: bool = False


def layers_of_model(model: nn.Module, name: str, kernel: int = 3) -> list[Layer]:
    """Return the k x k convolutions of a module.

    Where a module computes with another weight than its convolution holds and says so in a method
    `weight` (as quantized layers do), that one is taken. A module without convolution modules (an
    exported program) is searched for weights of that shape.

    Raises:
        UnsupportedModelError: it has none, or weights that are no finite floats.
    """
    found = list(_convolutions(model))
    if not found:
        found = [_Found(key, value, None) for key, value in model.state_dict().items() if value.ndim == 4]
    return _layers(found, name, kernel, f"{type(model).__name__}")


def layers_of_state(state: Mapping[str, Tensor], name: str, kernel: int = 3) -> list[Layer]:
    """Return the k x k convolutions of bare weights by shape; groups and transposition are not known.

    Raises:
        UnsupportedModelError: there are none, or weights that are no finite floats.
    """
    return _layers([_Found(key, value, None) for key, value in state.items() if value.ndim == 4], name, kernel, name)


def _convolutions(model: nn.Module) -> Iterable[_Found]:
    inside: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, _CONVOLUTIONS) and id(module) not in inside:
            yield _found(name, module, module.weight)
        elif callable(weight):
            held = [child for child in module.children() if isinstance(child, _CONVOLUTIONS)]
            if len(held) == 1:
                inside.add(id(held[0]))
                yield _found(name, held[0], weight())
            elif not held and isinstance(made := weight(), Tensor) and made.ndim == 4:
                yield _Found(name, made, getattr(module, "groups", None))


def _found(name: str, layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> _Found:
    return _Found(name, weight, layer.groups, isinstance(layer, nn.ConvTranspose2d))


def _layers(found: list[_Found], model: str, kernel: int, what: str) -> list[Layer]:
    last = max(len(found) - 1, 1)
    layers = []
    for index, item in enumerate(found):
        if tuple(item.weight.shape[2:]) != (kernel, kernel):
            continue
        _check_weight(item, what)
        weight = item.weight.detach()
        if item.transposed:
            weight = swap_transposed(weight, item.groups or 1)
        out, per_group = weight.shape[:2]
        layers.append(
            Layer(model, item.name, index, index / last, (out, per_group), item.groups, partial(_read, weight))
        )
    if not layers:
        sizes = Counter(f"{item.weight.shape[2]}x{item.weight.shape[3]}" for item in found)
        there = ", ".join(f"{size} ({count})" for size, count in sizes.most_common())
        squares = [int(size.partition("x")[0]) for size, _ in sizes.most_common() if _is_square(size)]
        way_out = next((f"; try -o kernel={side}" for side in squares if side > 1), "")
        raise UnsupportedModelError(
            f"eval_filter_db: found no {kernel}x{kernel} convolution in {what}; it has "
            + (there or "no 2D convolution at all")
            + way_out
        )
    return layers


def _is_square(size: str) -> bool:
    height, _, width = size.partition("x")
    return height == width


def _check_weight(item: _Found, what: str) -> None:
    where = f"eval_filter_db: weight of '{item.name}' in {what}"
    if item.weight.is_quantized or not item.weight.is_floating_point():
        kind = str(item.weight.dtype).removeprefix("torch.")
        raise UnsupportedModelError(f"{where} is {kind}; give the model with float weights (dequantise first)")
    if not torch.isfinite(item.weight).all():
        raise UnsupportedModelError(
            f"{where} holds NaN or infinity; use a checkpoint from before the training diverged"
        )


def swap_transposed(weight: Tensor, groups: int) -> Tensor:
    """Return the weight (I, O/groups, k, k) of a transposed convolution as (O, I/groups, k, k)."""
    inputs, out_per_group, height, width = weight.shape
    apart = weight.reshape(groups, inputs // groups, out_per_group, height, width).transpose(1, 2)
    return apart.reshape(groups * out_per_group, inputs // groups, height, width)


def _read(weight: Tensor) -> Array:
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()  # numpy has no bfloat16
    array: Array = weight.cpu().numpy()
    return array


def reinitialised(layer: Layer, name: str, generator: Callable[[str], torch.Generator]) -> Layer:
    """Return `layer` with normal weights of standard deviation sqrt(2 / fan_in) (He et al., 2015).

    Args:
        layer: what to copy the shape of.
        name: name of the model that the copies make.
        generator: makes the generator of a name; called at each reading, so that readings agree.
    """

    def read() -> Array:
        shape = (*layer.shape, *layer.read().shape[2:])
        draw = torch.randn(shape, generator=generator(f"reinitialise/{layer.name}"), dtype=torch.float64)
        array: Array = (draw * (2 / np.prod(shape[1:])) ** 0.5).numpy()
        return array

    return replace(layer, model=name, read=read)
