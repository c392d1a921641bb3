"""Sensitivities against exact Hessians, single-sample gradients and hand-quantized layers."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from eff.cli.app import app
from eff.data import load_data
from eff.errors import RequestError
from eff.models import make_task
from eff.modes import gradients_for
from eff.run import Run
from eff.session import Plugins
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    hessian_traces,
    measure_sensitivity,
    parse_measures,
    read_sensitivity,
    rounded,
    task_losses,
    write_sensitivity,
)


@pytest.fixture
def run() -> Run:
    data = load_data("digits?seed=0")
    return Run(make_task(data.task, Plugins((), extensions=())), torch.device("cpu"), 0, data)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 10)).eval()


def test_traces_equal_those_of_the_exact_hessian(run):
    model = tiny()
    weights = {"2": model[2].weight, "4": model[4].weight}
    with CalibrationSet(run, 40, 16) as calibration, gradients_for(model, model.parameters()):
        found = hessian_traces(
            model, weights, task_losses(model, calibration, run), torch.Generator().manual_seed(0), 3000, 0.0
        )
        for name, weight in weights.items():

            def loss(value, name=name):
                swapped = {f"{name}.weight": value}
                total = 0.0
                for size, batch in zip(calibration.sizes, calibration, strict=True):
                    out = torch.func.functional_call(model, swapped, (run.task.module_inputs(batch)[0],))
                    total = total + run.task.loss(out, batch) * size / len(calibration)
                return total

            size = weight.numel()
            exact = torch.autograd.functional.hessian(loss, weight.detach()).reshape(size, size).trace()
            # the spread of one draw is about that of the off-diagonal part; 3000 draws leave a few percent
            assert found[name][0] == pytest.approx(float(exact), rel=0.08)


def test_the_estimate_stops_when_it_no_longer_changes(run):
    model = tiny()
    with CalibrationSet(run, 40, 40) as calibration, gradients_for(model, model.parameters()):
        losses = task_losses(model, calibration, run)
        weights = {"4": model[4].weight}
        few = hessian_traces(model, weights, losses, torch.Generator().manual_seed(0), 100, 0.5)
        many = hessian_traces(model, weights, losses, torch.Generator().manual_seed(0), 20, 0.0)
    assert few["4"][1] < many["4"][1] == 20


def test_output_error_and_kl_are_those_of_a_layer_quantized_by_hand(run):
    model = tiny()
    with CalibrationSet(run, 40, 16) as calibration:
        found = measure_sensitivity(model, run, calibration, ("output_error", "kl", "fisher"), (4,))
        batch = calibration.draw(torch.arange(40))
    before = model[2].weight.detach().clone()
    with torch.no_grad():
        float_out = run.forward(model, batch)
        model[2].weight.copy_(rounded(before, 4))
        out = run.forward(model, batch)
        model[2].weight.copy_(before)
    item = found.layers[0]
    assert item.layer == "2"
    assert item.values["output_error"]["4"] == pytest.approx(float((out - float_out).square().mean()), rel=1e-4)
    p = float_out.softmax(1).double()
    kl = (p * (float_out.log_softmax(1).double() - out.log_softmax(1).double())).sum(1).mean()
    assert item.values["kl"]["4"] == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
    squares = torch.zeros_like(before)
    for row in range(40):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        (gradient,) = torch.autograd.grad(run.task.loss(run.forward(model, one), one), model[2].weight)
        squares += gradient.square() / 40
    expected = 0.5 * float((squares * (rounded(before, 4) - before).square()).sum())
    assert item.values["fisher"]["4"] == pytest.approx(expected, rel=1e-4)
    assert torch.equal(model[2].weight, before)


def test_fewer_bits_cost_more_by_every_measure(run):
    with CalibrationSet(run, 40, 16) as calibration:
        found = measure_sensitivity(tiny(), run, calibration, bits=(8, 4, 2), draws=5)
    for item in found.layers:
        for measure, values in item.values.items():
            if measure != "hessian" or item.hessian_trace > 0:
                assert values["8"] < values["4"] < values["2"]


def test_the_command_writes_a_file_that_reads_back(tmp_path):
    result = CliRunner().invoke(
        app,
        [
            "sensitivity",
            "zoo:digits_cnn",
            "--data",
            "digits?train=64&test=10",
            "--bits",
            "4,2",
            "--out",
            str(tmp_path / "s"),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "conv1" in result.output
    found = read_sensitivity(tmp_path / "s" / "sensitivity.json")
    assert found.bits == (4, 2) and [item.layer for item in found.layers] == ["conv1", "conv2", "conv3", "linear"]
    assert len(found.table("hessian", (4, 2), ["conv1", "linear"], "quant_x")[0]) == 2
    assert (tmp_path / "s" / "sensitivity_hessian.png").stat().st_size > 1000
    with pytest.raises(RequestError, match="quant_x: the sensitivity file has no layer 'conv9'"):
        found.table("hessian", (4,), ["conv9"], "quant_x")
    with pytest.raises(RequestError, match="has no 3 bits"):
        found.table("hessian", (3,), ["conv1"], "quant_x")


def test_a_chart_says_where_a_cost_is_zero_or_less(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("eff.use.save_figure", lambda figure, path: figures.append(figure))
    layers = tuple(
        LayerSensitivity(layer=name, parameters=1, values={"hessian": {"8": cost, "4": 1e-3}})
        for name, cost in (("a", 1e-6), ("b", -1e-7), ("c", 0.0))
    )
    write_sensitivity(Sensitivity(model="m", data="d", samples=1, bits=(8, 4), layers=layers), tmp_path)
    (axes,) = figures[0].axes
    assert [(text.get_text(), text.get_position()[1]) for text in axes.texts] == [("0 or less", 1), ("0 or less", 2)]


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(RequestError, match="there is no measure 'hessain'.*did you mean 'hessian'"):
        parse_measures("hessain")
    with pytest.raises(RequestError, match="make one with eff sensitivity"):
        read_sensitivity(tmp_path / "none.json")
    (tmp_path / "other.json").write_text(json.dumps({"model": "x"}))
    with pytest.raises(RequestError, match="make one with eff sensitivity"):
        read_sensitivity(tmp_path / "other.json")
