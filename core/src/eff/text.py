"""Text classification: what a batch of texts is, its loss, its metrics, its predictions."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.data.text import encode, read_text
from eff.errors import DataError, UnsupportedModelError
from eff.schemas import Schema
from eff.tasks import ClassificationMeter, Prediction, Task, check_class_count
from eff.tokenizing import DEFAULT, Tokenizer, load_tokenizer, pinned

INPUTS = ("input_ids", "attention_mask")


class TextClassificationOptions(Schema):
    """What a text classifier's file remembers."""

    classes: tuple[str, ...] = Field(min_length=1, description="Class names in the order of the outputs.")
    tokenizer: str = Field(DEFAULT, description="See eff.tokenizing; the mark behind @ pins its content.")
    max_length: int = Field(128, ge=1, description="Tokens of a text, special ones included; the rest is cut.")


class TextClassification(Task[TextClassificationOptions]):
    """Texts to classes. Batches: input_ids and attention_mask (N, L) int64, label (N,) int64.

    L is the longest text of the batch; attention_mask is 0 behind the end of a text.
    """

    name = "text_classification"
    options_type = TextClassificationOptions
    headline = "accuracy"
    hub_class = "AutoModelForSequenceClassification"
    input_names = INPUTS

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the options name."""
        return load_tokenizer(self.options.tokenizer)

    def model_options(self) -> dict[str, JsonValue]:
        """Return num_classes."""
        return {"num_classes": len(self.options.classes)}

    def hub_options(self) -> dict[str, JsonValue]:
        """Return num_labels; a head of another size is made anew."""
        return {"num_labels": len(self.options.classes), "ignore_mismatched_sizes": True}

    def options_of_hub_model(self, name: str, model: nn.Module) -> dict[str, JsonValue]:
        """Return the model's own tokenizer, and its class names where it has real ones."""
        found: dict[str, JsonValue] = {"tokenizer": pinned(f"hf:{name}")}
        names: dict[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
        if names and not any(str(value).startswith("LABEL_") for value in names.values()):
            found["classes"] = [str(names[index]) for index in sorted(names)]
        return found

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (N, classes)."""
        output = model(**{name: batch[name] for name in INPUTS})
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy."""
        return F.cross_entropy(output, batch["label"])

    def meter(self) -> ClassificationMeter:
        """Return a fresh meter."""
        return ClassificationMeter(len(self.options.classes))

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded random ids (samples, max_length) and a mask of ones."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.tokenizer.size, (samples, self.options.max_length), generator=generator)
        return ids, torch.ones_like(ids)

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Return ids and mask, filled up to max_length as an exported file expects them."""
        missing = self.options.max_length - batch["input_ids"].shape[1]
        ids = F.pad(batch["input_ids"], (0, missing), value=self.tokenizer.pad)
        return ids, F.pad(batch["attention_mask"], (0, missing))

    def read_input(self, path: Path) -> Batch:
        """Return the text of a file."""
        return encode([read_text(path)], self.options.tokenizer, self.options.max_length)

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
        """Run an input of full length through; compare tokenizers, classes and outputs."""
        takes = list(inspect.signature(model.forward).parameters)
        if takes[:2] != list(INPUTS):
            raise UnsupportedModelError(
                f"{type(model).__name__} takes ({', '.join(takes[:3])}); a text classifier takes "
                "(input_ids, attention_mask) first, as encoders such as BERT do"
            )
        check_text(data, self.name, self.options.tokenizer)
        check_class_count(data, len(self.options.classes))
        output = self._try(model)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not return logits of shape (N, classes); it is no classifier"
            )
        if output.shape[1] != len(self.options.classes):
            raise DataError(
                f"the model has {output.shape[1]} outputs, the task {len(self.options.classes)} classes; "
                "use data with as many classes as the model has outputs"
            )

    def _try(self, model: nn.Module) -> object:
        try:
            return self.tried(model, dict(zip(INPUTS, self.example_inputs(1), strict=True)))
        except (IndexError, RuntimeError) as error:  # what an embedding raises beyond its table
            raise DataError(
                f"{type(model).__name__} fails on {self.options.max_length} tokens of '{self.options.tokenizer}' "
                f"({str(error).splitlines()[0]}); use a smaller ?max_length= or the model's own tokenizer"
            ) from error


def check_text(data: Data, task: str, tokenizer: str) -> None:
    """Raise DataError where `data` are for another task than a model, or in other tokens than it reads."""
    if data.task.name != task:
        raise DataError(f"data '{data.spec}' is for {data.task.name}, the model for {task}")
    if data.task.options.get("tokenizer") != tokenizer:
        raise DataError(
            f"data '{data.spec}' is tokenized by {data.task.options.get('tokenizer')}, "
            f"the model reads {tokenizer}; leave ?tokenizer= out"
        )
