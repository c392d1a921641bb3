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
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.folding import fold_batch_norms, fold_pairs
from eff_quant_kit.neighbours import activations_after


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
        cache = calibration.record(model, "d")
        assert len(calibration) == len(cache.inputs) == len(cache.outputs) == 50
        rows = torch.tensor([49, 3, 20])
        assert torch.equal(model.d(cache.inputs.read(rows)), cache.outputs.read(rows))
        again = calibration.record(model, "d", outputs=False)
        assert torch.equal(again.inputs.read(slice(0, 50)), cache.inputs.read(slice(0, 50)))
        taken = cache.inputs.read(slice(0, 4))
        taken.zero_()
        assert bool(cache.inputs.read(slice(0, 4)).any())  # a copy


def test_calls_of_a_shared_layer_are_recorded_jointly(run):
    with CalibrationSet(run, 40, 16) as calibration:
        cache = calibration.record(trained_looking(Branches()), "shared")
        assert len(cache.inputs) == 80


def test_a_layer_that_is_never_reached_is_named(run):
    model = Branches()
    model.unused = nn.Linear(2, 2)
    with (
        CalibrationSet(run, 40, 16) as calibration,
        pytest.raises(UnsupportedModelError, match="unused: .*never reaches"),
    ):
        calibration.record(model, "unused")


def test_nan_before_a_layer_is_named(run):
    model = trained_looking(Branches())
    model.a.weight.data.fill_(float("nan"))
    with CalibrationSet(run, 40, 16) as calibration, pytest.raises(RunError, match="c: its input holds NaN"):
        calibration.record(model, "c")


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
