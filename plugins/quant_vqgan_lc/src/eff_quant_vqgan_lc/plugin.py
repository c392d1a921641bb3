"""Declares quant_vqgan_lc to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_vqgan_lc.config import VQGANLCConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget
    from eff_quant_vqgan_lc.objective import Objective

WARMUP = 0.05
"""5 of 100 epochs."""


class VQGANLC(Method[VQGANLCConfig]):
    """VQGAN-LC: an image codebook of frozen features behind one shared projector."""

    card: ClassVar = Card(
        title="Scaling the Codebook Size of VQGAN to 100,000 with a Utilization Rate of 99%",
        authors=("Lei Zhu", "Fangyun Wei", "Yanye Lu", "Dong Chen"),
        venue="NeurIPS",
        year=2024,
        paper="arXiv:2406.11837",
        url="https://arxiv.org/abs/2406.11837",
        tasks=("tokenization",),
        needs=("train_data",),
        formats=("tokens",),
        composes_with=(
            "token generators",
            "entropy coding of the tokens",
            "quant_lsq on encoder and decoder before it",
        ),
        notes="Autoencoders: vqgan:f16, vqgan:f8, vqgan:small, or your own; data: pictures:SOURCE.",
    )
    claims: ClassVar = (
        Claim(
            id="photos_2048",
            statement="At 2048 entries the projected frozen table is used above 90 %, twice as much as random entries learned as published, at no loss of PSNR.",
            run="eff_quant_vqgan_lc.claims:photos_2048",
            checks=(
                Check(left="frozen_linear_train_use", right=90.0),
                Check(left="frozen_over_random_tuned", right=2.0),
                *(
                    Check(left="frozen_linear_psnr", right=f"{name}_psnr", margin=-0.1)
                    for name in ("random_tuned", "factorized", "ema", "tuned_features")
                ),
            ),
            paper="ImageNet f16: 100,000 entries used above 99 %; VQGAN-FC at most 16,384, under 12 % (abstract).",
            unit="%",
            units={"psnr": "dB", "tuned": ""},
            seeds=(0, 1, 2),
            minutes=10,
        ),
    )
    sample: ClassVar = Sample(
        model="vqgan:tiny",
        data="pictures:eff.testing.samples:blobs?train=64&test=32",
        options={
            "n_codes": 32, "code_dim": 4, "table": "random", "features": "eff.testing.samples:tiny_cnn", "feature_layer": "conv2",
            "feature_size": None, "pool": 2, "perceptual_layers": ["conv1"], "rate_d": 0.0, "batch": 16, "epochs": 1,
        },
        train=TrainOptions(epochs=1, batch_size=16),
    )  # fmt: skip

    def __init__(self, config: VQGANLCConfig | None = None):
        super().__init__(config)
        self.objective: Objective | None = None

    def training(self) -> TrainOptions:
        """Return the reference recipe: Adam, warm-up over a twentieth, half a cosine."""
        config = self.config
        return TrainOptions(
            optimizer="adam", optimizer_options={"betas": list(config.betas), "eps": 1e-7}, lr=config.lr, weight_decay=0.0,
            schedule="cosine", warmup=WARMUP, epochs=config.epochs, batch_size=config.batch,
        )  # fmt: skip

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Make the table and put it, its projector and two 1x1 convolutions between encoder and decoder."""
        from eff_quant_vqgan_lc.insert import insert, rebuild

        if run.restoring:
            tokenizer = rebuild(model, self.config, self.structure)
        else:
            tokenizer = insert(model, self.config, self.structure, run)
        if run.training:
            from eff_quant_vqgan_lc.objective import Objective

            self.objective = Objective(tokenizer, self.config, run)
        return tokenizer

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do a step of the autoencoder and, from `disc_start` on, of the discriminator."""
        assert self.objective is not None  # made by transform where a training follows
        return self.objective.step(step)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Project the table for good: what is measured and shipped are its N x d entries."""
        from eff_quant_vqgan_lc.model import Tokenizer

        assert isinstance(model, Tokenizer)
        if self.objective is not None:
            self.objective.close_epoch()
            usage = self.objective.last_epoch
            if usage is not None:
                self.structure["train_utilisation"] = usage.utilisation
                self.structure["train_perplexity"] = usage.perplexity / usage.entries
        model.codebook = model.codebook.finished()
        self.structure |= {"finished": True, "width": self.config.code_dim}
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report utilisation and perplexity, bits per pixel and the Frechet distance of features; draw reconstructions."""
        from eff_quant_vqgan_lc.model import Tokenizer
        from eff_quant_vqgan_lc.report import describe

        return describe(model, self.structure, self.config, data, run) if isinstance(model, Tokenizer) else Metrics()

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write entries, encoder, decoder and the tokens of the data as one safetensors file."""
        from eff_quant_vqgan_lc.model import Tokenizer

        if target.format not in self.card.formats or not isinstance(model, Tokenizer):
            return None
        from eff.files import describe_artifact
        from eff_quant_vqgan_lc.report import write_tokens

        return describe_artifact(target.path, target.format, write_tokens(model, target.path, run))

    def state_dict(self) -> dict[str, Any]:
        """Return the discriminator, its optimiser and the counts of the epoch."""
        return self.objective.state_dict() if self.objective is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        if self.objective is not None and state:
            self.objective.load_state_dict(dict(state))
