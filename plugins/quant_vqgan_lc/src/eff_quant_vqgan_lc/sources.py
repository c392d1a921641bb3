"""Declares to eff the task, the data source and the models of image tokenizers. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from eff.run import Run
    from eff.schemas import ModelSpec


class VQGANSources(Extension):
    """Adds the task "tokenization", the source `pictures:` and the autoencoders `vqgan:NAME`."""

    schemes = ("vqgan",)
    tasks: ClassVar = {"tokenization": "eff_quant_vqgan_lc.task:Tokenization"}
    data_sources: ClassVar = {"pictures": "eff_quant_vqgan_lc.pictures:load"}
    models: ClassVar = {
        "vqgan:f16": "autoencoder of VQGAN, width 128, 16 x 16 pixels per token; 71 M parameters, untrained",
        "vqgan:f8": "autoencoder of VQGAN, width 128, 8 x 8 pixels per token; 68 M parameters, untrained",
        "vqgan:small": "autoencoder of width 32, 8 x 8 pixels per token, for desks; 0.3 M parameters, untrained",
        "vqgan:tiny": "autoencoder of width 8, 2 x 2 pixels per token, for tests; 0.01 M parameters, untrained",
    }

    @hookimpl
    def build_model(self, spec: ModelSpec, run: Run) -> nn.Module | None:
        """Return the autoencoder, whose latent is not quantized yet."""
        if spec.scheme != "vqgan":
            return None
        from eff_quant_vqgan_lc.autoencoder import build

        return build(spec, run)
