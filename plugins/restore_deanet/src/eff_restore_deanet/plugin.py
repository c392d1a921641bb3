"""Declares restore_deanet to eff. Imports no torch; each hook imports what it needs."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, ClassVar

from eff.errors import ConfigError
from eff.method import Card, Check, Claim, Method, Sample, hookimpl
from eff.schemas import Metric, Metrics, TrainOptions
from eff_restore_deanet.config import DEANetConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff.schemas import Artifact, ExportTarget


class DEANet(Method[DEANetConfig]):
    """Detail-enhanced convolutions that fold into plain ones, with contrastive training."""

    card: ClassVar = Card(
        title="DEA-Net: Single Image Dehazing Based on Detail-Enhanced Convolution and Content-Guided Attention",
        authors=("Zixuan Chen", "Zewei He", "Zhe-Ming Lu"),
        venue="IEEE Transactions on Image Processing",
        year=2024,
        paper="arXiv:2301.04805",
        url="https://arxiv.org/abs/2301.04805",
        tasks=("any",),
        needs=("train_data",),
        composes_with=(
            "quantization after folding",
            "pruning after folding",
            "distillation",
            "any network with 3x3 convolutions of stride 1 (DEConvs are inserted)",
        ),
        conflicts_with=("prune_*", "quant_*"),  # in one run; after it they find plain convolutions
        notes="The network is a model source of its own: deanet:base, deanet:small, deanet:tiny.",
    )
    claims: ClassVar = (
        Claim(
            id="dehaze_photos",
            statement="Folding is exact and costs nothing: DEConv gives the plain network's size, at least its PSNR, and dehazes.",
            run="eff_restore_deanet.claims:dehaze_photos",
            checks=(
                Check(left="fold_error", right=1e-5, relation="at_most"),
                Check(left="folded_weights", right="plain_weights", relation="at_most"),
                Check(left="folded_weights", right="plain_weights"),
                Check(left="deanet", right="hazy", margin=4.0),
                Check(left="deanet", right="plain_conv", margin=-0.05),
            ),
            paper="SOTS-indoor PSNR 41.31 dB, SSIM 0.9945 (DEA-Net-CR); 3.653 M parameters after folding.",
            unit="dB PSNR",
            units={"error": "", "weights": ""},
            seeds=(0, 1, 2),
            minutes=7,
        ),
    )
    sample: ClassVar = Sample(
        model="deanet:tiny",
        data="eff_restore_kit.samples:scenes?train=16&test=4&size=32",
        train=TrainOptions(epochs=1, batch_size=8),
    )

    def __init__(self, config: DEANetConfig | None = None):
        super().__init__(config)
        self.features: nn.Module | None = None

    def training(self) -> TrainOptions:
        """Return the published script's recipe: Adam, cosine from lr to lr_min, no weight decay."""
        config = self.config
        return TrainOptions(
            optimizer="adam", lr=config.lr, weight_decay=0.0, schedule="cosine", epochs=config.epochs,
            batch_size=config.batch,
        )  # fmt: skip

    @hookimpl
    def transform(self, model: nn.Module, run: Run) -> nn.Module:
        """Insert DEConvs where the model has none; fold them where a finished model is restored."""
        from eff_restore_deanet.insert import choose_convs, deconvs_of, fold, insert_deconvs

        config = self.config
        if not run.restoring:
            is_wanted = config.insert == "always" or (config.insert == "auto" and not deconvs_of(model))
            names = choose_convs(model, config.include, config.exclude) if is_wanted else []
            self.structure["inserted"] = list(names)
        inserted = self.structure.get("inserted", [])
        assert isinstance(inserted, list)
        model = insert_deconvs(model, [str(name) for name in inserted], config.branches, config.insert_init)
        if self.structure.get("folded"):
            return fold(model)
        if run.training:
            self.features = self._features(run)
        return model

    def _features(self, run: Run) -> nn.Module | None:
        """Return the frozen network of CR, or None where the training is with the task's loss alone."""
        config = self.config
        if config.w_cr == 0 or config.features is None:
            if config.w_cr > 0 and run.task.name == "restoration":
                run.log.info(
                    "restore_deanet: no features named, so no contrastive regularisation (DEA-Net, not DEA-Net-CR)"
                )
            return None
        if run.task.name != "restoration" or run.task.options.scale != 1:
            raise ConfigError(
                "restore_deanet: contrastive regularisation compares output and input, which this task does not allow; "
                "use -o w_cr=0"
            )
        from eff_restore_kit.features import VGGFeatures

        return VGGFeatures(config.features).to(run.device)

    @hookimpl(wrapper=True)
    def train_step(self, step: Step) -> Generator[None, StepResult, StepResult]:
        """Weigh the loss, add CR, and let the cosine end at lr_min."""
        from eff_restore_deanet.loss import with_contrast

        step.loss = with_contrast(step.loss, self.features, self.config)
        train = step.run.train
        if step.optimizer is not None and train.schedule == "cosine" and train.lr:
            for group in step.optimizer.param_groups:
                group["lr"] += self.config.lr_min * max(0.0, 1 - group["lr"] / train.lr)  # core's cosine ends at 0
        return (yield)

    def finish(self, model: nn.Module, run: Run) -> nn.Module:
        """Measure the error of folding and fold."""
        from eff_restore_deanet.insert import deconvs_of, fold, fold_error

        if not deconvs_of(model):
            return model
        self.structure["fold_error"] = fold_error(model)
        self.structure["weights_in_training"] = sum(parameter.numel() for parameter in model.parameters())
        if self.config.fold:
            model = fold(model)
            self.structure["folded"] = True
        return model

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report the error of folding and the weights before it; show test images beside their targets."""
        if run.task.name == "restoration" and self.structure:
            from eff_restore_kit.figures import write_comparison

            write_comparison(model, run)
        if "fold_error" not in self.structure:
            return Metrics()
        error, weights = self.structure["fold_error"], self.structure["weights_in_training"]
        return Metrics.of(
            fold_error=Metric(value=float(error), better="lower"),  # type: ignore[arg-type]
            weights_in_training=Metric(value=float(weights), better="neither"),  # type: ignore[arg-type]
        )

    @hookimpl
    def export(self, model: nn.Module, target: ExportTarget, run: Run) -> Artifact | None:
        """Write core's formats with every DEConv folded; None where the model has none."""
        from eff_restore_deanet.insert import deconvs_of, folded_copy

        if not deconvs_of(model):
            return None
        from eff.exporting import export_standard

        before = dict(self.structure)
        self.structure["folded"] = True  # what the file's header must say
        try:
            return export_standard(folded_copy(model), target, run)
        finally:
            self.structure.clear()
            self.structure.update(before)
