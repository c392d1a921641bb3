"""Declares the model sources `deanet:NAME` to eff. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run
    from eff.schemas import ModelSpec


class DEANetSources(Extension):
    """Answers `deanet:base`, `deanet:small` and `deanet:tiny`."""

    schemes = ("deanet",)
    models: ClassVar = {
        "deanet:base": "DEA-Net of the paper, width 32; 7.8 M parameters in training, 3.7 M folded",
        "deanet:small": "DEA-Net of width 16 with half the blocks; 1.0 M parameters in training, 0.5 M folded",
        "deanet:tiny": "DEA-Net of width 8 with a quarter of the blocks, for tests and desks; 0.1 M parameters",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the network; its initial weights are a function of the run's seed."""
        if spec.scheme != "deanet":
            return None
        from eff_restore_deanet.building import build

        return build(spec, run)
