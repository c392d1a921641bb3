"""Layers of a supernet: each holds the largest layer and computes a mixture of its slices.

Three ways, by the `Selection` that all layers of a supernet share:

- entangled: mix the weights, then compute once (`mixing.py`);
- output: compute every candidate, then mix the outputs, padded with zeros (the classic way);
- single path: compute the candidate of the largest coefficient alone, with smaller tensors, times its
  coefficient, through which the gradient of a straight-through sample flows (GDAS, SPOS).

With a coefficient of 1 for one candidate all three agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_nas_kit.mixing import axis_table, kernel_table, mix
from eff_nas_kit.slicing import cut, positions, slice_conv, slice_linear, widen
from eff_nas_kit.space import Chosen, LayerChoices, SearchSpace


class Selection:
    """The coefficients in force, shared by all layers of a supernet."""

    def __init__(self, space: SearchSpace, mixing: Literal["entangled", "output"] = "entangled"):
        self.space = space
        self.mixing = mixing
        self.single_path = False
        self.batch_statistics = False
        """Batch norms use the batch's statistics and leave their own alone: for weights no statistics were kept for."""
        self.coefficients: dict[str, Tensor] = {}
        self.chosen: Chosen = {}
        """Per choice the candidate with the largest coefficient; set for single paths."""
        self.use(
            {name: torch.full((len(item.values),), 1 / len(item.values)) for name, item in space.choices.items()}, False
        )

    def use(self, coefficients: Mapping[str, Tensor], single_path: bool) -> None:
        """Set the coefficients of the next forward passes, one vector per choice."""
        self.coefficients = dict(coefficients)
        self.single_path = single_path
        if single_path:
            self.chosen = {name: self.space.values_of(name)[int(a.argmax())] for name, a in coefficients.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Selection:
        """Copy with the coefficients cut off from the graph they were sampled in."""
        made = Selection(self.space, self.mixing)
        made.use({name: value.detach().clone() for name, value in self.coefficients.items()}, self.single_path)
        made.batch_statistics = self.batch_statistics
        memo[id(self)] = made
        return made

    @contextmanager
    def fixed(self, chosen: Chosen) -> Iterator[None]:
        """Be one network of the space, with inherited weights and the statistics of each batch."""
        before = (self.coefficients, self.single_path, self.chosen, self.batch_statistics)
        some = next(iter(self.coefficients.values()))
        one_hot = {
            name: some.new_tensor([float(value == chosen[name]) for value in choice.values])
            for name, choice in self.space.choices.items()
        }
        self.use(one_hot, True)
        self.batch_statistics = True
        try:
            yield
        finally:
            self.coefficients, self.single_path, self.chosen, self.batch_statistics = before

    def factor(self, names: tuple[str, ...], values: Mapping[str, int]) -> Tensor:
        """Return the product of the coefficients of one candidate per choice, 0-dim."""
        product = torch.ones(())
        for index, name in enumerate(dict.fromkeys(names)):
            coefficient = self.coefficients[name][self.space.values_of(name).index(values[name])]
            product = coefficient if index == 0 else product * coefficient
        return product


class Entangled(nn.Module):
    """A layer at its largest, with the choices it takes part in."""

    def __init__(self, layer: nn.Module, axes: LayerChoices, selection: Selection):
        super().__init__()
        self.layer = layer
        self.axes = axes
        self.selection = selection
        space = selection.space
        weight_shape = tuple(layer.weight.shape) if isinstance(layer, (nn.Conv2d, nn.Linear)) else (_features(layer),)
        if axes.out:
            self._table("out", axis_table(axes.out, space.values_of(axes.out.choice), weight_shape[0]))
        if axes.inp:
            self._table("inp", axis_table(axes.inp, space.values_of(axes.inp.choice), weight_shape[1]))
        if axes.kernel:
            self._table("kernel", kernel_table(space.values_of(axes.kernel), weight_shape[2]))

    def _table(self, name: str, table: Tensor) -> None:
        self.register_buffer(f"{name}_table", table, persistent=False)

    def mask(self, name: Literal["out", "inp", "kernel"]) -> Tensor | None:
        """Return the mask of one dimension under the current coefficients; None where nothing is chosen."""
        axis = getattr(self.axes, name)
        if axis is None:
            return None
        choice = axis if isinstance(axis, str) else axis.choice
        table: Tensor = getattr(self, f"{name}_table")
        return table @ self.selection.coefficients[choice].to(table)

    def candidates(self) -> Iterator[Chosen]:
        """Yield every combination of this layer's choices, in the order of itertools.product."""
        names = tuple(dict.fromkeys(self.axes.names))
        for values in itertools.product(*(self.selection.space.values_of(name) for name in names)):
            yield dict(zip(names, values, strict=True))

    def expected_parameters(self) -> Tensor:
        """Return the mean number of parameters under the current coefficients, 0-dim, with gradients."""
        raise NotImplementedError

    def _kept(self, name: Literal["out", "inp", "kernel"], size: int) -> Tensor | int:
        mask = self.mask(name)
        return size if mask is None else mask.sum()

    def extra_repr(self) -> str:
        """Show the candidates."""
        space = self.selection.space
        return ", ".join(f"{name}={list(space.values_of(name))}" for name in self.axes.names)


class EntangledConv2d(Entangled):
    """A convolution whose output width, input width and kernel size are choices."""

    layer: nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, O, H', W') of `x` (N, I, H, W); on a single path with as many channels as it has."""
        if self.selection.single_path:
            return self._candidate(x, self.selection.chosen)
        if self.selection.mixing == "output":
            return self._sum_of_outputs(x)
        out = self.mask("out")
        weight = mix(self.layer.weight, out, self.mask("inp"), self.mask("kernel"))
        bias = self.layer.bias
        # The other coefficients of a bias sum to 1, so the output's mask is all that is left of the sum.
        bias = bias if bias is None or out is None else bias * out
        return self._convolve(x, weight, bias, self.layer.padding, self.layer.groups)

    def _candidate(self, x: Tensor, chosen: Chosen) -> Tensor:
        weight, bias, padding, groups = slice_conv(self.layer, self.axes, chosen, self.selection.space.crop)
        factor = self.selection.factor(self.axes.names, chosen).to(weight)
        return self._convolve(x, weight * factor, None if bias is None else bias * factor, padding, groups)

    def _sum_of_outputs(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for chosen in self.candidates():
            weight, bias, padding, groups = slice_conv(self.layer, self.axes, chosen, self.selection.space.crop)
            is_depthwise = self.layer.groups > 1
            part = cut(x, 1, self.axes.out if is_depthwise else self.axes.inp, chosen)
            y = widen(
                self._convolve(part, weight, bias, padding, groups), 1, self.axes.out, chosen, self.layer.out_channels
            )
            y = y * self.selection.factor(self.axes.names, chosen).to(y)
            total = y if total is None else total + y
        assert total is not None  # there is at least one candidate
        return total

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, groups: int) -> Tensor:
        layer = self.layer
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, groups)

    def expected_parameters(self) -> Tensor:
        """Return the mean number of parameters, 0-dim."""
        outputs, inputs, height, width = self.layer.weight.shape
        kept = self._kept("out", outputs)
        weights = kept * self._kept("inp", inputs) * self._kept("kernel", height * width)
        return torch.as_tensor(weights + (kept if self.layer.bias is not None else 0))


class EntangledLinear(Entangled):
    """A linear layer whose output and input width are choices."""

    layer: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) of `x` (..., I)."""
        if self.selection.single_path:
            weight, bias = slice_linear(self.layer, self.axes, self.selection.chosen)
            factor = self.selection.factor(self.axes.names, self.selection.chosen).to(weight)
            return F.linear(x, weight * factor, None if bias is None else bias * factor)
        if self.selection.mixing == "output":
            return self._sum_of_outputs(x)
        out = self.mask("out")
        bias = self.layer.bias
        weight = mix(self.layer.weight, out, self.mask("inp"), None)
        return F.linear(x, weight, bias if bias is None or out is None else bias * out)

    def _sum_of_outputs(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for chosen in self.candidates():
            weight, bias = slice_linear(self.layer, self.axes, chosen)
            y = F.linear(cut(x, -1, self.axes.inp, chosen), weight, bias)
            y = widen(y, -1, self.axes.out, chosen, self.layer.out_features)
            y = y * self.selection.factor(self.axes.names, chosen).to(y)
            total = y if total is None else total + y
        assert total is not None  # there is at least one candidate
        return total

    def expected_parameters(self) -> Tensor:
        """Return the mean number of parameters, 0-dim."""
        kept = self._kept("out", self.layer.out_features)
        weights = kept * self._kept("inp", self.layer.in_features)
        return torch.as_tensor(weights + (kept if self.layer.bias is not None else 0))


class EntangledBatchNorm(Entangled):
    """One batch norm for all widths; scale and shift are mixed, the statistics are those of the mixture.

    Normalising undoes what the mask did to the weights before it, so the mask is put on scale and shift;
    mixing weights and mixing outputs are the same here.
    """

    layer: nn.BatchNorm1d | nn.BatchNorm2d

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (N, C, ...) normalised."""
        layer, axis = self.layer, self.axes.out
        assert axis is not None
        if not self.selection.single_path:
            mask = self.mask("out")
            assert mask is not None
            scale = mask if layer.weight is None else layer.weight * mask
            shift = None if layer.bias is None else layer.bias * mask
            return self._normalise(x, scale, shift, slice(None))
        chosen = self.selection.chosen
        kept = positions(axis, chosen[axis.choice], _features(layer))
        factor = self.selection.factor(self.axes.names, chosen).to(x)
        scale = factor.expand(x.shape[1]) if layer.weight is None else layer.weight[kept] * factor
        return self._normalise(x, scale, None if layer.bias is None else layer.bias[kept] * factor, kept)

    def _normalise(self, x: Tensor, scale: Tensor, shift: Tensor | None, kept: Any) -> Tensor:
        layer = self.layer
        tracked = layer.running_mean is not None and not self.selection.batch_statistics
        by_batch = self.training or not tracked
        momentum = layer.momentum if layer.momentum is not None else 0.0
        if self.training and tracked and layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if layer.momentum is None:  # a cumulative mean
                momentum = 1.0 / float(layer.num_batches_tracked)
        mean, variance = (layer.running_mean[kept], layer.running_var[kept]) if tracked else (None, None)  # type: ignore[index]
        return F.batch_norm(x, mean, variance, scale, shift, by_batch, momentum, layer.eps)

    def expected_parameters(self) -> Tensor:
        """Return the mean number of parameters, 0-dim."""
        tensors = sum(tensor is not None for tensor in (self.layer.weight, self.layer.bias))
        return torch.as_tensor(self._kept("out", _features(self.layer)) * tensors)


class EntangledLayerNorm(Entangled):
    """A layer norm over the last dimension; mean and variance count each channel with its mask.

    The reference takes plain statistics of the padded mixture, which no slice has; weighted ones make a
    coefficient of 1 exactly the slice.
    """

    layer: nn.LayerNorm

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (..., C) normalised."""
        layer, axis = self.layer, self.axes.out
        assert axis is not None
        if self.selection.single_path:
            chosen = self.selection.chosen
            return self._slice(x, chosen) * self.selection.factor(self.axes.names, chosen).to(x)
        if self.selection.mixing == "output":
            parts = [
                widen(self._slice(cut(x, -1, axis, chosen), chosen), -1, axis, chosen, _features(layer))
                * self.selection.factor(self.axes.names, chosen).to(x)
                for chosen in self.candidates()
            ]
            return torch.stack(parts).sum(0)
        mask = self.mask("out")
        assert mask is not None
        total = mask.sum()
        mean = (x * mask).sum(-1, keepdim=True) / total
        variance = (mask * (x - mean) ** 2).sum(-1, keepdim=True) / total
        scale = mask if layer.weight is None else layer.weight * mask
        y = (x - mean) * torch.rsqrt(variance + layer.eps) * scale
        return y if layer.bias is None else y + layer.bias * mask

    def _slice(self, x: Tensor, chosen: Chosen) -> Tensor:
        assert self.axes.out is not None
        kept = positions(self.axes.out, chosen[self.axes.out.choice], _features(self.layer))
        weight, bias = (None if value is None else value[kept] for value in (self.layer.weight, self.layer.bias))
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.layer.eps)

    def expected_parameters(self) -> Tensor:
        """Return the mean number of parameters, 0-dim."""
        tensors = sum(tensor is not None for tensor in (self.layer.weight, self.layer.bias))
        return torch.as_tensor(self._kept("out", _features(self.layer)) * tensors)


class DepthMixture(nn.Module):
    """Blocks in a row of which the first d are used: sum_d a_d h_d over the outputs h_d of the candidate depths."""

    def __init__(self, blocks: nn.Sequential, choice: str, selection: Selection):
        super().__init__()
        self.blocks = blocks
        self.choice = choice
        self.selection = selection

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixture of the depths, or the output of the chosen depth."""
        depths = self.selection.space.values_of(self.choice)
        if self.selection.single_path:
            for block in self.blocks[: self.selection.chosen[self.choice]]:
                x = block(x)
            return x * self.selection.factor((self.choice,), self.selection.chosen).to(x)
        coefficients = self.selection.coefficients[self.choice].to(x)
        total: Tensor | None = None
        for index, block in enumerate(self.blocks[: depths[-1]]):
            x = block(x)
            if index + 1 in depths:
                part = coefficients[depths.index(index + 1)] * x
                total = part if total is None else total + part
        assert total is not None  # depths are at least 1
        return total

    def shares(self) -> Tensor:
        """Return how much of each block is used under the current coefficients, (blocks,)."""
        depths = torch.tensor(self.selection.space.values_of(self.choice))
        coefficients = self.selection.coefficients[self.choice]
        kept = torch.arange(len(self.blocks))[:, None] < depths[None, :]
        return kept.to(coefficients) @ coefficients


def _features(layer: nn.Module) -> int:
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[0])
    return int(layer.num_features)  # type: ignore[arg-type]


ENTANGLED: dict[type[nn.Module], type[Entangled]] = {
    nn.Conv2d: EntangledConv2d,
    nn.Linear: EntangledLinear,
    nn.BatchNorm1d: EntangledBatchNorm,
    nn.BatchNorm2d: EntangledBatchNorm,
    nn.LayerNorm: EntangledLayerNorm,
}
