"""Declares quant_biadapter to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_quant_biadapter.config import BiAdapterConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run
    from eff.schemas import Artifact, ExportTarget


class BiAdapter(Method[BiAdapterConfig]):
    """Bi-AdaptFormer and Bi-LoRA: adapters of 1, 2 or 4 bits a weight, trained quantized."""

    card: ClassVar = Card(
        title="Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision Redundancy",
        authors=("Shibo Jie", "Haoqing Wang", "Zhi-Hong Deng"),
        venue="ICCV",
        year=2023,
        paper="arXiv:2307.16867",
        url="https://arxiv.org/abs/2307.16867",
        needs=("train_data",),
        tasks=("classification", "text_classification"),
        formats=("biadapter",),
        composes_with=("quantized or pruned frozen models", "distillation"),
        conflicts_with=("peft_*", "nas_*"),
        notes="The file holds adapters and head; the model that was adapted is needed beside it.",
    )
    claims: ClassVar = (
        Claim(
            id="vit_digits",
            statement="At equal bits 1-bit adapters of width 32 beat float ones of width 1 and are near float ones of width 32.",
            run="eff_quant_biadapter.claims:vit_digits",
            checks=(
                Check(left="bits1_h32", right="float_h1", margin=2.0),
                Check(left="bits1_h32", right="bits2_h16"),
                Check(left="bits2_h16", right="bits4_h8"),
                Check(left="bits1_h32", right="float_h32", margin=-1.0),
                Check(left="file_over_formula", right=1.0, relation="at_most"),
                Check(left="reload_difference", right=1e-5, relation="at_most"),
            ),
            paper="VTAB-1K, ViT-B/16: 77.0 % with 212.9 kB a task (h=32, 1 bit); 73.8 % with 6.8 kB (h=1, Bi-Head).",
            unit="% accuracy",
            units={"bytes": "B", "formula": "", "difference": "", "drop": "points"},
            seeds=(0, 1, 2),
            minutes=6,
        ),
    )
    sample: ClassVar = Sample(
        model="zoo:vit_micro?depth=1",
        data="digits?train=128&test=64",
        options={"dim": 4},
        train=TrainOptions(epochs=1, batch_size=64),
    )

    def training(self) -> TrainOptions:
        """Return the reference code's recipe: AdamW with warm-up and cosine."""
        config = self.config
        warmup = config.warmup / config.epochs if config.epochs else 0.0
        return TrainOptions(
            optimizer="adamw", lr=config.lr, weight_decay=config.weight_decay, schedule="cosine", epochs=config.epochs,
            warmup=min(warmup, 0.99),
        )  # fmt: skip

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Put adapters in, freeze the rest but the head; load a file where one is given."""
        from pathlib import Path

        from eff_quant_biadapter.insert import insert, unfix
        from eff_quant_biadapter.order import linear_order
        from eff_quant_biadapter.storage import load

        order = None if run.restoring else linear_order(model, run)
        model = insert(model, self.config, self.structure, order)
        if self.config.load is not None and not run.restoring:
            load(model, Path(self.config.load), str(self.structure["head"]), self.config)
            if run.training:  # go on from what was loaded, quantized again
                unfix(model)
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data | None, run: Run) -> Metrics:
        """Report the bytes of the task and, where asked for, how it bears noise."""
        from eff_quant_biadapter.report import describe

        return describe(model, data, run, str(self.structure.get("head", "")), self.config)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write codes, means, deviations and the head."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_quant_biadapter.insert import adapter_layers
        from eff_quant_biadapter.storage import dump, payload_bytes

        head = str(self.structure["head"])
        target.path.write_bytes(dump(model, head, self.config))
        details = {
            "needs_base": True,
            "layers": len(adapter_layers(model)),
            "payload_bytes": payload_bytes(model, head),
        }
        return describe_artifact(target.path, target.format, details)
