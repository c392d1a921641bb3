"""Declares peft_paca to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_peft_paca.config import PaCAConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class PaCA(Method[PaCAConfig]):
    """Partial connection adaptation: trains some input columns of each linear layer in place."""

    card: ClassVar = Card(
        title="PaCA: Partial Connection Adaptation for Efficient Fine-Tuning",
        authors=("Sunghyeon Woo", "Sol Namkung", "Sunwoo Lee", "Inho Jeong", "Beomseok Kim", "Dongsuk Jeon"),
        venue="ICLR",
        year=2025,
        paper="arXiv:2503.01905",
        url="https://arxiv.org/abs/2503.01905",
        tasks=("any",),
        needs=("train_data",),
        formats=("delta",),
        composes_with=(
            "quantized base weights, also those of quant_lsq named before it",
            "quantization of the finished model",
            "pruning before it (pruned columns are not chosen)",
            "gradient checkpointing",
        ),
        conflicts_with=("peft_*", "nas_*"),
        notes="quantize_base=nf4 is the paper's QPaCA. Convolutions named in targets are adapted too (not in the paper).",
    )
    claims: ClassVar = (
        Claim(
            id="minilm_sentences",
            statement="At equal trained parameters PaCA reaches LoRA's accuracy, keeps less for the backward pass and steps no slower.",
            run="eff_peft_paca.claims:minilm_sentences",
            checks=(
                Check(left="paca", right="lora", margin=-1.5),
                Check(left="paca", right="probe"),
                Check(left="paca_kept_share", right="kept_share_bound", relation="at_most"),
                Check(left="paca_kept_mb", right="lora_kept_mb", relation="at_most"),
                Check(left="paca_step_over_lora", right=1.0, relation="at_most"),
            ),
            paper="Training time -22 %, memory -16 % against LoRA at comparable accuracy (abstract; LLaMA models).",
            unit="%",
            units={"mb": "MB", "over_lora": "", "share": "", "bound": ""},
            seeds=(0, 1, 2),
            minutes=9,
        ),
        Claim(
            id="vit_digits",
            statement="A ViT made on the digits 0 to 4 learns 5 to 9 with PaCA as with LoRA, keeping less and stepping no slower.",
            run="eff_peft_paca.claims:vit_digits",
            checks=(
                Check(left="paca", right="lora", margin=-1.5),
                Check(left="paca", right="probe"),
                Check(left="paca_kept_share", right="kept_share_bound", relation="at_most"),
                Check(left="paca_kept_mb", right="lora_kept_mb", relation="at_most"),
                Check(left="paca_step_over_lora", right=1.0, relation="at_most"),
            ),
            paper="Training time -22 %, memory -16 % against LoRA at comparable accuracy (abstract; LLaMA models).",
            unit="%",
            units={"mb": "MB", "over_lora": "", "share": "", "bound": ""},
            seeds=(0, 1, 2),
            minutes=3,
        ),
    )
    sample: ClassVar = Sample(
        model="zoo:vit_micro?depth=2",
        data="digits?train=128&test=64",
        options={"r": 4},
        train=TrainOptions(epochs=1, batch_size=32, lr=0.01),
    )

    def __init__(self, config: PaCAConfig | None = None):
        super().__init__(config)
        self.original: dict[str, Tensor] = {}
        """Columns before training, kept where differences are to be written."""

    def training(self) -> TrainOptions:
        """Return the recipe of the reference scripts (MMLU tuning): AdamW 1e-4, one epoch, 8 samples per step.

        They make the 8 from 4 batches of 2; `accumulate` does that where memory is short.
        """
        return TrainOptions(optimizer="adamw", lr=1e-4, weight_decay=0.0, schedule="cosine", epochs=1, batch_size=8)

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Choose layers and columns, make the columns parameters, freeze the rest."""
        from eff_peft_paca.insert import insert_columns, trained_columns

        model = insert_columns(model, self.config, self.structure, run)
        if self.config.delta == "difference" and not run.restoring:
            columns = trained_columns(model, self.structure)
            self.original = {name: values.clone() for name, (_, values) in columns.items()}
        return model

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Write the trained columns into their weights after each optimiser step."""
        from eff_peft_paca.layer import partial_layers

        result = yield
        if self.config.write_back == "after_step":
            for layer in partial_layers(step.module).values():
                layer.synchronise()
        return result

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Return plain layers: the trained columns already are in the weights."""
        from eff_peft_paca.insert import merge

        return merge(model, self.structure, self.config, run)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report trained parameters, bytes kept for the backward pass, step time and the gradients' error."""
        from eff_peft_paca.diagnostics import diagnose

        return diagnose(model, data, run, self.structure, self.config)

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write the trained columns and the other trained tensors without the base model."""
        if target.format not in self.card.formats:
            return None
        from eff.files import describe_artifact
        from eff_peft_kit.delta import write_delta
        from eff_peft_paca.insert import make_delta

        details = write_delta(target.path, make_delta(model, self.structure, self.config, self.original))
        return describe_artifact(target.path, target.format, details)

    def state_dict(self) -> dict[str, Any]:
        """Return the columns before training."""
        return {"original": self.original}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.original = dict(state.get("original", {}))
