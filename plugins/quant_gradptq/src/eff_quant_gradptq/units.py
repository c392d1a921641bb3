"""What is reconstructed at a time: a layer or a block, first its rounding, then the scales of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eff.errors import UnsupportedModelError
from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.losses import beta_at, distance
from eff_quant_gradptq.rounding import RoundingLayer
from eff_quant_kit.calibration import Rows
from eff_quant_kit.quantizer import keep_scales_positive
from eff_quant_kit.reconstruction import RowUnit, draw

CONTAINERS = (nn.Sequential, nn.ModuleList)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
NOISE = 0.1
"""Standard deviation of the additive noise of augment=noise, relative to the inputs'."""


def unit_names(model: nn.Module, order: list[str], unit: str) -> list[str]:
    """Return the units in the order of execution.

    A block is an element of a Sequential or ModuleList that holds at least two of the layers and is no container itself.
    """
    if unit == "layer":
        return order
    blocks: list[str] = []
    for name, module in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        inner = [layer for layer in order if layer.startswith(f"{name}.")]
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(parent, CONTAINERS) and not isinstance(module, CONTAINERS) and len(inner) > 1 and not inside:
            blocks.append(name)
    units: list[str] = []
    for layer in order:
        owner = next((block for block in blocks if layer.startswith(f"{block}.")), layer)
        if owner not in units:
            units.append(owner)
    return units


def rounding_layers(module: nn.Module) -> list[RoundingLayer]:
    """Return the layers with learned rounding in a module, itself included."""
    return [item for item in module.modules() if isinstance(item, RoundingLayer)]


class RoundingUnit(RowUnit):
    """Learned rounding of one layer or block."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Rows,
        targets: Rows,
        activation: Callable[[Tensor], Tensor],
        config: GradPTQConfig,
        done: Callable[[RoundingUnit], None],
        float_inputs: Rows | None = None,
        fisher: Rows | None = None,
        original: nn.Module | None = None,
        whole: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
        mask: Rows | None = None,
    ):
        """Take the rows; `whole(samples)` runs the network and returns the unit's output, the network's, and the float one."""
        layers = rounding_layers(module)
        super().__init__(inputs, targets, config.batch, layers[0].scale.device, mask)
        self.module, self.layers = module, layers
        self.activation, self.config, self.done = activation, config, done
        self.float_inputs, self.fisher, self.original, self.whole = float_inputs, fisher, original, whole
        for layer in layers:
            layer.mode = "hard"
        self.error_nearest = self._error_of_nearest()
        for layer in layers:
            layer.mode = "soft"
        self.optimizer = self._optimizer()

    def _error_of_nearest(self) -> float:
        """Return the held-out error with every weight rounded to nearest."""
        learned = [layer.learned for layer in self.layers]
        for layer in self.layers:
            layer.learned = torch.zeros_like(layer.learned)
        error = self.held_out_error()
        for layer, mask in zip(self.layers, learned, strict=True):
            layer.learned = mask
        return error

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        other: list[nn.Parameter] = []
        if "bias" in config.dof:
            other += [layer.layer.bias for layer in self.layers if layer.layer.bias is not None]  # type: ignore[misc]
        if "scale" in config.dof:
            other += [layer.log_scale for layer in self.layers]
        if "norm" in config.dof:
            norms = [module for module in self.module.modules() if isinstance(module, NORMS)]
            other += [parameter for norm in norms for parameter in norm.parameters()]
        groups = [{"params": [layer.variable for layer in self.layers], "lr": config.lr}]
        if other:
            groups.append({"params": other, "lr": config.lr_other})
        kinds = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax, "rmsprop": torch.optim.RMSprop}
        if config.optimizer == "sgd":
            return torch.optim.SGD(groups, momentum=0.9)
        return kinds[config.optimizer](groups)

    @property
    def kind(self) -> str:
        """The distance between outputs."""
        return {"relu_mse": "mse", "head_mse": "mse"}.get(self.config.loss, self.config.loss)

    def run_module(self, x: Tensor) -> Tensor:
        """Return the unit's output.

        Raises:
            UnsupportedModelError: it takes more than one tensor.
        """
        try:
            output = self.module(x)
        except TypeError as error:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} takes more than one tensor ({error}); use unit=layer"
            ) from error
        return output[0] if isinstance(output, tuple) else output

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared error of the outputs, whatever loss is trained on: comparable in reports."""
        return distance("mse", self.activation(self.run_module(x)), self.activation(y))

    def loss(self, iteration: int) -> Tensor:
        """Return the distance on a random batch, and the term that decides the rounding."""
        loss = self._distance()
        beta = beta_at(iteration / self.config.iters, self.config.beta_start, self.config.beta_end, self.config.warmup)
        if beta is not None:
            loss = loss + self.config.lam * torch.stack([layer.penalty(beta) for layer in self.layers]).sum()
        return loss

    def _distance(self) -> Tensor:
        rows = draw(self.rows, self.batch)
        if self.whole is not None:
            out, logits, float_logits = self.whole(rows)
            y = self.targets.read(rows).to(self.device)
            return distance("mse", self.activation(out), self.activation(y)) + distance("mse", logits, float_logits)
        x, y = self.read(rows)
        x, y = self._augmented(rows, x, y)
        weight = None if self.fisher is None else self.select(self.fisher, rows)
        return distance(self.kind, self.activation(self.run_module(x)), self.activation(y), weight)

    def _augmented(self, rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        how = self.config.augment
        if how == "none":
            return x, y
        if how == "qdrop":  # each entry from the float or the quantized network
            assert self.float_inputs is not None
            float_x = self.select(self.float_inputs, rows)
            return torch.where(torch.rand_like(x) < 0.5, float_x, x), y
        assert self.original is not None
        if how == "noise":
            x = x + NOISE * x.std() * torch.randn_like(x)
        else:
            share = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device)
            x = share * x + (1 - share) * x[torch.randperm(len(x), device=x.device)]
        with torch.no_grad():  # the float layer says what the changed inputs should give
            y = self.original(x)
        return x, y[0] if isinstance(y, tuple) else y

    def close(self) -> None:
        """Round for good and hand over."""
        self.done(self)
        self.drop()
        for rows in (self.float_inputs, self.fisher):
            if rows is not None:
                rows.drop()


class InputScaleUnit(RowUnit):
    """The scales of a unit's inputs by LSQ, Adam with a cosine to 0, after all rounding is done."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Rows,
        targets: Rows,
        activation: Callable[[Tensor], Tensor],
        config: GradPTQConfig,
        mask: Rows | None = None,
    ):
        self.layers = rounding_layers(module)
        super().__init__(inputs, targets, config.batch, self.layers[0].scale.device, mask)
        self.module, self.activation, self.config = module, activation, config
        scales = [layer.input_quantizer.scale for layer in self.layers if layer.input_quantizer is not None]
        self.optimizer = torch.optim.Adam(scales, lr=config.act_lr)

    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the squared error of the outputs."""
        output = self.module(x)
        output = output[0] if isinstance(output, tuple) else output
        return distance("mse", self.activation(output), self.activation(y))

    def loss(self, iteration: int) -> Tensor:
        """Return the error of a random batch."""
        self.optimizer.param_groups[0]["lr"] = (
            0.5 * self.config.act_lr * (1 + math.cos(math.pi * iteration / self.config.act_iters))
        )
        keep_scales_positive(self.module)
        return self.error(*self.draw())

    def close(self) -> None:
        """Forget the rows."""
        self.drop()
