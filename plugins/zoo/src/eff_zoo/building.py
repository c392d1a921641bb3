"""From a name and options to a module: what the zoo has, and how options get their values."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from eff.errors import ModelError, RequestError, did_you_mean, raise_problems
from eff.seeding import derive_seed

if TYPE_CHECKING:
    from eff.run import Run
    from eff.schemas import ModelSpec


class Entry(NamedTuple):
    """Where a model is: its module, the function that makes it, and the class of its options."""

    module: str
    factory: str
    options: str
    reads: str = "images"


MODELS = {
    "digits_cnn": Entry("eff_zoo.digits_cnn", "DigitsCNN", "DigitsCNNOptions"),
    "cifar_resnet20": Entry("eff_zoo.cifar_resnet", "cifar_resnet20", "CifarResNetOptions"),
    "cifar_resnet32": Entry("eff_zoo.cifar_resnet", "cifar_resnet32", "CifarResNetOptions"),
    "cifar_resnet44": Entry("eff_zoo.cifar_resnet", "cifar_resnet44", "CifarResNetOptions"),
    "cifar_resnet56": Entry("eff_zoo.cifar_resnet", "cifar_resnet56", "CifarResNetOptions"),
    "vit_micro": Entry("eff_zoo.vit", "VisionTransformer", "ViTMicroOptions"),
    "vit_tiny": Entry("eff_zoo.vit", "VisionTransformer", "ViTTinyOptions"),
    "mobilenet_v2": Entry("eff_zoo.mobilenet_v2", "MobileNetV2", "MobileNetV2Options"),
    "efficientnet_lite0": Entry("eff_zoo.efficientnet_lite", "efficientnet_lite0", "EfficientNetLiteOptions"),
    "minilm_classifier": Entry("eff_zoo.text_classifier", "text_classifier", "MiniLMOptions", "texts"),
    "text_tiny": Entry("eff_zoo.text_classifier", "text_classifier", "TextTinyOptions", "texts"),
    "llama_tiny": Entry("eff_zoo.causal_lm", "llama_tiny", "LlamaTinyOptions", "running text"),
    "gpt2_tiny": Entry("eff_zoo.causal_lm", "gpt2_tiny", "GPT2TinyOptions", "running text"),
}


def build(spec: ModelSpec, run: Run) -> nn.Module:
    """Return the model of a spec; initial weights are a function of the run's seed and the source.

    Options that the spec leaves out and the task knows (num_classes, in_channels, image_size) come
    from the task.
    """
    reads = MODELS[spec.name].reads if spec.name in MODELS else ""
    if run.task.name == "classification" and reads == "texts":
        raise ModelError(f"{spec.source} classifies texts, the data are images; use texts, e.g. --data csv:PATH")
    if reads and (reads == "running text") != (run.task.name == "language_modeling") and run.task.name != "none":
        way = {"running text": "corpus", "texts": "csv:PATH"}.get(reads, "digits")
        raise ModelError(f"{spec.source} reads {reads}, the data are for {run.task.name}; use e.g. --data {way}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        return _make(spec.name, dict(spec.options), _task_options(run))


def make_model(name: str, **options: Any) -> nn.Module:
    """Return a model by name, e.g. `make_model("cifar_resnet20", num_classes=10)`.

    Raises:
        ModelError: unknown name or option, or a value out of range. Problems: several of them.
        MissingDependencyError: pretrained weights whose package is not installed.
    """
    return _make(name, options, {})


def _task_options(run: Run) -> dict[str, Any]:
    known: dict[str, Any] = dict(run.task.model_options())
    shape = run.task.spec.options.get("input_shape")
    if isinstance(shape, (list, tuple)):
        known["image_size"] = max(shape[1:])  # type: ignore[type-var]
    return known


def _make(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> nn.Module:
    if name not in MODELS:
        raise ModelError(
            f"zoo:{name}: there is no such model{did_you_mean(name, MODELS)}; the zoo has {', '.join(MODELS)}"
        )
    entry = MODELS[name]
    module = importlib.import_module(entry.module)
    kind: type[BaseModel] = getattr(module, entry.options)
    known = {key: value for key, value in defaults.items() if key in kind.model_fields}
    try:
        options = kind.model_validate(known | given)
    except ValidationError as error:
        raise_problems([_fault(name, kind, item) for item in error.errors()])
        raise  # not reached: there is at least one error
    made: nn.Module = getattr(module, entry.factory)(options)
    return made


def _fault(name: str, kind: type[BaseModel], item: Any) -> RequestError:
    if not item["loc"]:
        return ModelError(f"zoo:{name}: {item['msg'].removeprefix('Value error, ')}")
    option = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        fields = list(kind.model_fields)
        return ModelError(
            f"zoo:{name}: option '{option}' is unknown{did_you_mean(option, fields)}; options are {', '.join(fields)}"
        )
    message = item["msg"][0].lower() + item["msg"][1:]
    return ModelError(f"zoo:{name}: {option}: {message}, got {item['input']!r}")
