"""A layer of which some input columns are trained in place (Woo et al., ICLR 2025, arXiv:2503.01905).

    y = x W^T + b,  W[:, idx] = s p,  s = alpha / r        p (out, r) is trained
    dL/dp = s dy^T x[..., idx]                             batch and sequence summed
    dL/dx = dy W

The backward pass needs r of the input's channels, and W, which is there anyway. `p` lives in float32 where W
has fewer bits. A 2-d convolution (not in the paper) trains W[:, idx, :, :] from x[:, idx] in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn import grad

from eff.errors import PluginError
from eff_kernels.partial_linear import partial_linear
from eff_peft_kit.delta import matrix
from eff_peft_kit.targets import has_computed_weight, is_quantized

_HALF = (torch.float16, torch.bfloat16)


class PartialConv2d(torch.autograd.Function):
    """A 2-d convolution with the gradient of W[:, idx, :, :], as `partial_linear` has it for matrices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, bias: Tensor | None, weight: Tensor, layer: PartialLayer) -> Tensor:
        """Return the convolution, keep x[:, idx] only."""
        ctx.layer, ctx.shape = layer, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x.index_select(1, layer.index), weight if ctx.needs_input_grad[0] else None)
        conv: Any = layer.layer
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, p and b."""
        x_index, weight = ctx.saved_tensors
        layer: PartialLayer = ctx.layer
        conv: Any = layer.layer
        how = (conv.stride, conv.padding, conv.dilation)
        dx = dp = db = None
        if ctx.needs_input_grad[0]:
            dx = grad.conv2d_input(ctx.shape, weight.to(dy.dtype), dy, *how)
        if ctx.needs_input_grad[1]:
            gradient = grad.conv2d_weight(x_index.to(dy.dtype), layer.p.shape, dy, *how)
            dp = gradient.to(layer.p.dtype) * layer.scale
        if ctx.needs_input_grad[2]:
            db = dy.sum((0, 2, 3)).to(ctx.bias_dtype)
        return dx, dp, db, None, None


class PartialLayer(nn.Module):
    """A layer with `r` trained input columns.

    A plain layer (linear, Conv1D, convolution) holds the columns in its own weight. A layer that computes its
    weight (packed in 4 bits, or fake quantized) stays as it is, and the columns overwrite what it computes.

    Args:
        layer: the layer, with its weight.
        index: which input columns, (r,) int64.
        scale: s of the equations, > 0.
        period: forward passes of the released write-back rule; 0: p is written when it has changed.
        restoring: p will be loaded; a fake quantizer cannot compute a weight before its scale is loaded.
    """

    index: Tensor

    def __init__(self, layer: nn.Module, index: Tensor, scale: float, period: int = 0, restoring: bool = False):
        super().__init__()
        self.layer = layer
        self.scale = scale
        self.period = period
        self.in_place = not has_computed_weight(layer)
        self.calls = 0
        self._kind = type(layer)
        with torch.no_grad():
            start = matrix(layer) if restoring and is_quantized(layer) else self._base_weight()
            self.register_buffer("index", index.to(start.device))
            columns = start[:, self.index]
            master = torch.float32 if columns.dtype in _HALF else columns.dtype
            self.p = nn.Parameter(columns.to(master) / scale)
        self.write_back()  # s * (w / s) may differ from w in the last bit; a resumed run must see the same

    def columns(self) -> Tensor:
        """Return s p, the trained columns, (out, r, ...)."""
        return self.p.detach() * self.scale

    def _base_weight(self) -> Tensor:
        return matrix(self.layer) if self.in_place else self.layer.weight().detach()  # type: ignore[operator]

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """Return the weight the layer computes with, (out, in, ...), columns included; not to be written to."""
        weight = self._base_weight()
        if self.in_place:
            return weight
        return weight.index_copy(1, self.index, self.columns().to(weight.dtype))

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy s p into the weight."""
        if self.in_place:
            weight = matrix(self.layer)
            weight.index_copy_(1, self.index, self.columns().to(weight.dtype))
        self._written = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        return self.p._version, self.p.data_ptr()

    def synchronise(self) -> None:
        """Write p back if it has changed since the last time."""
        if not torch.compiler.is_compiling() and self._written != self._stamp():
            self.write_back()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output; works on inputs of any number of dimensions the layer takes."""
        if type(self.layer) is not self._kind:
            raise PluginError(
                f"peft_paca: a method applied after it has put {type(self.layer).__name__} into an adapted layer, "
                "which would cut off its training; name that method before peft_paca, or apply it to the finished model"
            )
        if self.period == 0:
            self.synchronise()
        elif self.training:
            self._reference_write_back()
        inner: Any = self.layer
        if not self.in_place:
            quantize_input = getattr(inner, "input_quantizer", None)
            x = x if quantize_input is None else quantize_input(x)
        elif not torch.is_grad_enabled() or (torch.compiler.is_compiling() and not self.training):
            output: Tensor = inner(x)
            return output
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what is kept is then kept in fewer bits, too
        weight = self.dense_weight()
        if not self.in_place:
            weight = weight.to(x.dtype)
        bias = inner.bias if self.in_place else inner.layer.bias
        if isinstance(inner, nn.Conv2d):
            output = PartialConv2d.apply(x, self.p, bias, weight, self)
            return output
        again = None if self.in_place else self.dense_weight
        return partial_linear(x, weight, self.p, self.index, bias, scale=self.scale, again=again)

    def _reference_write_back(self) -> None:
        """Write as the released code does: not in every (2 accumulate)-th forward pass in training mode.

        The rule fits gradient checkpointing with its two passes per step; without it, every other step uses a
        weight that is one step old.
        """
        if self.calls % self.period != 0:
            self.write_back()
        self.calls += 1

    def extra_repr(self) -> str:
        """Return r and s."""
        return f"r={len(self.index)}, scale={self.scale:g}"


def partial_layers(model: nn.Module) -> dict[str, PartialLayer]:
    """Return the adapted layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PartialLayer)}
