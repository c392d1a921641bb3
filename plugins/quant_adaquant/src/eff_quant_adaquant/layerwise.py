"""AdaQuant proper: one layer's weight, bias and ranges against its float output.

    min over W', b', r_w, z_w, r_x, z_x of  || Y - layer(Q(X), Q(W')) ||^2

There is no term on the rounding and no bound on W' - W: weights may leave their rounding cell.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_adaquant.config import AdaQuantConfig
from eff_quant_adaquant.quantizer import RangeLayer
from eff_quant_kit.calibration import Rows
from eff_quant_kit.reconstruction import RowUnit

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


class LayerUnit(RowUnit):
    """One layer at one number of bits."""

    def __init__(
        self,
        layer: RangeLayer,
        inputs: Rows,
        targets: Rows,
        activation: str | None,
        config: AdaQuantConfig,
        done: Callable[[LayerUnit], None],
        mask: Rows | None = None,
    ):
        super().__init__(inputs, targets, config.batch, layer.weight_quantizer.range.device, mask)
        self.layer = layer
        self.activation = ACTIVATIONS[activation if config.relu_loss else None]
        self.config = config
        self.done = done
        self.error_before = self.held_out_error()
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        config, layer = self.config, self.layer
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        lr_qx = config.lr_qx * (float(layer.input_high - layer.input_low) if config.relative_lr else 1.0)
        groups = [
            {"params": [layer.layer.weight], "lr": config.lr_w},
            {"params": [weights.range, weights.zero], "lr": config.lr_qw},
            {"params": [inputs.range, inputs.zero], "lr": lr_qx},
        ]
        if layer.layer.bias is not None:
            groups.append({"params": [layer.layer.bias], "lr": config.lr_b})
        return torch.optim.Adam(groups)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean squared error of the outputs, after the ReLU where one follows."""
        return F.mse_loss(self.activation(self.layer(x)), self.activation(y))

    def loss(self, iteration: int) -> Tensor:
        """Return the error of a random batch; with `optimise=qparams` search first."""
        if self.config.optimise == "qparams":
            self._search_ranges()
        return self.error(*self.draw())

    def _search_ranges(self) -> None:
        """Nelder-Mead over a factor on each range and a shift of each zero; the weights stay."""
        from scipy.optimize import minimize

        quantizers = (self.layer.weight_quantizer, self.layer.input_quantizer)
        start = [(item.range.detach().clone(), item.zero.detach().clone()) for item in quantizers]
        x, y = self.draw()

        def place(values: list[float]) -> None:
            with torch.no_grad():
                for item, (range_, zero), factor, shift in zip(
                    quantizers, start, values[::2], values[1::2], strict=True
                ):
                    item.range.copy_(range_ * factor)
                    item.zero.copy_(zero + shift * range_)

        def error(values: list[float]) -> float:
            place(values)
            with torch.no_grad():
                return float(self.error(x, y))

        found = minimize(error, [1.0, 0.0, 1.0, 0.0], method="Nelder-Mead", options={"maxiter": self.config.iters})
        place(list(found.x))
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the step that follows must not move anything

    def close(self) -> None:
        """Hand over the layer; forget the rows."""
        self.done(self)
        self.drop()


def take(layer: RangeLayer) -> dict[str, Tensor]:
    """Return a copy of everything that calibration changes in a layer."""
    found = {
        "weight": layer.layer.weight,
        "weight_range": layer.weight_quantizer.range,
        "weight_zero": layer.weight_quantizer.zero,
        "input_range": layer.input_quantizer.range,
        "input_zero": layer.input_quantizer.zero,
    }
    if layer.layer.bias is not None:
        found["bias"] = layer.layer.bias
    return {key: value.detach().clone() for key, value in found.items()}  # type: ignore[union-attr,operator]


def put(layer: RangeLayer, found: dict[str, Tensor], weight_bits: int, act_bits: int) -> None:
    """Undo `take`, at the given bits."""
    layer.set_bits(weight_bits, act_bits)
    with torch.no_grad():
        layer.layer.weight.copy_(found["weight"])  # type: ignore[operator,union-attr]
        layer.weight_quantizer.range.copy_(found["weight_range"])
        layer.weight_quantizer.zero.copy_(found["weight_zero"])
        layer.input_quantizer.range.copy_(found["input_range"])
        layer.input_quantizer.zero.copy_(found["input_zero"])
        if "bias" in found:
            layer.layer.bias.copy_(found["bias"])  # type: ignore[operator,union-attr]


def reset(layer: RangeLayer, original: nn.Module, weight_bits: int, act_bits: int) -> None:
    """Give a layer back its float weight and bias, and the ranges that were measured."""
    layer.set_bits(weight_bits, act_bits)
    with torch.no_grad():
        layer.layer.weight.copy_(original.weight)  # type: ignore[operator,union-attr,arg-type]
        if original.bias is not None:
            layer.layer.bias.copy_(original.bias)  # type: ignore[operator,union-attr,arg-type]
    layer.cover_measured()
