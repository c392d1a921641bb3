"""Tasks: what a batch is, the loss, the metrics, and how a prediction is shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from pydantic import Field, JsonValue, ValidationError, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.errors import DataError, RequestError, UnsupportedModelError
from eff.modes import eval_mode
from eff.schemas import Metric, Metrics, Schema, TaskSpec

OptionsT = TypeVar("OptionsT", bound=Schema)


class Meter(Protocol):
    """Accumulates a task's metrics over batches."""

    def update(self, output: Any, batch: Batch) -> None:
        """Take in one batch."""
        ...

    def compute(self) -> Metrics:
        """Return the metrics of all batches so far."""
        ...


class Prediction(Schema):
    """What a model says of one input, for `eff predict`."""

    input: str
    rows: list[dict[str, JsonValue]] = []
    file: Path | None = None


class Task(ABC, Generic[OptionsT]):
    """One kind of problem. `options` holds what a model file must remember of it."""

    name: ClassVar[str]
    options_type: ClassVar[type[Schema]]
    headline: ClassVar[str]
    """The metric to plot and to compare models by."""
    hub_class: ClassVar[str] = ""
    """The transformers class that opens `hf:NAME` for this task, e.g. "AutoModelForImageClassification"."""
    input_names: ClassVar[tuple[str, ...]] = ("input",)
    """What an exported file calls the inputs of the bare module."""

    def __init__(self, options: OptionsT):
        self.options = options

    @property
    def spec(self) -> TaskSpec:
        """The task as a schema, for headers."""
        return TaskSpec(name=self.name, options=self.options.model_dump(mode="json"))

    @classmethod
    def from_spec(cls, spec: TaskSpec) -> Task[OptionsT]:
        """Return the task with checked options.

        Raises:
            RequestError: an option is missing or wrong.
        """
        try:
            return cls(cls.options_type.model_validate(spec.options))  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RequestError(f"task '{cls.name}': {where}: {first['msg']}") from error

    @abstractmethod
    def model_options(self) -> dict[str, JsonValue]:
        """Return what an architecture needs to know, e.g. num_classes and in_channels."""

    def hub_options(self) -> dict[str, JsonValue]:
        """Return what transformers' `from_pretrained` must know of the task, e.g. num_labels."""
        return {}

    def options_of_hub_model(self, name: str, model: nn.Module) -> dict[str, JsonValue]:
        """Return what a model from `hf:NAME` says of the task, e.g. its tokenizer."""
        return {}

    @abstractmethod
    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output; feeds the model what it expects (e.g. normalises)."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the training loss, 0-dim."""

    @abstractmethod
    def meter(self) -> Meter:
        """Return an empty accumulator of the task's metrics."""

    @abstractmethod
    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return positional inputs of the bare module, for export and timing."""

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """Return the output for `eff predict`; a task may cut what is too large into tiles."""
        with torch.inference_mode():
            return self.forward(model, batch)

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Return `batch` as positional inputs of the bare module, for comparing exports; None: cannot."""
        return None

    @abstractmethod
    def read_input(self, path: Path) -> Batch:
        """Return a batch of one sample from a file.

        Raises:
            DataError: the file cannot be read as this task's input.
        """

    @abstractmethod
    def show(self, output: Any, source: Path, out: Path | None) -> Prediction:
        """Return the prediction for one sample in a form to print; may write `out`."""

    @abstractmethod
    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Raise when data and model do not fit this task or each other.

        Raises:
            DataError: wrong shape, or labels that the model has no output for.
            UnsupportedModelError: the model's output is not what the task needs.
        """

    def tried(self, model: nn.Module, batch: Batch) -> Any:
        """Return the output for a batch in eval mode, without gradients; the model's mode comes back. For `check_fit`."""
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with eval_mode(model), torch.no_grad():
            return self.forward(
                model,
                {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()},
            )


def first_sample(data: Data) -> Batch:
    """Return a batch of one sample, of the test split where there is one."""
    return (data.test if data.test is not None else data.split("train")).batch([0])


def check_image_shape(data: Data, batch: Batch, expected: tuple[int, ...]) -> None:
    """Raise DataError unless the images of a batch of `data` have the shape (C, H, W) that a model expects."""
    found = tuple(batch["image"].shape[1:])
    if found != expected:
        raise DataError(
            f"data '{data.spec}' has images of shape {found}, the model expects {expected} "
            "(channels, height, width); use data of that shape or add ?size= to the data"
        )


def check_class_count(data: Data, known: int) -> None:
    """Raise DataError where `data` has more classes than a model, which knows `known`."""
    classes = data.task.options.get("classes")
    if isinstance(classes, (list, tuple)) and len(classes) > known:
        raise DataError(
            f"data '{data.spec}' has {len(classes)} classes, the model {known}; "
            "use the data the model was made for, or train a model with that many outputs"
        )


class ClassificationOptions(Schema):
    """What a classifier's file remembers."""

    input_shape: tuple[int, int, int] = Field(description="Channels, height, width.")
    classes: tuple[str, ...] = Field(min_length=1, description="Class names in the order of the outputs.")
    mean: tuple[float, ...] = Field((), description="Per channel, of images in [0, 1]; empty: no normalisation.")
    std: tuple[float, ...] = Field((), description="Per channel.")

    @model_validator(mode="after")
    def _statistics_fit(self) -> ClassificationOptions:
        channels = self.input_shape[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values for {channels} channels")
        if len(self.mean) != len(self.std):
            raise ValueError("mean and std go together")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be above 0")
        return self


class ClassificationMeter:
    """Top-1 (and, from 6 classes on, top-5) accuracy in % and mean cross entropy in nats."""

    def __init__(self, classes: int):
        self.top5 = classes > 5
        self.samples = 0
        self.correct = 0
        self.correct5 = 0
        self.loss = 0.0

    def update(self, output: Tensor, batch: Batch) -> None:
        """Take in logits (N, classes) and labels (N,)."""
        label = batch["label"]
        self.samples += len(label)
        self.correct += int((output.argmax(1) == label).sum())
        if self.top5:
            self.correct5 += int((output.topk(5, dim=1).indices == label[:, None]).any(1).sum())
        self.loss += float(F.cross_entropy(output.float(), label, reduction="sum"))

    def compute(self) -> Metrics:
        """Return the metrics over all samples.

        Raises:
            DataError: there were none.
        """
        if not self.samples:
            raise DataError("no samples to measure on; the test split is empty")
        share = 100.0 / self.samples
        values = {"accuracy": Metric(value=self.correct * share, unit="%", better="higher")}
        if self.top5:
            values["top5_accuracy"] = Metric(value=self.correct5 * share, unit="%", better="higher")
        values["cross_entropy"] = Metric(value=self.loss / self.samples, unit="nats", better="lower")
        return Metrics(values=values)


class Classification(Task[ClassificationOptions]):
    """Images to classes. Batches: image (N, C, H, W) float32 in [0, 1], label (N,) int64."""

    name = "classification"
    options_type = ClassificationOptions
    headline = "accuracy"
    hub_class = "AutoModelForImageClassification"

    def __init__(self, options: ClassificationOptions):
        super().__init__(options)
        shape = (1, -1, 1, 1)
        self._mean = torch.tensor(options.mean).view(shape) if options.mean else None
        self._std = torch.tensor(options.std).view(shape) if options.std else None

    def model_options(self) -> dict[str, JsonValue]:
        """Return num_classes and in_channels."""
        return {"num_classes": len(self.options.classes), "in_channels": self.options.input_shape[0]}

    def normalize(self, image: Tensor) -> Tensor:
        """Return images in [0, 1] as the model expects them: (image - mean) / std."""
        if self._mean is None or self._std is None:
            return image
        return (image - self._mean.to(image)) / self._std.to(image)

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return the normalised images."""
        return (self.normalize(batch["image"]),)

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (N, classes)."""
        output = model(self.normalize(batch["image"]))
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy."""
        return F.cross_entropy(output, batch["label"])

    def meter(self) -> ClassificationMeter:
        """Return a fresh meter."""
        return ClassificationMeter(len(self.options.classes))

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded standard-normal images (samples, C, H, W), as normalised images are."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(samples, *self.options.input_shape, generator=generator),)

    def read_input(self, path: Path) -> Batch:
        """Return one image, resized to the model's input shape."""
        from eff.data.images import read_image

        return {"image": read_image(path, self.options.input_shape)[None]}

    def show(self, output: Tensor, source: Path, out: Path | None) -> Prediction:
        """Return the five likeliest classes with their probabilities in %."""
        probability = output[0].float().softmax(0)
        top = probability.topk(min(5, len(probability)))
        rows: list[dict[str, JsonValue]] = [
            {"class": self.options.classes[index], "index": index, "probability": 100.0 * value}
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        return Prediction(input=str(source), rows=rows)

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Run one sample through; compare shape, labels and number of outputs."""
        sample = first_sample(data)
        check_image_shape(data, sample, self.options.input_shape)
        check_class_count(data, len(self.options.classes))
        output = self.tried(model, {"image": sample["image"]})
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not return logits of shape (N, classes); it is no classifier"
            )
        if output.shape[1] != len(self.options.classes):
            raise DataError(
                f"the model has {output.shape[1]} outputs, the task {len(self.options.classes)} classes; "
                "use data with as many classes as the model has outputs"
            )


class NoOptions(Schema):
    """Nothing to remember."""


class NoTask(Task[NoOptions]):
    """A model of which nothing but its weights is known; methods that need no data work on it."""

    name = "none"
    options_type = NoOptions
    headline = ""

    def model_options(self) -> dict[str, JsonValue]:
        """Return nothing; the architecture keeps its own defaults."""
        return {}

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Refuse: what the model takes is not known."""
        raise self._unknown("run")

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Refuse: what the model is for is not known."""
        raise self._unknown("train")

    def meter(self) -> Meter:
        """Refuse: what the model is for is not known."""
        raise self._unknown("measure")

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Refuse: what the model takes is not known."""
        raise self._unknown("run")

    def read_input(self, path: Path) -> Batch:
        """Refuse: what the model takes is not known."""
        raise self._unknown("run")

    def show(self, output: Any, source: Path, out: Path | None) -> Prediction:
        """Refuse: what the model is for is not known."""
        raise self._unknown("show")

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Accept; there is no data without a task."""

    def _unknown(self, verb: str) -> RequestError:
        return RequestError(f"cannot {verb} a model that names no task; add --data, e.g. --data digits")


BUILT_IN: dict[str, str | type[Task[Any]]] = {
    Classification.name: Classification,
    NoTask.name: NoTask,
    "text_classification": "eff.text:TextClassification",
    "language_modeling": "eff.language:LanguageModeling",
}
