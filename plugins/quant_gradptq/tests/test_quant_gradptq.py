"""Learned rounding against hand-worked numbers, autograd, exact allocation and interrupted runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from eff.data import load_data
from eff.errors import InterruptedRunError, RequestError, UnsupportedModelError
from eff.models import make_task
from eff.run import Run
from eff.runner import apply, resume
from eff.schemas import CORE_TRAINING, MethodUse, Recipe
from eff.session import Chosen, Plugins
from eff.training import Training
from eff.use import UseRequest, evaluate
from eff_quant_gradptq.config import GradPTQConfig
from eff_quant_gradptq.grid import fake_quantize, search_power, search_scale, unwarp, warp
from eff_quant_gradptq.importance import channel_importance, greedy_bits
from eff_quant_gradptq.losses import beta_at, distance, uniform_like
from eff_quant_gradptq.pipeline import Pipeline
from eff_quant_gradptq.plugin import GradPTQ
from eff_quant_gradptq.rounding import RoundingLayer
from eff_quant_gradptq.units import unit_names
from eff_quant_kit.allocation import Budget, allocate
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.layers import find_layers, quant_layers

EFF_PLUGIN = "quant_gradptq"
QUICK = {"iters": 4, "calib_size": 48, "batch": 16}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.two(self.norm(self.one(x)).relu())).relu()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.head = nn.Linear(4 * 16, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu()).flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(torch.rand(64, 1, 8, 8))
    return model.eval()


def a_run(training: bool = True) -> Run:
    data = load_data("digits?seed=0")
    task = make_task(data.task, Plugins((), extensions=()))
    return Run(task, torch.device("cpu"), 0, data, train=CORE_TRAINING, training=training)


def calibrated(model: nn.Module | None = None, **options) -> tuple[nn.Module, GradPTQ]:
    method, run = GradPTQ(GradPTQConfig(**{**QUICK, **options})), a_run()
    changed = method.transform(model=model or net(), run=run)
    Training(changed, run, Plugins([Chosen("quant_gradptq", "", "", method)], extensions=())).run_all()
    return method.finish(changed, run), method


def a_layer(bits: int = 3, **options) -> RoundingLayer:
    torch.manual_seed(1)
    layer = nn.Linear(20, 6)
    config = GradPTQConfig(**options)
    made = RoundingLayer(layer, torch.full((6,), bits), config, None, True)
    made.mode = "soft"
    return made


# --- grids


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6), st.booleans())
def test_searched_scales_are_no_worse_than_min_max(seed, bits, symmetric):
    rows = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) ** 3
    widths = torch.full((5,), bits)
    scale, zero = search_scale(rows, widths, symmetric, False, 2.4)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    bounds = torch.full((5, 1), float(low)), torch.full((5, 1), float(high))

    def error(s, z):
        return (fake_quantize(rows, s[:, None], z[:, None], *bounds) - rows).abs().pow(2.4).mean(1)

    if symmetric:
        plain = rows.abs().amax(1) / high, torch.zeros(5)
    else:
        least, most = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        full = (most - least) / high
        plain = full, (-least / full).round()
    assert (error(scale, zero) <= error(*plain) * (1 + 1e-5)).all()


@pytest.mark.parametrize(("w", "expected"), [(0.5, 4 / 9), (1.0, 1.0), (-0.1, -1 / 9), (0.02, 0.0)])
def test_power_grid_by_hand(w, expected):
    # a = 1/2, d = 1/3: |w|^a / d = 2.12, 3, 0.95, 0.42; levels 2, 3, 1, 0; values (k/3)^2
    level = fake_quantize(warp(torch.tensor(w), 0.5), *(torch.tensor(v) for v in (1 / 3, 0.0, -3.0, 3.0)))
    assert float(unwarp(level, 0.5)) == pytest.approx(expected, abs=1e-6)


def test_the_power_search_prefers_even_levels_for_even_weights_and_bends_for_peaked_ones():
    draws = torch.Generator().manual_seed(0)
    even = torch.rand(8, 200, generator=draws) * 2 - 1
    peaked = torch.randn(8, 200, generator=draws) ** 5
    bits = torch.full((8,), 4)
    assert search_power(even, bits, 2.4) > 0.85
    assert search_power(peaked, bits, 2.4) < search_power(even, bits, 2.4)


# --- rounding


@pytest.mark.parametrize("span", [1, 2])
def test_the_soft_weight_is_the_weight_at_first(span):
    layer = a_layer(8, span=span)
    inside = layer.learned
    assert torch.allclose(layer.weight[inside], layer.layer.weight[inside], atol=1e-6)


def test_the_start_is_finite_at_fractions_of_zero_and_one():
    layer = a_layer()
    layer.frac = torch.tensor([[0.0, 1.0, 0.5]])
    start = layer._start()
    assert torch.isfinite(start).all()
    h = torch.sigmoid(start) * 1.2 - 0.1
    assert torch.allclose(h, layer.frac, atol=1e-6)


def test_hard_weights_are_above_or_below_and_follow_the_sign_of_the_variable():
    layer = a_layer(4)
    with torch.no_grad():
        layer.variable.copy_(torch.randn(layer.variable.shape, generator=torch.Generator().manual_seed(0)))
    layer.mode = "hard"
    levels = layer.weight / layer.scale[:, None]
    expected = (layer.base + (layer.variable >= 0)).clamp(-8, 7)
    nearest = (layer.base + (layer.frac >= 0.5)).clamp(-8, 7)
    assert torch.allclose(levels, torch.where(layer.learned, expected, nearest), atol=1e-4)


def test_the_penalty_is_one_per_undecided_weight_and_none_when_decided():
    layer = a_layer(4)
    with torch.no_grad():
        layer.variable.zero_()  # h = 1/2 everywhere
    assert layer.penalty(2.0).item() == pytest.approx(int(layer.learned.sum()))
    with torch.no_grad():
        layer.variable.fill_(9.0)
    assert layer.penalty(20.0).item() == pytest.approx(0.0, abs=1e-4)
    assert layer.decidedness() == pytest.approx(1.0)


def test_the_gradient_of_the_variable_is_that_of_the_formula():
    layer = a_layer(4)
    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    v = layer.variable.detach().double().requires_grad_(True)
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    w = ((layer.base.double() + h).clamp(-8, 7)) * layer.scale.double()[:, None]
    nearest = (layer.base + (layer.frac >= 0.5)).double().clamp(-8, 7) * layer.scale.double()[:, None]
    w = torch.where(layer.learned, w, nearest)
    (x.double() @ w.T + layer.layer.bias.double()).square().sum().backward()
    level = layer.base + h.detach()
    inside = (level > -7.9) & (
        level < 6.9
    )  # at the very ends float32 and float64 may fall on different sides of the clip
    assert int(inside.sum()) > 60
    assert torch.allclose(layer.variable.grad.double()[inside], v.grad[inside], rtol=1e-3, atol=1e-3)


def test_unselected_and_clipped_weights_are_rounded_to_nearest():
    layer = a_layer(2, select="near_half", select_frac=0.25)
    assert int(layer.learned.sum()) <= 0.25 * 120
    distance_of_learned = (layer.frac[layer.learned] - 0.5).abs().max()
    inside = (layer.base + layer.frac).abs() < 1
    assert float(distance_of_learned) <= float((layer.frac[inside & ~layer.learned] - 0.5).abs().max())
    assert layer.clipped() > 0  # searched 2-bit scales clip


def test_beta_falls_linearly_after_the_warm_up():
    assert beta_at(0.1, 20, 2, 0.2) is None
    assert beta_at(0.2, 20, 2, 0.2) == pytest.approx(20)
    assert beta_at(0.6, 20, 2, 0.2) == pytest.approx(11)
    assert beta_at(1.0, 20, 2, 0.2) == pytest.approx(2)


def test_mse_is_summed_over_channels_and_averaged_over_the_rest():
    out, y = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    assert float(distance("mse", out, y)) == 3.0
    assert float(distance("mse", torch.zeros(2, 5, 8), torch.ones(2, 5, 8))) == 8.0  # tokens: features last


def test_noise_has_the_channels_statistics():
    values = (
        torch.randn(400, 2, 6, 6, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
        + 2
    )
    noise = uniform_like(values, torch.Generator().manual_seed(1))
    assert torch.allclose(noise.mean((0, 2, 3)), values.mean((0, 2, 3)), atol=0.1)
    assert torch.allclose(noise.std((0, 2, 3)), values.std((0, 2, 3)), rtol=0.05)


# --- importance and bits


def test_importance_equals_weights_times_gradients_of_single_samples():
    run, model = a_run(), net()
    layers = find_layers(model)
    with CalibrationSet(run, 40, 16) as calibration:
        found = channel_importance(model, layers, calibration, run)
        expected = {name: torch.zeros(len(layer.weight), dtype=torch.float64) for name, layer in layers.items()}
        for row in range(6):
            batch = calibration.draw(torch.tensor([row]))
            out = run.forward(model, batch)
            loss = nn.functional.cross_entropy(out / 4, out.detach().argmax(1))
            for name, layer in layers.items():
                (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
                expected[name] += (layer.weight * gradient).flatten(1).sum(1).abs().double()
        six = CalibrationSet.__new__(CalibrationSet)
        six.__dict__ = calibration.__dict__ | {"sizes": [6], "plain": [{}]}
        found = channel_importance(model, layers, six, run)
    for name, layer in layers.items():
        assert torch.allclose(found[name], expected[name] / 6 / layer.weight[0].numel(), rtol=1e-3, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_greedy_bits_are_close_to_the_exact_programme_and_within_the_budget(seed):
    draws = np.random.default_rng(seed)
    items, candidates = 8, [2, 3, 4]
    decay = 4.0 ** -np.array(candidates)  # errors fall by four with each bit: then greedy is near the best
    gains = draws.random((items, 1)) * decay[None]
    sizes = np.ones(items)
    mean = float(draws.uniform(2.0, 4.0))
    chosen = greedy_bits(torch.tensor(gains), torch.tensor(sizes), candidates, mean)
    assert sum(chosen) <= mean * items + 1e-6
    use = np.tile(np.array(candidates, dtype=float), (items, 1))
    exact = allocate("quant_x", gains, [Budget("bits", use, mean * items)])
    cost = sum(gains[row, candidates.index(bits)] for row, bits in enumerate(chosen))
    assert exact.cost <= cost * (1 + 1e-6)
    assert cost <= exact.cost + gains.max()  # what a single item can make up


def test_a_sensitivity_file_stands_for_importance(tmp_path):
    names = list(find_layers(net()))
    layers = [
        {"layer": name, "parameters": 1, "values": {"fisher": {"8": 0.0, "4": float(n), "2": 10.0 * n}}}
        for n, name in enumerate(names)
    ]
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"model": "m", "data": "d", "samples": 1, "bits": [8, 4, 2], "layers": layers}))
    model, method = calibrated(mixed="layer", candidates=(2, 4, 8), bits=4, sensitivity=file)
    bits = method.structure["assigned_bits"]
    sizes = torch.tensor([float(quant_layers(model)[name].layer.weight.numel()) for name in names])
    gains = torch.tensor([[10.0 * n, float(n), 0.0] for n in range(len(names))], dtype=torch.float64)
    assert [set(bits[name]) for name in names] == [{b} for b in greedy_bits(gains, sizes, (2, 4, 8), 4)]
    assert len({b for item in bits.values() for b in item}) > 1


def test_mixed_channels_keep_the_mean_and_are_packed_by_their_bits(tmp_path):
    model, method = calibrated(mixed="channel", candidates=(2, 3, 4), bits=3)
    counts = {name: layer.layer.weight.numel() for name, layer in quant_layers(model).items()}
    bits = {name: layer.weight_quantizer.mean_bits for name, layer in quant_layers(model).items()}
    mean = sum(bits[name] * counts[name] for name in bits) / sum(counts.values())
    assert 2.9 < mean <= 3.0
    from eff_quant_kit.packed import pack_state, sizes, unpack_state

    state, details = pack_state(model)
    assert sizes(model)["code_bytes"] <= mean * sum(counts.values()) / 8 + 3 * len(counts)
    for name, value in unpack_state(state, details).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6)


# --- units and runs


def test_blocks_are_elements_of_containers_with_several_layers():
    model = net()
    order = ["stem", "blocks.0.one", "blocks.0.two", "blocks.1.one", "blocks.1.two", "head"]
    assert unit_names(model, order, "block") == ["stem", "blocks.0", "blocks.1", "head"]
    assert unit_names(model, order, "layer") == order


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "block"},
        {"unit": "block", "loss": "fisher_diag", "dof": ("rounding", "bias", "scale", "norm")},
        {"loss": "head_mse", "optimizer": "adamax"},
        {"variable": "offset", "optimizer": "sgd", "loss": "l1"},
        {"span": 2, "augment": "qdrop", "loss": "lp", "optimizer": "rmsprop"},
        {"augment": "mixup", "loss": "cosine", "asymmetric_input": False},
        {"augment": "noise", "loss": "kl", "calibration": "noise", "symmetric": False},
        {"grid": "power", "act_bits": 4, "act_iters": 2},
        {"mixed": "layer", "candidates": (2, 4, 8)},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_axis_runs_and_weights_lie_on_their_grid(options):
    model, method = calibrated(**options)
    x = torch.rand(3, 1, 8, 8)
    assert torch.isfinite(model(x)).all()
    for layer in quant_layers(model).values():
        weight = layer.layer.weight
        assert torch.allclose(layer.weight_quantizer(weight), weight, atol=1e-5)
        assert len(layer.weight_quantizer.levels(weight).unique()) <= 2**layer.weight_quantizer.bits
    assert method.structure["units"]


def test_learning_reduces_the_error_that_nearest_rounding_makes():
    _, method = calibrated(bits=2, iters=150, lr=1e-2, calib_size=200, batch=32)
    rows = method.structure["units"]
    assert sum(row["error_learned"] < row["error_nearest"] for row in rows) >= len(rows) - 1
    assert all(row["flips"] > 0 for row in rows)


def test_without_steps_weights_are_rounded_to_nearest():
    method, run = GradPTQ(GradPTQConfig(**QUICK)), a_run(training=False)
    changed = method.transform(model=net(), run=run)
    before = {
        name: m.layer.weight.detach().clone() for name, m in changed.named_modules() if isinstance(m, RoundingLayer)
    }
    model = method.finish(changed, run)
    for name, layer in quant_layers(model).items():
        assert torch.allclose(layer.layer.weight, layer.weight_quantizer(before[name]), atol=1e-6)


@pytest.mark.parametrize("stop", [6, 16])
def test_an_interrupted_run_gives_the_same_model(tmp_path, monkeypatch, stop):
    options = {**QUICK, "act_bits": 8, "act_iters": 3, "mixed": "channel"}
    recipe = Recipe(
        methods=(MethodUse(name="quant_gradptq", options=options),),
        model="zoo:digits_cnn",
        data="digits?train=64&test=64",
    )
    apply(recipe, tmp_path / "whole")
    from eff_quant_gradptq import pipeline as module

    step = module.Pipeline.step

    def failing(self, index):
        if index == stop:
            raise KeyboardInterrupt
        return step(self, index)

    monkeypatch.setattr(module.Pipeline, "step", failing)
    with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
        apply(
            recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": 1})}),
            tmp_path / "part",
        )
    monkeypatch.setattr(module.Pipeline, "step", step)
    resume(tmp_path / "part")
    states = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("whole", "part")]
    tensors = [
        {
            f"{key}/{name}": v
            for key, value in state.items()
            if isinstance(value, dict)
            for name, v in value.items()
            if torch.is_tensor(v)
        }
        for state in states
    ]
    assert tensors[0] and all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])


@pytest.mark.parametrize("options", [{"grid": "power"}, {"mixed": "channel"}, {"symmetric": False}, {}], ids=str)
def test_the_packed_file_predicts_what_the_model_predicts(tmp_path, options):
    recipe = Recipe(
        methods=(MethodUse(name="quant_gradptq", options={**QUICK, **options}),),
        model="zoo:digits_cnn", data="digits?train=64&test=128", export=("packed",),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "out")
    artifact = next(item for item in report.artifacts if item.format == "packed")
    loaded = evaluate(UseRequest(model=str(tmp_path / "out" / artifact.path), data="digits?train=64&test=128"))
    after = report.after.metrics.values["cross_entropy"].value
    assert loaded.metrics.values["cross_entropy"].value == pytest.approx(after, rel=1e-5)


def test_contract(eff_contract_check):
    eff_contract_check()


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": 1.5}, "less than or equal to 1"),
        ({"power": 0.0}, "greater than 0"),
        ({"mixed": "channel", "bits": 8, "candidates": (2, 4)}, "a mean of 8 bits is out of reach.*2 to 4 can be had"),
        ({"dof": ("bias",)}, "dof must hold 'rounding'"),
        ({"grid": "power", "symmetric": False}, "grid=power is symmetric"),
        ({"calib_size": 4}, "greater than or equal to 16"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        GradPTQConfig(**options)


def test_the_base_preset_is_plain_adaround_unless_told_otherwise():
    base = GradPTQConfig(preset="base")
    assert (base.loss, base.dof) == ("mse", ("rounding",))
    assert GradPTQConfig(preset="base", loss="l1").loss == "l1"


def test_onnx_of_a_power_grid_is_refused_with_the_way_out():
    from pathlib import Path

    from eff.schemas import ExportTarget

    method = GradPTQ(GradPTQConfig(grid="power"))
    with pytest.raises(RequestError, match="ONNX has no power grid; export packed"):
        method.export(net(), ExportTarget(format="onnx", path=Path("x.onnx")), a_run())


def test_a_block_with_several_inputs_is_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Two()])
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.parts[0](x, x))

    with pytest.raises(UnsupportedModelError, match="Two takes more than one tensor.*use unit=layer"):
        calibrated(Model(), unit="block")


def test_fewer_samples_than_a_batch_draw_a_warning():
    run = a_run()
    work = Pipeline(net(), GradPTQConfig(calib_size=16, batch=32), {}, run)
    assert any("fewer than a batch" in warning for warning in run.log.warnings)
    work.calibration.close()
