"""The four stages in order, and where they stand: AdaQuant at each candidate, bits, norm tuning, bias tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eff.data import Batch
from eff.errors import ConfigError, RunError
from eff.modes import gradients_for
from eff.run import Run
from eff_quant_adaquant.bits import PLUGIN, check_reachable, choose_bits, rises, size_budget
from eff_quant_adaquant.config import AdaQuantConfig
from eff_quant_adaquant.insert import measure_inputs, range_layers
from eff_quant_adaquant.layerwise import LayerUnit, put, reset, take
from eff_quant_adaquant.quantizer import RangeLayer
from eff_quant_adaquant.tuning import distillation_loss, tune_norms
from eff_quant_kit.allocation import Table
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.layers import replace_module
from eff_quant_kit.post_training import prepare
from eff_quant_kit.reconstruction import UnitByUnit
from eff_quant_kit.sensitivity import read_sensitivity
from eff_quant_kit.walk import Walk

BATCHES_PER_REPEAT, REPEATS = 3, 20
BIAS_BATCH = 64
Found = dict[str, dict[str, Tensor]]


class Pipeline:
    """Everything that lives while a model is calibrated."""

    def __init__(self, model: nn.Module, config: AdaQuantConfig, structure: dict[str, Any], run: Run):
        """Fold, insert and measure.

        Raises:
            UnsupportedModelError: nothing to quantize, or a layer the data never reach. ConfigError: an option does not
                fit model or data. RequestError: target_ratio is out of reach. DataError: no training data.
        """
        self.config, self.structure, self.run = config, structure, run
        self.found: list[Found] = [{} for _ in config.bits]
        self.assembled = False
        self.best: dict[str, Any] | None = None
        """The biases with the smallest loss so far, and the loss."""
        self.calibration = CalibrationSet(run, config.calib_size, min(config.batch, 64), plugin=PLUGIN)
        try:
            self._prepare(model)
        except BaseException:
            self.calibration.close()
            raise

    def _prepare(self, model: nn.Module) -> None:
        config, run = self.config, self.run
        batch = next(iter(self.calibration))
        self._check_metric(model, batch)
        prepared = prepare(PLUGIN, model, lambda: run.forward(model, batch), self.structure, run, config.exclude)
        self.folded, layers, self.order = prepared.folded, prepared.layers, prepared.order
        self.activations = prepared.activations
        self.sensitivities = self._read_sensitivities()
        self.bits = [self._candidates(name) for name in self.order]
        self.weights = [layers[name].weight.numel() for name in self.order]  # type: ignore[union-attr,operator]
        self.budget = size_budget(self.weights, self.bits, config.target_ratio)
        if len(config.bits) > 1:
            check_reachable(self.budget)
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        for name in self.order:
            layer = RangeLayer(layers[name], self.bits[self.order.index(name)][0], self.act_bits(name, 0))
            replace_module(model, name, layer.to(run.device))
        model.eval()
        self.model = model
        if not run.restoring:
            measure_inputs(model, self.calibration, run)
            self._begin_candidate(0)
        self.walk, self.float_walk = Walk(self.calibration, model), Walk(self.calibration, self.teacher)
        self.steps = UnitByUnit(config.steps_per_layer, self._open)

    def _check_metric(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        metric = self.config.ip_metric
        if metric == "mse" or len(self.config.bits) == 1:
            return
        with torch.no_grad():
            output = self.run.forward(model.eval(), dict(batch))
        try:
            self.run.task.loss(output, dict(batch))
        except KeyError as error:
            raise ConfigError(
                f"{PLUGIN}: ip_metric={metric} needs {error} in the data, which it has not; use ip_metric=mse"
            ) from error
        if metric == "acc" and not self.is_classifier:
            raise ConfigError(f"{PLUGIN}: ip_metric=acc is for classifiers, the task is {self.run.task.name}; use loss")

    def _read_sensitivities(self) -> Table | None:
        if self.config.sensitivity is None:
            return None
        found = read_sensitivity(Path(self.config.sensitivity))
        cost = np.array(found.table("output_error", self.config.bits, self.order, PLUGIN))
        return np.asarray(cost - cost[:, :1])

    @property
    def is_classifier(self) -> bool:
        """Whether outputs are logits of classes."""
        return hasattr(self.run.task.options, "classes")

    def _candidates(self, name: str) -> list[int]:
        """Return the bits a layer may have, per candidate."""
        ends = (self.order[0], self.order[-1]) if self.config.keep_first_last else ()
        return [8 if name in ends else bits for bits in self.config.bits]

    def act_bits(self, name: str, candidate: int) -> int:
        """Return the bits of a layer's input at a candidate."""
        weight_bits = self._candidates(name)[candidate]
        ends = (self.order[0], self.order[-1]) if self.config.keep_first_last else ()
        return weight_bits if self.config.act_bits is None or name in ends else self.config.act_bits

    @property
    def layer_steps(self) -> int:
        """Train steps of the layers, over all candidates."""
        if not self.config.optimises:
            return 0
        return len(self.order) * len(self.config.bits) * self.config.steps_per_layer

    @property
    def step_count(self) -> int:
        """All train steps."""
        tuning = self.config.bias_epochs * REPEATS * BATCHES_PER_REPEAT if self.config.tunes_biases else 0
        return self.layer_steps + tuning

    def step(self, index: int) -> Tensor:
        """Do train step `index`; returns its loss."""
        if index < self.layer_steps:
            return self.steps.step(index)
        self.assemble()
        return self._bias_step(index - self.layer_steps)

    # --- stage 1: layers

    def _layer(self, name: str) -> RangeLayer:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, RangeLayer)
        return layer

    def _begin_candidate(self, candidate: int) -> None:
        for index, name in enumerate(self.order):
            original = self.teacher.get_submodule(name)
            reset(self._layer(name), original, self.bits[index][candidate], self.act_bits(name, candidate))

    def _set_bits(self, candidate: int) -> None:
        for index, name in enumerate(self.order):
            self._layer(name).set_bits(self.bits[index][candidate], self.act_bits(name, candidate))

    def _open(self, number: int, fresh: bool) -> LayerUnit:
        candidate, position = divmod(number, len(self.order))
        if fresh and position == 0:
            self._begin_candidate(candidate)
            self.walk.drop()
        self._set_bits(candidate)
        name = self.order[position]
        sequential = self.config.mode == "sequential"
        rows = self.float_walk.record(name, inputs=not sequential)
        inputs = self.walk.record(name, outputs=False).inputs if sequential else rows.inputs
        targets = rows.outputs
        assert targets is not None

        def done(unit: LayerUnit) -> None:
            self.found[candidate][name] = take(unit.layer)
            row = {
                "layer": name,
                "bits": self.bits[position][candidate],
                "error_before": unit.error_before,
                "error_after": unit.held_out_error(),
            }
            self.structure.setdefault("layers", []).append(row)

        layer = self._layer(name)
        mask = self.calibration.mask_of(layer.layer, inputs)
        return LayerUnit(layer, inputs, targets, self.activations.get(name), self.config, done, mask)

    # --- stages 2 and 3: bits, norms

    def assemble(self) -> None:
        """Choose bits, give each layer what was found for them, tune the norms; once."""
        if self.assembled:
            return
        self.walk.drop()
        self.float_walk.drop()
        for candidate, found in enumerate(self.found):
            if not found:  # the light pipeline, or no steps at all
                self._begin_candidate(candidate)
                found.update({name: take(self._layer(name)) for name in self.order})
        self.choices = tuple(0 for _ in self.order)
        if len(self.config.bits) > 1:
            self._choose()
        self._place(self.choices)
        if self.config.norm_tuning:
            with torch.no_grad():
                self.structure["norms_tuned"] = tune_norms(self.model, self.folded, self.calibration, self.run)
        self.assembled = True

    def _place(self, choices: tuple[int, ...]) -> None:
        for position in range(len(self.order)):
            self._place_one(position, choices[position])

    def _place_one(self, position: int, candidate: int) -> None:
        name = self.order[position]
        bits = self.bits[position][candidate]
        put(self._layer(name), self.found[candidate][name], bits, self.act_bits(name, candidate))

    def _choose(self) -> None:
        self._place((0,) * len(self.order))
        base = self._quality()

        def loss_with(layer: int, candidate: int) -> float:
            self._place_one(layer, candidate)
            loss = self._quality()
            self._place_one(layer, 0)
            return loss

        log = self.run.log
        with log.progress("bits", len(self.order)) as advance:

            def watched(layer: int, candidate: int) -> float:
                loss = loss_with(layer, candidate)
                if candidate + 1 == len(self.config.bits):
                    advance(1, "")
                return loss

            if self.sensitivities is not None:
                cost = self.sensitivities
            else:
                cost = rises(len(self.order), len(self.config.bits), watched, base)
        allocation = choose_bits(cost, self.budget)
        self.choices = allocation.choices
        self._place(self.choices)
        self.structure["programme"] = {
            "metric": self.config.ip_metric,
            "base_loss": base,
            "predicted_loss": base + allocation.cost,
            "true_loss": self._quality(),
            "ratio": allocation.used["target_ratio"],
            "target_ratio": self.config.target_ratio,
            "cost": cost.tolist(),
        }

    def _quality(self) -> float:
        """Return what ip_metric names over the calibration set, the smaller the better."""

        def measure(output: Tensor, batch: Batch) -> Tensor:
            if self.config.ip_metric == "loss":
                return self.run.task.loss(output, batch)
            if self.config.ip_metric == "acc":
                return 100.0 * (output.argmax(1) != batch["label"]).float().mean()
            return (output - self.run.forward(self.teacher, batch)).square().mean()

        return self._average(measure)

    @torch.no_grad()
    def _average(self, measure: Callable[[Tensor, Batch], Tensor]) -> float:
        """Return a measure of outputs and batch, averaged over the calibration set."""
        total = 0.0
        for batch in self.calibration:
            samples = len(next(value for value in batch.values() if isinstance(value, Tensor)))
            total += float(measure(self.run.forward(self.model, batch), batch)) * samples
        return total / len(self.calibration)

    # --- stage 4: biases

    def _bias_step(self, index: int) -> Tensor:
        """Do one step on the biases of all layers but the last (paper, sec. 4)."""
        epoch, step = divmod(index, REPEATS * BATCHES_PER_REPEAT)
        lr = self.config.bias_lr * (0.1 if epoch >= 10 else 1.0)
        biases = self._biases()
        if not biases:
            return torch.zeros(())
        if index == 0:
            self._keep_best(biases)
        rows = torch.randperm(len(self.calibration))[:BIAS_BATCH]
        batch = self.calibration.draw(rows)
        with torch.no_grad():
            target = self.run.forward(self.teacher, batch)
        with gradients_for(self.model, biases), torch.enable_grad():  # those of weights and ranges would cost more
            loss = distillation_loss(self.run.forward(self.model, batch), target, self.is_classifier)
            gradients = torch.autograd.grad(loss, biases)
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *gradients)):
            raise RunError(f"{PLUGIN}: bias tuning diverged; use a smaller bias_lr or bias_tuning=false")
        with torch.no_grad():
            for bias, gradient in zip(biases, gradients, strict=True):
                bias.sub_(lr * gradient)
        if step + 1 == REPEATS * BATCHES_PER_REPEAT:
            self._keep_best(biases)
        return loss.detach()

    def _biases(self) -> list[nn.Parameter]:
        return [
            layer.layer.bias  # type: ignore[misc]
            for name, layer in range_layers(self.model).items()
            if name != self.order[-1] and layer.layer.bias is not None
        ]

    def _keep_best(self, biases: Sequence[nn.Parameter]) -> None:
        """Remember the biases if nothing yet was nearer to the float model on the whole calibration set.

        The card's rate of 0.1 is at the edge: a run may diverge epochs after it had all but converged.
        """
        loss = self._average(
            lambda output, batch: distillation_loss(output, self.run.forward(self.teacher, batch), self.is_classifier)
        )
        if self.best is None or loss < self.best["loss"]:
            self.best = {"loss": loss, "biases": [bias.detach().clone() for bias in biases]}

    def finish(self) -> None:
        """Leave in `structure` what rebuilds the finished model; delete what lies on disk."""
        self.assemble()
        if self.best is not None:
            with torch.no_grad():
                for bias, kept in zip(self._biases(), self.best["biases"], strict=True):
                    bias.copy_(kept)
        self.structure["bits"] = {
            name: [layer.weight_quantizer.bits, layer.input_quantizer.bits]
            for name, layer in range_layers(self.model).items()
        }
        self.calibration.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights."""
        return {
            "found": [{name: dict(item) for name, item in found.items()} for found in self.found],
            "assembled": self.assembled,
            "choices": list(getattr(self, "choices", ())),
            "best": self.best,
            "steps": self.steps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.found = [dict(found) for found in state["found"]]
        self.assembled = bool(state["assembled"])
        self.best = state["best"]
        self.steps.load_state_dict(state["steps"])
        if self.assembled:
            self.choices = tuple(state["choices"])
            for position, candidate in enumerate(self.choices):
                name = self.order[position]
                self._layer(name).set_bits(self.bits[position][candidate], self.act_bits(name, candidate))
