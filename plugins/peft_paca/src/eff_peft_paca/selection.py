"""Which input columns of a layer are trained."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, DataError, did_you_mean
from eff.modes import eval_mode, gradients_for
from eff.run import Run
from eff.seeding import named_generator
from eff_peft_kit.delta import matrix
from eff_peft_kit.targets import has_computed_weight, in_features, is_conv1d, matches
from eff_peft_paca.config import PaCAConfig

PLUGIN = "peft_paca"


def layer_option(name: str, default: float, patterns: Mapping[str, float]) -> float:
    """Return the value of the first pattern that fits a layer's name, else the default."""
    return next((value for pattern, value in patterns.items() if matches(name, pattern)), default)


def check_patterns(config: PaCAConfig, targets: Mapping[str, nn.Module]) -> None:
    """Raise where a pattern fits no layer, or a layer has fewer inputs than columns asked for.

    Raises:
        ConfigError: as its message says.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(config, option).items():
            if not any(matches(name, pattern) for name in targets):
                ends = {name.rpartition(".")[2] for name in targets}
                raise ConfigError(
                    f"{PLUGIN}: {option}: '{pattern}' matches no adapted layer{did_you_mean(pattern, ends)}"
                )
            if value <= 0:
                raise ConfigError(f"{PLUGIN}: {option}: '{pattern}' must be above 0, got {value}")
    for name, layer in targets.items():
        r, available = int(layer_option(name, config.r, config.rank_pattern)), in_features(layer)
        if r > available:
            raise ConfigError(
                f"{PLUGIN}: r={r} is more than the {available} input features of '{name}'; "
                f"use a smaller r, or -o 'rank_pattern={{\"{name}\": {available}}}'"
            )


def choose_columns(
    model: nn.Module, targets: Mapping[str, nn.Module], config: PaCAConfig, run: Run
) -> dict[str, Tensor]:
    """Return the column indices of each target layer, (r,) int64 in the order they were chosen.

    Columns that are all zero (pruned) are not chosen.

    Raises:
        ConfigError: a layer has fewer columns left than asked for. DataError: grad_norm without training data.
    """
    scores = gradient_norms(model, targets, config, run) if config.selection == "grad_norm" else {}
    chosen = {}
    for name, layer in targets.items():
        norms = column_norms(_weight(layer))
        alive = norms.nonzero().flatten()
        if not len(alive):  # a layer that starts at zero
            alive = torch.arange(len(norms))
        r = int(layer_option(name, config.r, config.rank_pattern))
        if r > len(alive):
            raise ConfigError(
                f"{PLUGIN}: r={r}, but only {len(alive)} of the {len(norms)} input columns of '{name}' are not pruned; "
                "use a smaller r or rank_pattern"
            )
        if config.selection == "random":
            order = torch.randperm(len(alive), generator=named_generator(config.seed, f"{PLUGIN}/{name}"))
        elif config.selection == "grad_norm":
            order = scores[name][alive].argsort(descending=True, stable=True)
        else:
            order = norms[alive].argsort(descending=config.selection == "weight_norm", stable=True)
        chosen[name] = alive[order[:r]]
    return chosen


def _weight(layer: nn.Module) -> Tensor:
    computed: Tensor = layer.weight() if has_computed_weight(layer) else matrix(layer)  # type: ignore[operator]
    return computed.detach()


def column_norms(weight: Tensor) -> Tensor:
    """Return the norm of each input column of a weight (out, in, ...), (in,) on the CPU."""
    return weight.detach().float().transpose(0, 1).flatten(1).norm(dim=1).cpu()


def gradient_norms(
    model: nn.Module, targets: Mapping[str, nn.Module], config: PaCAConfig, run: Run
) -> dict[str, Tensor]:
    """Return, per layer, the gradient norm of each column, added up over a few batches.

    Only one layer's gradient is kept at a time.
    """
    parameters = {name: _parameter(layer) for name, layer in targets.items()}
    sums = {name: torch.zeros(in_features(layer)) for name, layer in targets.items()}
    batches = 0
    size = run.train.batch_size or 8
    with ExitStack() as undo:
        undo.enter_context(eval_mode(model))
        undo.enter_context(gradients_for(model, parameters.values()))
        undo.callback(model.zero_grad, set_to_none=True)
        for name, parameter in parameters.items():

            def take(weight: Tensor, name: str = name) -> None:
                gradient = weight.grad
                assert gradient is not None
                sums[name] += column_norms(gradient.t() if is_conv1d(targets[name]) else gradient)
                weight.grad = None

            undo.callback(parameter.register_post_accumulate_grad_hook(take).remove)
        for batch in run.batches("train", config.warmup_batches * size, size):
            run.task.loss(run.forward(model, batch), batch).backward()
            batches += 1
    if not batches:
        raise DataError(f"{PLUGIN}: selection=grad_norm needs training data; use ?train=N above 0")
    return sums


def _parameter(layer: nn.Module) -> nn.Parameter:
    inner = layer.layer if has_computed_weight(layer) else layer
    parameter: nn.Parameter = inner.weight  # type: ignore[union-attr,assignment]
    return parameter
