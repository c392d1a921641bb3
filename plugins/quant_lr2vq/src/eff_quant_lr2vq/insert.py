"""Which layers are replaced, with which d and k, and the replacement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eff.errors import ConfigError, UnsupportedModelError
from eff.run import Run
from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.layers import check_layers, execution_order, find_layers, replace_module, warn_left_in_float
from eff_quant_lr2vq.block import Coded, LowRank, to_groups
from eff_quant_lr2vq.config import LR2VQConfig
from eff_quant_lr2vq.rank import approximation_error, knee, measured_errors, predicted_errors, spectrum

PLUGIN = "quant_lr2vq"


def insert_blocks(model: nn.Module, config: LR2VQConfig, structure: dict[str, Any], run: Run) -> nn.Module:
    """Choose layers and dimensions, note them in `structure` and put the blocks in.

    Raises:
        UnsupportedModelError: nothing to replace. ConfigError: a name is unknown, or a layer does not divide by m.
    """
    names = choose_layers(model, config, run)
    structure["float_bytes"] = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    structure["layers"] = {name: plan_layer(name, model.get_submodule(name), config, run) for name in names}
    return rebuild(model, config, structure)


def rebuild(model: nn.Module, config: LR2VQConfig, structure: dict[str, Any]) -> nn.Module:
    """Put in the blocks that `structure` names: training ones, or finished ones once they have been hardened."""
    for name, plan in structure["layers"].items():
        layer, k, d, m = model.get_submodule(name), plan["k"], plan["d"], plan["m"]
        new: nn.Module
        if not structure.get("hard"):
            new = LowRank(layer, m, d, k, config)
        elif isinstance(layer, nn.Linear) and config.group_axis == "in":
            shape = (layer.out_features, layer.in_features)
            rank = d if d < m else None
            new = CodebookLinear.empty(shape, k, m, layer.bias is not None, rank).to(layer.weight.device)
        else:
            new = Coded.empty(layer, m, d, k, config.group_axis)
        replace_module(model, name, new)
    return model


def choose_layers(model: nn.Module, config: LR2VQConfig, run: Run) -> list[str]:
    """Return the names of the layers to replace."""
    layers = find_layers(model)
    check_layers(PLUGIN, model, layers, config.skip or ())
    warn_left_in_float(PLUGIN, model, run)
    skip: Sequence[str] | None = config.skip
    if skip is None:
        order = execution_order(model, layers, lambda: model(*_example(run)))
        skip = (order[0], order[-1])
    chosen = []
    for name, layer in layers.items():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if name in skip or weight.numel() < config.min_params or is_depthwise(layer):
            continue
        check_divides(name, layer, config)
        if not bool(torch.isfinite(weight).all()):
            raise UnsupportedModelError(
                f"{PLUGIN}: the weight of '{name}' holds NaN or infinity; repair the model first"
            )
        chosen.append(name)
    if not chosen:
        raise UnsupportedModelError(
            f"{PLUGIN}: none of the {len(layers)} layers is left to compress: skipped are {', '.join(skip) or 'none'}, "
            f"depthwise ones and those below min_params = {config.min_params}; lower it or name layers in skip"
        )
    return chosen


def _example(run: Run) -> tuple[Tensor, ...]:
    return tuple(value.to(run.device) for value in run.task.example_inputs(2))


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each group reads one channel: sub-vectors would mix unrelated channels."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return getattr(layer, "groups", 1) > 1 and weight.shape[1] == 1


def check_divides(name: str, layer: nn.Module, config: LR2VQConfig) -> None:
    """Raise where the outputs (inputs) of a group do not divide by m."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    groups: int = getattr(layer, "groups", 1)
    size = weight.shape[0] // groups if config.group_axis == "out" else weight.shape[1]
    if size % config.m:
        noun = "outputs" if config.group_axis == "out" else "inputs"
        where = " per group" if groups > 1 else ""
        raise ConfigError(
            f"{PLUGIN}: m = {config.m} does not divide the {size} {noun}{where} of '{name}'; "
            "choose another m or leave the layer out with skip"
        )


def plan_layer(name: str, layer: nn.Module, config: LR2VQConfig, run: Run) -> dict[str, Any]:
    """Return m, d, k and the predicted errors of a layer."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    s = to_groups(weight, config.m, config.group_axis).reshape(-1, config.m)
    k = min(config.k, max(2, len(s) // 4))
    if k < config.k:
        run.warn(f"{PLUGIN}: '{name}' has {len(s)} sub-vectors; its codebook is reduced from {config.k} to {k}")
    eigenvalues = spectrum(s)[0].tolist()
    if config.d_tilde != "auto":
        errors, d = predicted_errors(eigenvalues, k), config.d_tilde
    elif config.estimator == "waterfill":
        errors = predicted_errors(eigenvalues, k)
        d = knee(errors, config.slack)
    else:
        errors = measured_errors(s, k, config.kmeans_iterations, run.generator(f"{PLUGIN}/estimate/{name}"))
        d = knee(errors, config.slack)
    return {
        "m": config.m,
        "d": d,
        "k": k,
        "sub_vectors": len(s),
        "weights": weight.numel(),
        "power": sum(eigenvalues),
        "approximation": approximation_error(eigenvalues, d),
        "predicted": errors,
    }


def blocks(model: nn.Module) -> dict[str, LowRank]:
    """Return the training blocks by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRank)}


def harden(model: nn.Module, structure: dict[str, Any], run: Run) -> nn.Module:
    """Replace every training block by its codes; the clustering error goes into `structure`."""
    for name, block in blocks(model).items():
        if not bool(block.unit):
            block.start_clustering(run.generator(f"{PLUGIN}/kmeans/{name}"))
        structure["layers"][name]["clustering"] = block.clustering_error()
        replace_module(model, name, block.harden())
    structure["hard"] = True
    return model
