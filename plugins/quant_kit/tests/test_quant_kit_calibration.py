"""Folding of batch norms and recordings of layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eff.data import load_data
from eff.errors import RunError, UnsupportedModelError
from eff.models import make_task
from eff.run import Run
from eff.session import Plugins
from eff_quant_kit.calibration import CalibrationSet, over_padding
from eff_quant_kit.folding import fold_batch_norms, fold_pairs
from eff_quant_kit.layers import left_in_float
from eff_quant_kit.neighbours import activations_after
from eff_quant_kit.reconstruction import RowUnit
from eff_quant_kit.walk import Walk


class Branches(nn.Module):
    """A concat, a layer used by two, a shared layer, a norm behind a relu, and a functional call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shared, self.norm_shared = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.norm_alone = nn.BatchNorm2d(8)
        self.d, self.norm_d = nn.Conv2d(8, 4, 3, groups=4), nn.BatchNorm2d(4, affine=False)
        self.head, self.norm_head = nn.Linear(4, 10), nn.BatchNorm1d(10)

    def forward(self, x):
        x = torch.cat([self.norm_a(self.a(x)), self.norm_b(self.b(x))], 1).relu()
        raw = self.c(x)
        x = self.norm_c(raw) + raw  # the output of c has a second reader
        x = self.norm_shared(self.shared(self.shared(x)))
        x = self.norm_alone(x.relu())
        return self.norm_head(self.head(self.norm_d(self.d(x)).mean((2, 3))))


@pytest.fixture
def run() -> Run:
    data = load_data("digits?seed=0")
    return Run(make_task(data.task, Plugins((), extensions=())), torch.device("cpu"), 0, data)


def trained_looking(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            if module.weight is not None:
                nn.init.normal_(module.weight, 1.0, 0.3, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def test_folding_keeps_the_outputs_and_says_what_it_left():
    torch.manual_seed(0)
    model = trained_looking(Branches())
    x = torch.rand(5, 1, 8, 8)
    expected = model(x)
    folding = fold_batch_norms(model, lambda: model(x))
    assert [item.layer for item in folding.folded] == ["a", "b", "d", "head"]
    assert set(folding.left) == {"norm_c", "norm_shared", "norm_alone"}
    assert "used elsewhere" in folding.left["norm_c"]
    assert "2 times" in folding.left["norm_shared"]
    assert "not the output of a layer" in folding.left["norm_alone"]
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-4)  # float32 sums in another order
    assert isinstance(model.norm_a, nn.Identity) and isinstance(model.norm_c, nn.BatchNorm2d)


def test_a_rebuilt_structure_takes_the_folded_weights():
    torch.manual_seed(0)
    model = trained_looking(Branches())
    fresh = copy.deepcopy(model)
    x = torch.rand(5, 1, 8, 8)
    pairs = fold_batch_norms(model, lambda: model(x)).pairs
    fold_pairs(fresh, pairs).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_recorded_rows_are_the_layers_inputs_and_outputs_in_order(run):
    torch.manual_seed(0)
    model = trained_looking(Branches())
    with CalibrationSet(run, 50, 16) as calibration:
        cache = Walk(calibration, model).record("d")
        assert len(calibration) == len(cache.inputs) == len(cache.outputs) == 50
        rows = torch.tensor([49, 3, 20])
        assert torch.equal(model.d(cache.inputs.read(rows)), cache.outputs.read(rows))
        again = Walk(calibration, model).record("d", outputs=False)
        assert torch.equal(again.inputs.read(slice(0, 50)), cache.inputs.read(slice(0, 50)))
        taken = cache.inputs.read(slice(0, 4))
        taken.zero_()
        assert bool(cache.inputs.read(slice(0, 4)).any())  # a copy


def test_calls_of_a_shared_layer_are_recorded_jointly(run):
    with CalibrationSet(run, 40, 16) as calibration:
        cache = Walk(calibration, trained_looking(Branches())).record("shared")
        assert len(cache.inputs) == 80


def test_a_layer_that_is_never_reached_is_named(run):
    model = Branches()
    model.unused = nn.Linear(2, 2)
    with (
        CalibrationSet(run, 40, 16) as calibration,
        pytest.raises(UnsupportedModelError, match="unused: .*never reaches"),
    ):
        Walk(calibration, model).record("unused")


def test_nan_before_a_layer_is_named(run):
    model = trained_looking(Branches())
    model.a.weight.data.fill_(float("nan"))
    with CalibrationSet(run, 40, 16) as calibration, pytest.raises(RunError, match="c: its input holds NaN"):
        Walk(calibration, model).record("c")


class Tokens(nn.Module):
    """Mean over the tokens of a linear layer's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(99, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids, mask):
        x = self.mix(self.embedding(ids))
        mask = mask[..., None].to(x)
        return self.head((x * mask).sum(1) / mask.sum(1))


class TextRun:
    """Hands out batches whose tokens have the length of their longest text."""

    device = torch.device("cpu")

    def __init__(self):
        self.made = []
        for lengths in ((1, 3), (2, 7), (2, 4)):
            ids = torch.zeros(2, max(lengths), dtype=torch.long)
            for row, length in enumerate(lengths):
                ids[row, :length] = 10 * length + torch.arange(length)
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            self.made.append({"input_ids": ids, "attention_mask": mask, "label": torch.tensor(lengths)})

    def batches(self, split, samples, size):
        return iter(self.made)

    def forward(self, model, batch):
        return model(batch["input_ids"], batch["attention_mask"])

    def warn(self, message):
        pass


def test_tokens_of_different_lengths_are_masked_to_one_and_models_do_not_see_it():
    run, model = TextRun(), Tokens()
    with CalibrationSet(run, 6, 2) as calibration:
        batches = list(calibration)
        assert [batch["input_ids"].shape for batch in batches] == [(2, 7)] * 3
        assert torch.equal(
            torch.cat([batch["attention_mask"] for batch in batches]).sum(1), torch.tensor([1, 3, 2, 7, 2, 4])
        )
        for batch, made in zip(batches, run.made, strict=True):
            assert torch.equal(batch["input_ids"][:, : made["input_ids"].shape[1]], made["input_ids"])
            assert torch.equal(batch["label"], made["label"])
            assert torch.allclose(run.forward(model, batch), run.forward(model, made), atol=1e-6)


def test_errors_of_linear_layers_leave_padding_out():
    run, model = TextRun(), Tokens()

    class Whole(RowUnit):
        def error(self, x, y):
            return (x - y).square().mean()

        def loss(self, iteration):
            raise NotImplementedError

        def close(self):
            raise NotImplementedError

    with CalibrationSet(run, 6, 2) as calibration:
        rows = Walk(calibration, model).record("mix")
        mask = calibration.mask_of(model.mix, rows.inputs)
        unit = Whole(rows.inputs, rows.outputs, 2, torch.device("cpu"), mask)
        x, y = unit.read(slice(0, 6))
        assert x.shape == y.shape == (1 + 3 + 2 + 7 + 2 + 4, 4)  # the tokens of six texts
        tokens = torch.cat([model.embedding(made["input_ids"][made["attention_mask"].bool()]) for made in run.made])
        assert torch.equal(x, tokens)
        assert unit.held_out_error() == pytest.approx((tokens - model.mix(tokens)).square().mean().item(), rel=1e-5)
        pooled = Walk(calibration, model).record("head", outputs=False).inputs
        assert calibration.mask_of(model.head, pooled) is None  # one row per text, no tokens


def test_extremes_do_not_see_padding():
    x = torch.tensor([[[1.0], [2.0], [90.0]], [[3.0], [4.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert over_padding(x, {"attention_mask": mask}).amax() == 5
    assert over_padding(x, {"label": mask}) is x and over_padding(x[..., 0], {"attention_mask": mask}).amax() == 90


def test_large_weights_that_stay_in_float_are_named_largest_first():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(50, 8)
            self.attention = nn.MultiheadAttention(8, 2)
            self.up = nn.ConvTranspose2d(8, 1, 2)
            self.fine = nn.Linear(8, 2)
            self.position = nn.Parameter(torch.zeros(1, 4, 8))
            self.mark = nn.Parameter(torch.zeros(1, 1, 4))

    found = left_in_float(Mixed())
    assert list(found) == [
        "words.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "position",
        "up.weight",
    ]
    assert found["words.weight"].startswith("Embedding, ") and found["attention.in_proj_weight"].startswith("Multihead")
    assert not left_in_float(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def test_few_samples_draw_a_warning(run):
    with CalibrationSet(run, 8, 4, plugin="quant_x"):
        assert any("8 samples" in warning for warning in run.log.warnings)


def test_activations_are_found_as_modules_and_as_functions():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))
            self.module, self.six = nn.ReLU(inplace=True), nn.ReLU6()

        def forward(self, x):
            x = self.module(self.layers[0](x))
            x = torch.relu(self.layers[1](x))
            x = self.six(self.layers[2](x))
            x = self.layers[3](x).clamp(min=0)
            x = nn.functional.relu6(self.layers[4](x))
            x = nn.functional.gelu(self.layers[5](x))
            return self.layers[6](x)

    model = Net()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = activations_after(layers, lambda: model(torch.rand(2, 4)))
    assert found == {
        "layers.0": "relu",
        "layers.1": "relu",
        "layers.2": "relu6",
        "layers.3": "relu",
        "layers.4": "relu6",
    }
