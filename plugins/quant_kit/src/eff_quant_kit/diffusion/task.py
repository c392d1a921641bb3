"""Task `diffusion`: predicting the noise in images. Batches: image (N, C, H, W) in [0, 1], maybe label (N,)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.errors import DataError, RequestError
from eff.modes import eval_mode
from eff.schemas import Metric, Metrics, Schema
from eff.tasks import Prediction, Task
from eff_quant_kit.diffusion.sampling import predict_noise
from eff_quant_kit.diffusion.schedule import Schedule

LABEL_DROP = 0.1
"""Share of training labels replaced by the null label, for classifier-free guidance."""


class DiffusionOptions(Schema):
    """What a denoiser's file remembers."""

    input_shape: tuple[int, int, int] = Field(description="Channels, height, width.")
    classes: tuple[str, ...] = Field((), description="Class names; empty: unconditional. The null label follows them.")
    steps: int = Field(100, ge=1, description="Timesteps of the schedule.")
    beta_start: float = Field(1e-3, gt=0, lt=1)
    beta_end: float = Field(0.2, gt=0, lt=1)


class Denoised(NamedTuple):
    """What a forward pass gives: the predicted noise and the true one."""

    predicted: Tensor
    noise: Tensor


class NoiseMeter:
    """Mean squared error of the predicted noise."""

    def __init__(self) -> None:
        self.total, self.samples = 0.0, 0

    def update(self, output: Denoised, batch: Batch) -> None:
        """Take in one batch."""
        self.total += float((output.predicted - output.noise).square().flatten(1).mean(1).sum())
        self.samples += len(output.noise)

    def compute(self) -> Metrics:
        """Return the mean over all samples."""
        if not self.samples:
            raise DataError("no samples to measure on; the test split is empty")
        return Metrics.of(noise_mse=Metric(value=self.total / self.samples, better="lower"))


class Diffusion(Task[DiffusionOptions]):
    """Images to noise. Timesteps are uniform: from the step's seed in training, the same ones in every evaluation."""

    name = "diffusion"
    options_type = DiffusionOptions
    headline = "noise_mse"
    input_names = ("x", "t", "class_labels")

    def __init__(self, options: DiffusionOptions):
        super().__init__(options)
        try:
            self.schedule = Schedule(options.steps, options.beta_start, options.beta_end)
        except ValueError as error:
            raise RequestError(f"task 'diffusion': {error}") from error
        self.shape = options.input_shape

    @property
    def null(self) -> int | None:
        """The null label, or None where the model is unconditional."""
        return len(self.options.classes) or None

    def model_options(self) -> dict[str, JsonValue]:
        """Return classes, channels and size."""
        return {
            "classes": len(self.options.classes),
            "channels": self.options.input_shape[0],
            "size": self.options.input_shape[1],
        }

    def labels(self, count: int, generator: torch.Generator) -> Tensor | int:
        """Return random labels (count,), or the count for an unconditional model: what `trajectories` takes."""
        classes = len(self.options.classes)
        return torch.randint(classes, (count,), generator=generator) if classes else count

    def forward(self, model: nn.Module, batch: Batch) -> Denoised:
        """Add noise at random timesteps and predict it."""
        image = 2 * batch["image"] - 1
        generator = None if model.training else torch.Generator().manual_seed(len(image))
        t = torch.randint(self.schedule.steps, (len(image),), generator=generator)
        noise = torch.randn(image.shape, generator=generator).to(image)
        labels = batch.get("label") if self.null else None
        if labels is not None and model.training:
            labels = labels.masked_fill((torch.rand(len(labels)) < LABEL_DROP).to(labels.device), self.null)
        x = self.schedule.add_noise(image, noise, t)
        return Denoised(predict_noise(model, x, t.to(image.device), labels), noise)

    def loss(self, output: Denoised, batch: Batch) -> Tensor:
        """Return the mean squared error of the noise."""
        return F.mse_loss(output.predicted, output.noise)

    def meter(self) -> NoiseMeter:
        """Return a fresh meter."""
        return NoiseMeter()

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded noise, the last timestep and, for a conditional model, label 0."""
        x = torch.randn(samples, *self.shape, generator=torch.Generator().manual_seed(0))
        t = torch.full((samples,), self.schedule.steps - 1)
        return (x, t, torch.zeros(samples, dtype=torch.long)) if self.null else (x, t)

    def read_input(self, path: Path) -> Batch:
        """Return one image, resized to the model's input shape."""
        from eff.data.images import read_image

        image = read_image(path, self.shape)[None]
        return {"image": image, "label": torch.tensor([self.null])} if self.null else {"image": image}

    def show(self, output: Denoised, source: Path, out: Path | None) -> Prediction:
        """Return how well the noise in the image is found."""
        return Prediction(input=str(source), rows=[{"noise_mse": float(self.loss(output, {}))}])

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Compare shapes and run one sample through."""
        split = data.test if data.test is not None else data.split("train")
        sample = split.batch([0])
        found = tuple(sample["image"].shape[1:])
        if found != self.shape:
            raise DataError(
                f"data '{data.spec}' has images of shape {found}, the model expects {self.shape} (channels, height, width)"
            )
        if self.null and "label" not in sample:
            raise DataError(f"data '{data.spec}' has no labels, the model is conditional; use labelled data")
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with eval_mode(model), torch.no_grad():
            self.forward(model, {key: value.to(device) for key, value in sample.items()})
