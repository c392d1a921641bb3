"""What one step of one layer costs as the number of candidates grows: time, and memory kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from eff.measure import time_calls
from eff_nas_kit.layers import EntangledConv2d, Selection
from eff_nas_kit.quality import saved_bytes
from eff_nas_kit.space import Axis, Choice, LayerChoices, SearchSpace

COUNTS = (3, 9, 27)
"""Candidates: of the kernel; with those of the output width; with those of the input width."""


@dataclass(frozen=True)
class Size:
    """The layer and its input."""

    channels: int = 32
    kernel: int = 5
    pixels: int = 16
    batch: int = 32


@dataclass(frozen=True)
class Cost:
    """One row: candidates, the median time of forward and backward, bytes kept between the two."""

    candidates: int
    milliseconds: float
    kept_bytes: int


def make_layer(count: int, mixing: Literal["entangled", "output"], size: Size) -> EntangledConv2d:
    """Return a convolution with 3, 9 or 27 candidates: kernels k, k - 2 and k - 4, widths a quarter, half, all."""
    widths = Choice(kind="width", values=(size.channels // 4, size.channels // 2, size.channels))
    kernels = Choice(kind="kernel", values=(size.kernel - 4, size.kernel - 2, size.kernel))
    axes = LayerChoices(
        kernel="kernel",
        out=Axis(choice="out") if count >= 9 else None,
        inp=Axis(choice="inp") if count >= 27 else None,
    )
    choices = {name: kernels if name == "kernel" else widths for name in axes.names}
    space = SearchSpace(choices=choices, layers={"conv": axes})
    conv = nn.Conv2d(size.channels, size.channels, size.kernel, padding=size.kernel // 2)
    return EntangledConv2d(conv, axes, Selection(space, mixing))


def layer_step(layer: EntangledConv2d, x: Tensor, alphas: dict[str, Tensor]) -> Tensor:
    """Return the sum of the layer's outputs under softmax coefficients."""
    layer.selection.use({name: alpha.softmax(0) for name, alpha in alphas.items()}, False)
    total: Tensor = layer(x).sum()
    return total


def measure_layer(count: int, mixing: Literal["entangled", "output"], size: Size, budget_s: float = 0.5) -> Cost:
    """Measure one layer; weights, coefficients and input all get gradients."""
    torch.manual_seed(0)
    layer = make_layer(count, mixing, size)
    x = torch.randn(size.batch, size.channels, size.pixels, size.pixels, requires_grad=True)
    alphas = {name: torch.zeros(3, requires_grad=True) for name in layer.axes.names}

    def step() -> None:
        layer_step(layer, x, alphas).backward()

    times = time_calls(step, torch.device("cpu"), budget_s)
    return Cost(count, times.median, saved_bytes(lambda: layer_step(layer, x, alphas)))


def largest_difference(size: Size) -> float:
    """Return the largest difference between mixed weights and mixed outputs at 27 random coefficients."""
    torch.manual_seed(0)
    entangled, output = make_layer(27, "entangled", size), make_layer(27, "output", size)
    output.load_state_dict(entangled.state_dict())
    x = torch.randn(size.batch, size.channels, size.pixels, size.pixels)
    coefficients = {name: torch.rand(3).softmax(0) for name in entangled.axes.names}
    with torch.no_grad():
        for layer in (entangled, output):
            layer.selection.use(coefficients, False)
        return float((entangled(x) - output(x)).abs().max())
