"""The finished structure from what a checkpoint remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.layers import replace_module


def rebuild(model: nn.Module, structure: Mapping[str, Any], d: int) -> nn.Module:
    """Return `model` with layers of zeros codes, to load a state into."""
    for name, plan in structure["layers"].items():
        rows, columns = plan["shape"]
        device = next(model.get_submodule(name).parameters()).device
        replace_module(model, name, CodebookLinear.empty((rows, columns), plan["k"], d, plan["bias"]).to(device))
    return model
