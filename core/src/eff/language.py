"""Language modelling: predicting each token of a text from those before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch, Data
from eff.data.text import encode, read_text
from eff.errors import DataError, UnsupportedModelError
from eff.files import atomic_path
from eff.schemas import Metric, Metrics, Schema
from eff.tasks import Prediction, Task, first_sample
from eff.text import check_text
from eff.tokenizing import BYTES, Tokenizer, load_tokenizer, pinned

INPUTS = ("input_ids", "attention_mask")
CONTINUATION = 64
"""Tokens that `eff predict` writes, at most half the length."""


class LanguageModelingOptions(Schema):
    """What a language model's file remembers."""

    tokenizer: str = Field(BYTES, description="See eff.tokenizing; the mark behind @ pins its content.")
    length: int = Field(256, ge=2, description="Tokens of a sample.")


class LanguageModelingMeter:
    """Cross entropy in nats per token, perplexity, and the share of tokens predicted right, in %."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss = 0.0
        self.correct = 0

    def update(self, output: Tensor, batch: Batch) -> None:
        """Take in logits (N, L, vocabulary) and the ids that they predict."""
        logits, target = _shifted(output, batch)
        self.tokens += len(target)
        self.loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
        self.correct += int((logits.argmax(-1) == target).sum())

    def compute(self) -> Metrics:
        """Return the metrics over all tokens.

        Raises:
            DataError: there were none.
        """
        if not self.tokens:
            raise DataError("no tokens to measure on; the test split is empty")
        mean = self.loss / self.tokens
        return Metrics(
            values={
                "perplexity": Metric(value=math.exp(min(mean, 700.0)), unit="", better="lower"),
                "cross_entropy": Metric(value=mean, unit="nats", better="lower"),
                "accuracy": Metric(value=100.0 * self.correct / self.tokens, unit="%", better="higher"),
            }
        )


def _shifted(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return logits (n, vocabulary) and the token that follows each, without those of padding."""
    counted = batch["attention_mask"][:, 1:].bool() & batch["attention_mask"][:, :-1].bool()
    return output[:, :-1][counted], batch["input_ids"][:, 1:][counted]


class LanguageModeling(Task[LanguageModelingOptions]):
    """Texts to their next tokens. Batches: input_ids and attention_mask (N, L) int64; the mask is 0 at padding."""

    name = "language_modeling"
    options_type = LanguageModelingOptions
    headline = "perplexity"
    hub_class = "AutoModelForCausalLM"
    input_names = INPUTS[:1]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the options name."""
        return load_tokenizer(self.options.tokenizer)

    def model_options(self) -> dict[str, JsonValue]:
        """Return the vocabulary."""
        return {"vocabulary": self.tokenizer.size}

    def options_of_hub_model(self, name: str, model: nn.Module) -> dict[str, JsonValue]:
        """Return the model's own tokenizer."""
        return {"tokenizer": pinned(f"hf:{name}")}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return logits (N, L, vocabulary)."""
        output = model(**{name: batch[name] for name in INPUTS})
        logits: Tensor = output.logits if hasattr(output, "logits") else output
        return logits

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy of the next tokens."""
        return F.cross_entropy(*_shifted(output, batch))

    def meter(self) -> LanguageModelingMeter:
        """Return a fresh meter."""
        return LanguageModelingMeter()

    def example_inputs(self, samples: int) -> tuple[Tensor, ...]:
        """Return seeded random ids (samples, length); what stands second differs between architectures."""
        generator = torch.Generator().manual_seed(0)
        return (torch.randint(self.tokenizer.size, (samples, self.options.length), generator=generator),)

    def module_inputs(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Return the ids; None where there is padding, which ids alone do not say."""
        return (batch["input_ids"],) if bool(batch["attention_mask"].all()) else None

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the likeliest continuation, (N, tokens): with the model's own `generate` where it has one."""
        ids: Tensor = batch["input_ids"]
        mask: Tensor = batch["attention_mask"]
        steps = self._continuation
        if hasattr(model, "generate"):
            generate: Any = model.generate
            out: Tensor = generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False,
                pad_token_id=self.tokenizer.pad,
            )  # fmt: skip
            return out[:, ids.shape[1] :]
        start = ids.shape[1]
        with torch.inference_mode():
            for _ in range(steps):
                logits = self.forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        return ids[:, start:]

    @property
    def _continuation(self) -> int:
        return min(CONTINUATION, self.options.length // 2)

    def read_input(self, path: Path) -> Batch:
        """Return the end of a file's text, short enough for its continuation to fit the length."""
        batch = encode([read_text(path)], self.options.tokenizer, 2**62)
        longest = self.options.length - self._continuation
        return {name: batch[name][:, -longest:] for name in INPUTS}

    def show(self, output: Tensor, source: Path, out: Path | None) -> Prediction:
        """Return the continuation as text; `out` gets it as a file."""
        text = self.tokenizer.decode(output[0].tolist())
        if out is not None:
            with atomic_path(out) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return Prediction(input=str(source), rows=[{"continuation": text}], file=out)

    def check_fit(self, model: nn.Module, data: Data) -> None:
        """Run a sample through; compare tokenizers and the number of outputs."""
        check_text(data, self.name, self.options.tokenizer)
        output = self._try(model, first_sample(data))
        size = self.tokenizer.size
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not return logits of shape (N, length, vocabulary); it is no language model"
            )
        if output.shape[-1] < size:
            raise DataError(
                f"the model has {output.shape[-1]} outputs, '{self.options.tokenizer}' has {size} tokens; "
                "use the model's own tokenizer, ?tokenizer="
            )

    def _try(self, model: nn.Module, batch: dict[str, Any]) -> object:
        try:
            return self.tried(model, batch)
        except TypeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not take {' and '.join(INPUTS)} ({error}); it is no language model"
            ) from error
        except (IndexError, RuntimeError) as error:  # what an embedding raises beyond its table
            raise DataError(
                f"{type(model).__name__} fails on {batch['input_ids'].shape[1]} tokens of '{self.options.tokenizer}' "
                f"({str(error).splitlines()[0]}); use a smaller ?length= or the model's own tokenizer"
            ) from error
