"""Declares the kit's model sources to eff. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run
    from eff.schemas import ModelSpec


class NasKit(Extension):
    """Model sources `nas:NAME`: macro spaces at their largest, and networks that a search has chosen."""

    schemes: ClassVar = ("nas",)
    models: ClassVar = {
        "nas:conv_macro": "Toy space of TangleNAS: 5 convolutions, 6561 networks of 4 widths and 4 kernel sizes",
        "nas:digits_macro": "Macro space for 8 x 8 images: 3 convolutions, 729 networks with kernels 1, 3, 5",
        "nas:genotype": "The network of a genotype, untrained: nas:genotype?file=genotype.json",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the network that `nas:NAME` names."""
        if spec.scheme != "nas":
            return None
        from eff_nas_kit.building import build

        return build(spec, run)
