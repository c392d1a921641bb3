"""The task "detection": boxes and classes of objects, from a CenterNet head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn

from eff.data import Batch, Data
from eff.data.images import native_shape
from eff.errors import DataError, UnsupportedModelError
from eff.schemas import Metric, Metrics, Schema
from eff.tasks import Prediction, Task, check_class_count, check_image_shape, first_sample
from eff_quant_codenet.centernet import Detections, decode, detection_loss, make_targets
from eff_quant_codenet.precision import PrecisionMeter


class DetectionOptions(Schema):
    """What a detector's file remembers: also how its output is decoded."""

    input_shape: tuple[int, int, int] = Field(description="Channels, height, width.")
    classes: tuple[str, ...] = Field(min_length=1, description="Class names in the order of the heatmaps.")
    mean: tuple[float, ...] = Field((), description="Per channel, of images in [0, 1]; empty: no normalisation.")
    std: tuple[float, ...] = Field((), description="Per channel.")
    stride: int = Field(4, ge=1, description="Input pixels per output pixel.")
    top: int = Field(100, ge=1, description="Boxes per image that are measured.")
    threshold: float = Field(0.3, ge=0, le=1, description="Least score of a box that `eff predict` shows.")


class DetectionMeter:
    """AP50 and AP in %, and the loss."""

    def __init__(self, options: DetectionOptions):
        self.options = options
        self.precision = PrecisionMeter(len(options.classes))
        self.images, self.loss = 0, 0.0

    def update(self, output: Tensor, batch: Batch) -> None:
        """Take in an output (N, classes + 4, H, W) and the objects."""
        options = self.options
        found = decode(output, len(options.classes), options.stride, options.top)
        boxes, labels = batch["boxes"].double().cpu().numpy(), batch["label"].cpu().numpy()
        parts = (found.boxes.double().cpu().numpy(), found.scores.double().cpu().numpy(), found.labels.cpu().numpy())
        for index in range(len(boxes)):
            there = labels[index] >= 0
            mine = parts[0][index], parts[1][index], parts[2][index]
            self.precision.add(mine, boxes[index][there], labels[index][there])
        self.images += len(boxes)
        self.loss += len(boxes) * float(loss_of(output, batch, options))

    def compute(self) -> Metrics:
        """Return the metrics over all images, and AP by class.

        Raises:
            DataError: there were no images, or no objects in them.
        """
        if not self.images:
            raise DataError("no images to measure on; the test split is empty")
        by_class = self.precision.by_class()
        if not by_class:
            raise DataError("the test images have no objects; average precision is not defined")
        mean = np.mean(list(by_class.values()), axis=0) * 100
        values = {
            "AP50": Metric(value=float(mean[0]), unit="%", better="higher"),
            "AP": Metric(value=float(mean.mean()), unit="%", better="higher"),
            "detection_loss": Metric(value=self.loss / self.images, better="lower"),
        }
        rows: list[dict[str, JsonValue]] = [
            {
                "class": self.options.classes[label],
                "objects": self.precision.objects[label],
                "AP50": 100 * float(found[0]),
                "AP": 100 * float(found.mean()),
            }  # fmt: skip
            for label, found in by_class.items()
        ]
        return Metrics(values=values, tables={"classes": rows})


def loss_of(output: Tensor, batch: Batch, options: DetectionOptions) -> Tensor:
    """Return the CenterNet loss of a batch."""
    height, width = output.shape[-2:]
    targets = make_targets(batch["boxes"], batch["label"], len(options.classes), height, width, options.stride)
    return detection_loss(output, targets)


class Detection(Task[DetectionOptions]):
    """Images to boxes. Batches: image (N, C, H, W) in [0, 1]; boxes (N, M, 4) in pixels; label (N, M), -1 for no object."""

    name = "detection"
    options_type = DetectionOptions
    headline = "AP50"

    def model_options(self) -> dict[str, JsonValue]:
        """Return num_classes and in_channels."""
        return {"num_classes": len(self.options.classes), "in_channels": self.options.input_shape[0]}

    def normalize(self, image: Tensor) -> Tensor:
        """Return images in [0, 1] as the model expects them: (image - mean) / std."""
        if not self.options.mean:
            return image
        mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (self.options.mean, self.options.std))
        return (image - mean) / std

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the normalised images."""
        return (self.normalize(batch["image"]),)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return heatmap logits, sizes and centre offsets, (N, classes + 4, H / stride, W / stride)."""
        output: Tensor = model(self.normalize(batch["image"]))
        return output

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the CenterNet loss."""
        return loss_of(output, batch, self.options)

    def meter(self) -> DetectionMeter:
        """Return a fresh meter."""
        return DetectionMeter(self.options)

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded standard-normal images (samples, C, H, W), as normalised images are."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(samples, *self.options.input_shape, generator=generator),)

    def detections(self, output: Tensor) -> Detections:
        """Return the decoded output."""
        return decode(output, len(self.options.classes), self.options.stride, self.options.top)

    def read_input(self, path: Path) -> Batch:
        """Return one photo, fitted into the model's input with its sides' ratio kept."""
        from eff_quant_codenet.photos import read_fitted

        return {"image": read_fitted(path, self.options.input_shape)[0][None]}

    def show(self, output: Tensor, source: Path, out: Path | None) -> Prediction:
        """Return the boxes above the threshold in pixels of the photo; `out` gets the photo with them drawn in."""
        from eff_quant_codenet.drawing import draw_photo
        from eff_quant_codenet.photos import fitted_scale

        found = self.detections(output)
        height, width = native_shape(source, str(source))[1:]
        scale = fitted_scale((height, width), self.options.input_shape[1:])
        limit = found.boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum(found.boxes[0] / scale, limit)
        kept = int((found.scores[0] >= self.options.threshold).sum())
        rows: list[dict[str, JsonValue]] = [
            {
                "class": self.options.classes[int(label)],
                "score": float(score),
                **{side: float(value) for side, value in zip(("left", "top", "right", "bottom"), box, strict=True)},
            }  # fmt: skip
            for box, score, label in zip(boxes[:kept], found.scores[0], found.labels[0], strict=False)
        ]
        if out is not None:
            draw_photo(source, out, rows)
        if not rows:
            best = float(found.scores[0, 0])
            rows = [{"class": f"none above {self.options.threshold:g}", "score": best}]
        return Prediction(input=str(source), rows=rows, file=out)

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Run one sample through; compare shapes, classes and the size of the output."""
        options = self.options
        sample = first_sample(data)
        check_image_shape(data, sample, options.input_shape)
        check_class_count(data, len(options.classes))
        output = self.tried(model, {"image": sample["image"]})
        expected = (1, len(options.classes) + 4, *(-(-side // options.stride) for side in options.input_shape[1:]))
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"{type(model).__name__} gives {shape}, a detector of {len(options.classes)} classes and stride "
                f"{options.stride} gives {expected}: heatmaps, sizes and centre offsets"
            )
