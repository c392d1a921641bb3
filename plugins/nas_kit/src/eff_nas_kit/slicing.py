"""Slices of a layer: the first channels, the taps in the centre of the kernel; as tensors and as new layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_nas_kit.mixing import axis_table
from eff_nas_kit.space import Axis, Chosen, LayerChoices


def positions(axis: Axis | None, value: int, size: int) -> Any:
    """Return what a candidate keeps of a dimension: a slice where that is contiguous, else indices."""
    if axis is None:
        return slice(None)
    if axis.blocks == 1:
        return slice(0, value * axis.repeat)
    return axis_table(axis, (value,), size)[:, 0].nonzero()[:, 0]


def cut(x: Tensor, dim: int, axis: Axis | None, chosen: Chosen) -> Tensor:
    """Return the part of `x` along `dim` that the chosen candidate keeps."""
    if axis is None:
        return x
    kept = positions(axis, chosen[axis.choice], x.shape[dim])
    if isinstance(kept, slice):
        return x.narrow(dim, 0, kept.stop)
    return x.index_select(dim, kept.to(x.device))


def widen(y: Tensor, dim: int, axis: Axis | None, chosen: Chosen, size: int) -> Tensor:
    """Return `y` with zeros along `dim` where the chosen candidate has nothing, `size` in all."""
    if axis is None or y.shape[dim] == size:
        return y
    kept = positions(axis, chosen[axis.choice], size)
    dim = dim % y.ndim
    if isinstance(kept, slice):
        after = [0, 0] * (y.ndim - 1 - dim) + [0, size - y.shape[dim]]
        return F.pad(y, after)
    shape = list(y.shape)
    shape[dim] = size
    return y.new_zeros(shape).index_copy(dim, kept.to(y.device), y)


def slice_conv(
    layer: nn.Conv2d, axes: LayerChoices, chosen: Chosen, crop: str = "center"
) -> tuple[Tensor, Tensor | None, Any, int]:
    """Return weight, bias, padding and groups of one candidate; views where they can be."""
    weight, bias, groups = layer.weight, layer.bias, layer.groups
    if axes.out:
        kept = positions(axes.out, chosen[axes.out.choice], layer.out_channels)
        weight = weight[kept]
        bias = None if bias is None else bias[kept]
        groups = len(weight) if groups > 1 else 1  # with a choice of width there are one or as many as channels
    if axes.inp:
        weight = weight[:, positions(axes.inp, chosen[axes.inp.choice], layer.in_channels)]
    padding: Any = layer.padding
    if axes.kernel:
        size, own = chosen[axes.kernel], layer.kernel_size[0]
        start = (own - size) // 2 if crop == "center" else 0
        weight = weight[:, :, start : start + size, start : start + size]
        padding = same_padding(size, layer.dilation[0])
    return weight, bias, padding, groups


def same_padding(kernel: int, dilation: int) -> int:
    """Return the padding that keeps the size at stride 1."""
    return dilation * (kernel // 2)


def slice_linear(layer: nn.Linear, axes: LayerChoices, chosen: Chosen) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of one candidate."""
    weight, bias = layer.weight, layer.bias
    if axes.out:
        kept = positions(axes.out, chosen[axes.out.choice], layer.out_features)
        weight, bias = weight[kept], None if bias is None else bias[kept]
    if axes.inp:
        weight = weight[:, positions(axes.inp, chosen[axes.inp.choice], layer.in_features)]
    return weight, bias


def sliced_layer(layer: nn.Module, axes: LayerChoices, chosen: Chosen, crop: str = "center") -> nn.Module:
    """Return an ordinary layer of the chosen size with a copy of the slice's weights."""
    if isinstance(layer, nn.Conv2d):
        return _small_conv(layer, axes, chosen, crop)
    if isinstance(layer, nn.Linear):
        weight, bias = slice_linear(layer, axes, chosen)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, weight.device, weight.dtype)
        return _filled(linear, {"weight": weight, "bias": bias}, layer)
    assert axes.out is not None
    if isinstance(layer, nn.LayerNorm):
        kept = positions(axes.out, chosen[axes.out.choice], layer.normalized_shape[0])
        features = len(torch.empty(layer.normalized_shape[0])[kept])
        norm = nn.LayerNorm(features, layer.eps, layer.elementwise_affine, layer.bias is not None)
        return _filled(norm, {"weight": _at(layer.weight, kept), "bias": _at(layer.bias, kept)}, layer)
    assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d))
    kept = positions(axes.out, chosen[axes.out.choice], layer.num_features)
    features = len(torch.empty(layer.num_features)[kept])
    made = type(layer)(features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
    names = ("weight", "bias", "running_mean", "running_var")
    values = {name: _at(getattr(layer, name), kept) for name in names}
    return _filled(made, values | {"num_batches_tracked": layer.num_batches_tracked}, layer)


def _small_conv(layer: nn.Conv2d, axes: LayerChoices, chosen: Chosen, crop: str) -> nn.Conv2d:
    weight, bias, padding, groups = slice_conv(layer, axes, chosen, crop)
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), layer.stride, padding, layer.dilation,
        groups, bias is not None, layer.padding_mode, weight.device, weight.dtype,
    )  # fmt: skip
    return _filled(conv, {"weight": weight, "bias": bias}, layer)


def _at(value: Tensor | None, kept: Any) -> Tensor | None:
    return None if value is None else value[kept]


def _filled(made: Any, values: dict[str, Tensor | None], source: nn.Module) -> Any:
    """Give a new layer its values, and its source's mode and trainability."""
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                getattr(made, name).data = value.detach().clone()
                if (own := source._parameters.get(name)) is not None:
                    getattr(made, name).requires_grad_(own.requires_grad)
    return made.train(source.training)
