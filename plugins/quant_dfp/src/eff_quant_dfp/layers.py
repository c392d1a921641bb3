"""Linear layers and convolutions whose three products run on dynamic fixed point.

Data flow of a layer y = x w (arXiv:1802.00930): x and the float32 master weight become integers once, and the same integers
serve the forward product and, with those of dy, both backward products. Bias, norms and the update stay float32.
A convolution is im2col and a product along (C_in, kh, kw); its input gradient is a product along C_out whose columns are
added up in float32.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import ConfigError, UnsupportedModelError, did_you_mean
from eff_quant_dfp.config import DFPConfig
from eff_quant_dfp.fixed import Fixed, quantize
from eff_quant_dfp.product import product
from eff_quant_kit.layers import check_layers, find_layers, replace_module
from eff_quant_kit.packed import Packed, packed_fixed

PLUGIN = "quant_dfp"


class DFPLayer(nn.Module):
    """A linear layer or 2-d convolution on dynamic fixed point; `layer` keeps the float32 master weights."""

    def __init__(self, layer: nn.Module, config: DFPConfig):
        super().__init__()
        self.layer = layer
        self.config = config
        self.name = ""
        self.integers = True
        """False: compute in float32, for comparison."""
        self.generator: torch.Generator | None = None
        self.seen: dict[str, Fixed] = {}
        """The last x, w and dy without their codes: exponents and flush rates."""
        self.overflows = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in float32."""
        layer: Any = self.layer
        if not self.integers:
            output: Tensor = layer(x)
            return output
        x = x.float()
        if isinstance(layer, nn.Linear):
            flat = x.reshape(1, -1, layer.in_features)
            y = _multiply(flat, layer.weight.t()[None], self).view(*x.shape[:-1], layer.out_features)
            return y if layer.bias is None else y + layer.bias
        return self._convolution(x, layer)

    def _convolution(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        groups, (kh, kw) = layer.groups, layer.kernel_size
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        rows, columns = (int(side) for side in layer.padding) if layer.padding_mode == "zeros" else (0, 0)
        unfold = {"dilation": layer.dilation, "padding": (rows, columns), "stride": layer.stride}
        windows = F.unfold(x, (kh, kw), **unfold)  # (B, C kh kw, L): copies, so quantizing after it changes nothing
        batch, length = len(x), windows.shape[-1]
        a = windows.view(batch, groups, -1, length).permute(1, 0, 3, 2).reshape(groups, batch * length, -1)
        b = layer.weight.view(groups, layer.out_channels // groups, -1).transpose(1, 2)
        y = _multiply(a, b, self)
        size = [
            (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, pad, dilation, kernel, stride in zip(
                x.shape[2:], (rows, columns), layer.dilation, layer.kernel_size, layer.stride, strict=True
            )
        ]
        y = y.view(groups, batch, *size, -1).permute(1, 0, 4, 2, 3).reshape(batch, layer.out_channels, *size)
        return y if layer.bias is None else y + layer.bias.view(-1, 1, 1)

    def fixed(self, x: Tensor, role: str) -> Fixed:
        """Return `x` in the layer's format and remember exponent and flush rate."""
        found = quantize(
            x, self.config.bits, self.config.pre_shift, self.config.rounding, self.generator, f"{self.name}.{role}"
        )
        self.seen[role] = Fixed(torch.empty(0), found.exponent, found.flushed)
        return found

    def multiply(self, a: Fixed, b: Fixed) -> Tensor:
        """Return a @ b and count what overflowed."""
        out, overflows = product(a, b, self.config.products, self.config.overflow, self.name)
        self.overflows += overflows
        return out

    def packed(self, prefix: str) -> dict[str, Packed]:
        """Return how the file holds the weight: P bits an integer, and one exponent."""
        weight: Tensor = self.layer.weight.detach()  # type: ignore[operator]
        kept = quantize(weight, self.config.bits, self.config.pre_shift, name=f"{self.name}.w")
        return {f"{prefix}layer.weight": packed_fixed(kept.codes, self.config.bits, kept.exponent, weight.dtype)}


def _multiply(a: Tensor, b: Tensor, layer: DFPLayer) -> Tensor:
    result: Tensor = _Product.apply(a, b, layer)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """a (G, M, K) @ b (G, K, N), each product in integers or not, as the options say."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, layer: DFPLayer) -> Tensor:
        config = layer.config
        whole = config.forward or config.backward_data or config.backward_weight
        qa, qb = (layer.fixed(a, "x"), layer.fixed(b, "w")) if whole else (None, None)
        ctx.layer, ctx.exponents = layer, None if qa is None or qb is None else (qa.exponent, qb.exponent)
        codes = () if qa is None or qb is None else (qa.codes, qb.codes)
        floats = () if config.backward_data and config.backward_weight else (a, b)
        ctx.save_for_backward(*codes, *floats)
        return layer.multiply(qa, qb) if config.forward and qa is not None and qb is not None else a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = gradients
        layer: DFPLayer = ctx.layer
        config, saved = layer.config, ctx.saved_tensors
        grad = grad.contiguous()
        qg = layer.fixed(grad, "dy") if config.backward_data or config.backward_weight else None
        d_a = d_b = None
        if ctx.needs_input_grad[0]:
            if config.backward_data and qg is not None:
                b = Fixed(saved[1].transpose(1, 2), ctx.exponents[1])
                d_a = layer.multiply(qg, b)
            else:
                d_a = grad @ saved[-1].transpose(1, 2)
        if ctx.needs_input_grad[1]:
            if config.backward_weight and qg is not None:
                a = Fixed(saved[0].transpose(1, 2), ctx.exponents[0])
                d_b = layer.multiply(a, qg)
            else:
                d_b = saved[-2].transpose(1, 2) @ grad
        return d_a, d_b, None


def insert(model: nn.Module, config: DFPConfig) -> nn.Module:
    """Return `model` with DFP layers for its linear layers and 2-d convolutions.

    Raises:
        ConfigError: `exempt` fits no layer. UnsupportedModelError: nothing to convert, or weights that are not float32.
    """
    found = find_layers(model)
    for pattern in config.exempt:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConfigError(f"{PLUGIN}: exempt '{pattern}' fits no layer{did_you_mean(pattern, found)}")
    exempt = [name for name in found if any(fnmatchcase(name, pattern) for pattern in config.exempt)]
    check_layers(PLUGIN, model, found, exempt)
    for name, layer in found.items():
        if name in exempt:
            continue
        if not isinstance(layer, (nn.Linear, nn.Conv2d)) or isinstance(getattr(layer, "padding", 0), str):
            raise UnsupportedModelError(
                f"{PLUGIN}: {name} is a {type(layer).__name__} that is not supported (padding by name, or not 2-d); "
                f"leave it in float32 with exempt={name}"
            )
        if layer.weight.dtype != torch.float32:
            raise UnsupportedModelError(
                f"{PLUGIN}: {name} has {str(layer.weight.dtype).removeprefix('torch.')} weights; the master copy must "
                "be float32: convert the model with model.float() first"
            )
    for name, layer in found.items():
        if name not in exempt:
            replace_module(model, name, DFPLayer(layer, config))
    for name, module in dfp_layers(model).items():
        module.name = name
    return model


def dfp_layers(model: nn.Module) -> dict[str, DFPLayer]:
    """Return the DFP layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, DFPLayer)}
