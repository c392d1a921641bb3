"""One training step: gradients to the fixed-point weights, the update to a float32 master copy, formats that switch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import NonFiniteLossError
from eff.run import Run, Step, StepResult
from eff.schemas import Metric
from eff_quant_adapt.config import AdaPTConfig
from eff_quant_adapt.cost import Cost, multiply_adds
from eff_quant_adapt.formats import State, next_strategy, quantize
from eff_quant_adapt.layers import fixed_layers, initialise, owners


class Trainer:
    """The master copy and what formats depend on."""

    def __init__(self, model: nn.Module, config: AdaPTConfig, run: Run):
        self.model, self.config = model, config
        self.layers = fixed_layers(model)
        self.owner = owners(model)
        if config.init == "truncated" and not run.restoring:
            initialise(model, config.gain)
        start = (config.wl_init, config.fl_init, config.lb_min, config.res_min)
        self.states = {name: State(*start) for name in self.layers}
        self.strategy = "min" if config.strategy == "adaptive" else config.strategy
        self.recent: list[float] = []
        self.history: list[list[int]] = [[0, index, *start] for index in range(len(self.layers))]
        """Step, layer, WL, FL, lookback and bins at the start and at every switch."""
        self.word_lengths: list[float] = []
        """Mean over the layers after each step."""
        self.master = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.weight_of = {name: names[layer.layer.weight] for name, layer in self.layers.items()}
        self.cost = Cost(multiply_adds(model, run))
        self._show(stochastic=not run.restoring)

    def _show(self, stochastic: bool = True) -> None:
        """Put the master copy, quantized, into the model."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                state = self.states[self.owner[name]]
                parameter.copy_(quantize(self.master[name], state.wl, state.fl, stochastic))

    def step(self, step: Step) -> StepResult:
        """Do one step."""
        config, optimizer = self.config, step.optimizer
        assert optimizer is not None
        loss, _ = step.loss(step.model, step.batch)
        penalty = config.l1 * sum((layer.layer.weight.abs().sum() for layer in self.layers.values()), torch.zeros(()))  # type: ignore[operator,union-attr]
        if not bool(torch.isfinite(loss)):
            formats = ", ".join(f"{name} <{state.wl}, {state.fl}>" for name, state in self.states.items())
            raise NonFiniteLossError(f"quant_adapt: the loss is {float(loss)} with the formats {formats}")
        step.backward(loss + penalty)
        if not step.last_of_step:
            return StepResult(loss.detach())
        self._prepare_gradients()
        switched = self._adapt(float(loss.detach()), step.index)
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.master[name])
            optimizer.step()
            self.master = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._show()
        self.cost.note(self.layers, self.states, step.run.train.accumulate or 1)
        mean = sum(state.wl for state in self.states.values()) / len(self.states)
        self.word_lengths.append(mean)
        shown = loss.detach()
        if config.bits_penalty:
            shown = shown + config.bits_penalty * sum(
                self.states[name].wl / 32 * layer.density() for name, layer in self.layers.items()
            )
        return StepResult(shown, {"mean_wl": Metric(value=mean, unit="bits"), "switches": Metric(value=switched)})

    def _prepare_gradients(self) -> None:
        """Quantize each gradient in its layer's format and divide it by its norm; one of norm 0 stays."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None:
                continue
            state = self.states[self.owner[name]]
            if self.config.quant_grads:
                parameter.grad = quantize(parameter.grad, state.wl, state.fl)
            norm = parameter.grad.norm()
            if self.config.normalize_grads and float(norm) > 0:
                parameter.grad = parameter.grad / norm

    def _adapt(self, loss: float, index: int) -> int:
        """Collect gradients, move the knobs, switch formats; return how many layers switched."""
        config = self.config
        if not config.adapt:
            return 0
        switched = 0
        for place, (name, layer) in enumerate(self.layers.items()):
            gradient: Tensor | None = layer.layer.weight.grad  # type: ignore[union-attr,assignment]
            if gradient is None:
                continue
            state = self.states[name]
            state.collect(gradient)
            state.adjust(config)
            if state.switch(self.master[self.weight_of[name]], self.strategy, config):
                switched += 1
                layer.format.copy_(torch.tensor([state.wl, state.fl]))
                self.history.append([index + 1, place, state.wl, state.fl, state.lookback, state.bins])
        if config.strategy == "adaptive":
            window = round(sum(state.lookback for state in self.states.values()) / len(self.states))
            self.recent = self.recent[-window:]
            self.strategy = next_strategy(self.strategy, self.recent, loss)
            self.recent.append(loss)
        return switched

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "master": self.master,
            "states": {name: dict(vars(state)) for name, state in self.states.items()},
            "strategy": self.strategy,
            "recent": self.recent,
            "history": self.history,
            "word_lengths": self.word_lengths,
            "cost": self.cost.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.master = dict(state["master"])
        self.states = {name: State(**values) for name, values in state["states"].items()}
        self.strategy, self.recent = state["strategy"], list(state["recent"])
        self.history, self.word_lengths = [list(row) for row in state["history"]], list(state["word_lengths"])
        self.cost.load_state_dict(state["cost"])
