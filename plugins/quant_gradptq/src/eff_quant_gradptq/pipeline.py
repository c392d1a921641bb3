"""The order of things: fold, bits by importance, scales, rounding unit by unit, scales of the inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import RunError, UnsupportedModelError
from eff.run import Run
from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.finished import convert
from eff_quant_gradptq.grid import search_scale
from eff_quant_gradptq.importance import assign_bits, bits_of_file, channel_importance, own_loss
from eff_quant_gradptq.losses import uniform_like
from eff_quant_gradptq.rounding import RoundingLayer
from eff_quant_gradptq.units import InputScaleUnit, RoundingUnit, rounding_layers, unit_names
from eff_quant_kit.calibration import CalibrationSet, Rows
from eff_quant_kit.layers import replace_module
from eff_quant_kit.post_training import prepare
from eff_quant_kit.reconstruction import UnitByUnit
from eff_quant_kit.walk import Walk

PLUGIN = "quant_gradptq"
SCALE_SAMPLES = 1 << 16
"""Entries of the recorded inputs that choose the first scale."""


class Pipeline:
    """Everything that lives while a model is calibrated."""

    def __init__(self, model: nn.Module, config: GradPTQConfig, structure: dict[str, Any], run: Run):
        """Fold, choose bits and scales, insert.

        Raises:
            UnsupportedModelError: nothing to quantize. ConfigError: `exclude` names no layer. DataError: no data.
        """
        self.config, self.structure, self.run, self.model = config, structure, run, model
        self.calibration = CalibrationSet(run, config.calib_size, config.batch, plugin=PLUGIN)
        self.nearest: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []
        try:
            if len(self.calibration) < config.batch:
                run.warn(
                    f"{PLUGIN}: {len(self.calibration)} samples are fewer than a batch; rows are drawn again and again"
                )
            if config.calibration == "noise":
                generator = run.generator("calibration noise")
                self.calibration.replace(lambda values: uniform_like(values, generator))
            self._prepare()
        except BaseException:
            self.calibration.close()
            raise

    def _prepare(self) -> None:
        config, run, model = self.config, self.run, self.model
        batch = next(iter(self.calibration))
        found = prepare(PLUGIN, model, lambda: run.forward(model, batch), self.structure, run, config.exclude)
        self.order, self.activations = found.order, found.activations
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        bits = self._bits(found.layers)
        signed = self._signed(found.layers, batch)
        for name in self.order:
            layer = RoundingLayer(found.layers[name], bits[name].to(run.device), config, config.act_bits, signed[name])
            replace_module(model, name, layer.to(run.device))
        self.units = unit_names(model, self.order, config.unit)
        self.walk, self.float_walk = Walk(self.calibration, model), Walk(self.calibration, self.teacher)
        self.rounding = UnitByUnit(config.iters, self._open_rounding)
        self.scaling = UnitByUnit(config.act_iters, self._open_scaling)
        clipped = [self._layer(name).clipped() for name in self.order]
        self.structure["clipped_share"] = sum(clipped) / len(clipped)

    def _bits(self, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        config = self.config
        counts = {name: len(layer.weight) for name, layer in layers.items()}  # type: ignore[arg-type]
        if config.mixed == "off":
            return {name: torch.full((count,), config.bits) for name, count in counts.items()}
        if "assigned_bits" not in self.structure:
            if config.sensitivity is not None:
                assigned = bits_of_file(config.sensitivity, layers, config)
            else:
                importance = channel_importance(self.model, layers, self.calibration, self.run)
                assigned = assign_bits(importance, layers, config)
            self.structure["assigned_bits"] = {name: bits.tolist() for name, bits in assigned.items()}
        return {name: torch.tensor(bits) for name, bits in self.structure["assigned_bits"].items()}

    def _signed(self, layers: Mapping[str, nn.Module], batch: Any) -> dict[str, bool]:
        if "signed" not in self.structure:
            signed: dict[str, bool] = dict.fromkeys(layers, True)

            def watch(name: str) -> Any:
                return lambda module, arguments: signed.update({name: bool((arguments[0] < 0).any())})

            handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
            with torch.no_grad():
                self.run.forward(self.model, batch)
            for handle in handles:
                handle.remove()
            self.structure["signed"] = signed
        return dict(self.structure["signed"])

    @property
    def rounding_steps(self) -> int:
        """Train steps that learn the rounding."""
        return len(self.units) * self.config.iters

    @property
    def step_count(self) -> int:
        """All train steps."""
        scaling = len(self.units) * self.config.act_iters if self.config.act_bits is not None else 0
        return self.rounding_steps + scaling

    def step(self, index: int) -> Tensor:
        """Do train step `index`; returns its loss."""
        if index < self.rounding_steps:
            return self.rounding.step(index)
        return self.scaling.step(index - self.rounding_steps)

    def _layer(self, name: str) -> RoundingLayer:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, RoundingLayer)
        return layer

    def _set_modes(self, current: int) -> None:
        """Units before the current one are rounded, those after it in float."""
        for number, name in enumerate(self.units):
            for layer in rounding_layers(self.model.get_submodule(name)):
                layer.mode = "hard" if number < current else "float"

    def _open_rounding(self, number: int, fresh: bool) -> RoundingUnit:
        config, name = self.config, self.units[number]
        self._set_modes(number)
        rows = self.float_walk.record(name, inputs=not config.asymmetric_input or config.augment == "qdrop")
        inputs = self.walk.record(name, outputs=False).inputs if config.asymmetric_input else rows.inputs
        assert rows.outputs is not None
        original = self.teacher.get_submodule(name)
        unit = RoundingUnit(
            self.model.get_submodule(name), inputs, rows.outputs, self._activation(name), config, self._done(name),
            rows.inputs if config.augment == "qdrop" else None, self._fisher(name) if config.loss == "fisher_diag" else None, original,
            self._whole(name, inputs) if config.loss == "head_mse" else None, self.calibration.mask_of(original, inputs),
        )  # fmt: skip
        if fresh:
            self.nearest[name] = unit.error_nearest
        return unit

    def _activation(self, name: str) -> Any:
        if self.config.loss != "relu_mse":
            return lambda y: y
        return {"relu": F.relu, "relu6": F.relu6}.get(self.activations.get(name, ""), lambda y: y)

    def _done(self, name: str) -> Any:
        def done(unit: RoundingUnit) -> None:
            decided = min(layer.decidedness() for layer in unit.layers)
            for layer in unit.layers:
                layer.mode = "hard"
            row = {
                "unit": name,
                "error_nearest": self.nearest.get(name),
                "error_learned": unit.held_out_error(),
                "flips": sum(layer.flips() for layer in unit.layers) / len(unit.layers),
                "decided_before_rounding": decided,
            }
            if not row["error_learned"] < float("inf"):
                raise RunError(f"{PLUGIN}: {name}: its reconstruction diverged; use a smaller lr")
            self.rows.append(row)

        return done

    def _fisher(self, name: str) -> Rows:
        """Return the squared gradients of the float model's own loss for a unit's output, sample by sample."""
        rows = Rows(self.calibration.folder, f"fisher-{name}")
        seen: list[Tensor] = []

        def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_(True))
            return seen[-1].clone()

        handle = self.teacher.get_submodule(name).register_forward_hook(keep)
        try:
            for batch in self.calibration:
                seen.clear()
                with torch.enable_grad():
                    gradients = torch.autograd.grad(own_loss(self.run.forward(self.teacher, batch)), seen)
                rows.append(gradients[0].square())
        finally:
            handle.remove()
        return rows

    def _whole(self, name: str, inputs: Rows) -> Any:
        if len(inputs) != len(self.calibration):
            raise UnsupportedModelError(f"{PLUGIN}: {name} is called several times; loss=head_mse cannot follow that")
        module = self.model.get_submodule(name)

        def whole(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            batch = self.calibration.draw(rows)
            seen: list[Tensor] = []

            def keep(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                seen.append(output)
                return output.clone()

            handle = module.register_forward_hook(keep)
            try:
                logits = self.run.forward(self.model, batch)
            finally:
                handle.remove()
            with torch.no_grad():
                float_logits = self.run.forward(self.teacher, batch)
            return seen[0], logits, float_logits

        return whole

    def _open_scaling(self, number: int, fresh: bool) -> InputScaleUnit:
        name = self.units[number]
        self._set_modes(len(self.units))
        if number == 0:
            self.walk.drop()  # inputs were not quantized so far
        for place, other in enumerate(self.units):
            for layer in rounding_layers(self.model.get_submodule(other)):
                layer.quantizes_input = place <= number
        inputs = self._first_scales(name) if fresh else None
        if inputs is None:
            inputs = self.walk.record(name, outputs=False).inputs
        targets = self.float_walk.record(name, inputs=False).outputs
        assert targets is not None
        mask = self.calibration.mask_of(self.teacher.get_submodule(name), inputs)
        return InputScaleUnit(
            self.model.get_submodule(name), inputs, targets, self._activation(name), self.config, mask
        )

    def _first_scales(self, unit: str) -> Rows | None:
        """Give the inputs of a unit's layers the scale of least squared error; return those of a unit that is a layer."""
        for name in [item for item in self.order if item == unit or item.startswith(f"{unit}.")]:
            layer = self._layer(name)
            quantizer = layer.input_quantizer
            assert quantizer is not None
            layer.quantizes_input = False
            rows = self.walk.record(name, outputs=False, unit=unit).inputs
            few = slice(0, min(len(rows), 64))
            mask = self.calibration.mask_of(layer.layer, rows)
            x = rows.read(few)
            x = (x if mask is None else x[mask.read(few).bool()]).flatten()
            x = x[:: max(1, x.numel() // SCALE_SAMPLES)][None]
            if not quantizer.signed and bool((x < 0).any()):
                self.run.warn(
                    f"{PLUGIN}: {name}: its inputs were not negative in the first batch, now some are; clipped at 0"
                )
                x = x.clamp(min=0)
            scale, _ = search_scale(x, torch.tensor([quantizer.bits]), quantizer.signed, False, 2.0)
            quantizer.set_scale(scale[0].to(quantizer.scale.device))
            layer.quantizes_input = True
            if name == unit:
                return rows
            rows.drop()
        return None

    def finish(self) -> nn.Module:
        """Return the finished model; without steps its weights are rounded to nearest."""
        untouched = [name for name in self.order if self._layer(name).mode == "float"]
        for name in untouched:
            layer = self._layer(name)
            layer.learned = torch.zeros_like(layer.learned)
        self._set_modes(len(self.units))
        if self.config.act_bits is not None:
            self.walk.drop()
            for unit in self.units:
                inside = rounding_layers(self.model.get_submodule(unit))
                if any(
                    not bool(layer.input_quantizer.initialised) for layer in inside if layer.input_quantizer is not None
                ):
                    rows = self._first_scales(unit)
                    if rows is not None:
                        rows.drop()
        self.structure["units"] = self.rows
        self.structure["layers"] = convert(self.model)
        self.calibration.close()
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights."""
        return {
            "rounding": self.rounding.state_dict(),
            "scaling": self.scaling.state_dict(),
            "rows": [dict(row) for row in self.rows],
            "nearest": dict(self.nearest),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.rounding.load_state_dict(state["rounding"])
        self.scaling.load_state_dict(state["scaling"])
        self.rows = [dict(row) for row in state["rows"]]
        self.nearest = dict(state["nearest"])
        if len(self.rows) == len(self.units):
            self._set_modes(len(self.units))
