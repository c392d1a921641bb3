"""Declares to eff the kit's file encoding, its diffusion task and the latency on eff-kernels. Imports no torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl
from eff.schemas import Metrics

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import ModelSpec


class QuantKit(Extension):
    """Teaches core to read files with bit-packed integer weights; task, data and models for diffusion."""

    encodings: ClassVar = {"quant-packed": "eff_quant_kit.packed:unpack_state"}
    tasks: ClassVar = {"diffusion": "eff_quant_kit.diffusion.task:Diffusion"}
    data_sources: ClassVar = {"diffusion_digits": "eff_quant_kit.diffusion.source:load"}
    schemes: ClassVar = ("diffusion",)
    models: ClassVar = {
        "diffusion:digits_dit": "diffusion transformer for 8 x 8 digits, 3 blocks of width 64; 0.24 M parameters",
        "diffusion:digits_unet": "U-Net with attention for 8 x 8 digits, width 32; 0.3 M parameters",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the denoiser that `diffusion:NAME` names."""
        if spec.scheme != "diffusion":
            return None
        from eff_quant_kit.diffusion.models import build

        return build(spec, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report the latency of quantized layers on eff-kernels, and how many of them run there."""
        if (
            "eff_quant_kit.layers" not in sys.modules
        ):  # then no model here has such layers; spares an import of torch ops
            return Metrics()
        from eff_quant_kit.execution import describe

        return describe(model, run)
