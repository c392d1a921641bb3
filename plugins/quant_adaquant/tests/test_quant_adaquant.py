"""AdaQuant against hand-worked numbers, autograd, brute force and interrupted runs."""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from eff.data import load_data
from eff.errors import ConfigError, InterruptedRunError, RequestError, UnsupportedModelError
from eff.models import make_task
from eff.run import Run
from eff.runner import apply, resume
from eff.schemas import CORE_TRAINING, MethodUse, Recipe, TrainOptions
from eff.session import Chosen, Plugins
from eff.training import Training
from eff.use import UseRequest, evaluate
from eff_quant_adaquant.bits import check_reachable, choose_bits, rises, size_budget
from eff_quant_adaquant.config import AdaQuantConfig
from eff_quant_adaquant.insert import range_layers
from eff_quant_adaquant.pipeline import Pipeline
from eff_quant_adaquant.plugin import AdaQuant
from eff_quant_adaquant.quantizer import RangeLayer, RangeQuantizer, quantize, quantize_bias
from eff_quant_adaquant.tuning import tune_norms
from eff_quant_kit.folding import fold_batch_norms
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.walk import Walk

EFF_PLUGIN = "quant_adaquant"
QUICK = {"iters": 3, "bias_epochs": 1, "calib_size": 48, "batch": 16}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.head(x.flatten(1))


def net() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for norm in (model.bn1, model.bn2):
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, 0.2, 0.3)
    model(torch.rand(64, 1, 8, 8))  # fills the running statistics
    return model.eval()


def a_run(training: bool = True, data: str = "digits?seed=0") -> Run:
    loaded = load_data(data)
    task = make_task(loaded.task, Plugins((), extensions=()))
    return Run(task, torch.device("cpu"), 0, loaded, train=CORE_TRAINING, training=training)


def calibrated(config: AdaQuantConfig, model: nn.Module | None = None) -> tuple[nn.Module, AdaQuant, Run]:
    method, run = AdaQuant(config), a_run()
    changed = method.transform(model=model or net(), run=run)
    Training(changed, run, Plugins([Chosen("quant_adaquant", "", "", method)], extensions=())).run_all()
    return method.finish(changed, run), method, run


# --- the quantizer


@pytest.mark.parametrize(
    ("x", "expected"),
    # r = 3, z = -1, 2 bits: scale 1, zero point 1, values -1, 0, 1, 2
    [(-5.0, -1.0), (-1.0, -1.0), (-0.4, 0.0), (0.0, 0.0), (0.6, 1.0), (1.4, 1.0), (2.0, 2.0), (9.0, 2.0)],
)
def test_values_by_hand(x, expected):
    assert float(quantize(torch.tensor(x), torch.tensor(3.0), torch.tensor(-1.0), 2)) == expected


@pytest.mark.parametrize(
    ("x", "dr", "dz"),
    [
        (0.4, (0 - 0.4) / 3, 0.0),  # inside: x_hat = (round(x/s + zp) - zp) s, s = r/3; the zero point cancels
        (9.0, 1.0, 1.0),  # clipped above: x_hat = (n - zp) s = r + z
        (-9.0, 0.0, 1.0),  # clipped below: x_hat = -zp s = z
    ],
)
def test_gradients_of_range_and_zero(x, dr, dz):
    r, z = torch.tensor(3.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    quantize(torch.tensor(x), r, z, 2).backward()
    assert float(r.grad) == pytest.approx(dr, abs=1e-6)
    assert float(z.grad) == pytest.approx(dz, abs=1e-6)


def by_the_formula(x: Tensor, range_: Tensor, zero: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1

    def through(value: Tensor) -> Tensor:
        return value + (value.round() - value).detach()

    scale = range_.clamp(1e-6, 1e5) / n
    zp = through(-zero / scale).clamp(0, n)
    return (through((x / scale + zp).clamp(0, n)) - zp) * scale


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.booleans(), st.floats(0.3, 3.0))
def test_values_and_gradients_equal_autograd_through_the_formula(seed, bits, per_channel, covered):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)
    shape = (5, 1, 1) if per_channel else ()
    zero = -covered * torch.rand(shape, dtype=torch.float64, generator=generator)
    range_ = covered * (0.5 + torch.rand(shape, dtype=torch.float64, generator=generator))
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    inputs = [value.requires_grad_() for value in (x, range_, zero)]
    expected = by_the_formula(*inputs, bits)
    axis, shape = (0, (5,)) if per_channel else (None, ())
    found = quantize(x, range_.view(shape), zero.view(shape), bits, axis)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    for gradient, other in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0.01, 50.0))
def test_quantizing_is_idempotent_keeps_zero_and_errs_by_half_a_step(seed, bits, width):
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * width
    quantizer = RangeQuantizer(bits)
    quantizer.cover(x.min().clamp(max=0), x.max().clamp(min=0))
    once = quantizer(x)
    step = float(quantizer.range.detach()) / (2**bits - 1)
    assert torch.allclose(quantizer(once), once, atol=1e-5 * width)
    assert float(quantizer(torch.zeros(1))) == 0.0
    # the zero point is rounded too, so an end of the range may lie half a step beyond the grid
    assert float((once - x).abs().max()) <= 1.01 * step


def test_the_kits_quantizer_has_the_same_grid():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    quantizer = RangeQuantizer(3, channels=6)
    quantizer.cover(x.amin(1).clamp(max=0), x.amax(1).clamp(min=0))
    assert torch.allclose(quantizer.as_quantizer()(x), quantizer(x), atol=1e-6)


def test_the_kits_quantizer_of_a_channel_that_is_all_but_zero_has_a_whole_zero_point():
    quantizer = RangeQuantizer(8, channels=2)
    quantizer.cover(torch.tensor([-3e-8, -1.0]), torch.tensor([2e-7, 1.0]))
    made = quantizer.as_quantizer()
    zero = -made.offset.detach() / made.scale.detach()
    assert torch.allclose(zero, zero.round(), atol=1e-3)


def test_a_bias_gets_the_bits_of_weight_and_input():
    bias = torch.tensor([-0.5, 0.1, 1.0])
    assert torch.allclose(quantize_bias(bias, 16), bias, atol=1.5 / 2**16)
    assert RangeLayer(nn.Linear(2, 2), 4, 8).bias_bits == 12


# --- layers


def test_ranges_of_inputs_average_the_extremes_of_samples():
    method, run = AdaQuant(AdaQuantConfig(bits=(8,), **QUICK)), a_run()
    changed = method.transform(model=net(), run=run)
    layer = range_layers(changed)["conv1"]
    batches = [b["image"] for b in method.pipeline.calibration]
    seen = [run.forward(nn.Identity(), {"image": b}).flatten(1) for b in batches]
    assert float(layer.input_high) == pytest.approx(
        float(torch.stack([s.amax(1).mean() for s in seen]).mean()), rel=1e-5
    )
    method.pipeline.calibration.close()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_error_of_every_layer_falls_on_rows_not_trained_on(mode):
    config = AdaQuantConfig(
        bits=(2,),
        act_bits=4,
        mode=mode,
        iters=60,
        lr_w=1e-3,
        lr_qx=1e-2,
        calib_size=200,
        norm_tuning=False,
        bias_tuning=False,
    )
    _, method, _ = calibrated(config)
    rows = method.structure["layers"]
    assert [row["layer"] for row in rows] == ["conv1", "conv2", "head"]
    assert all(row["error_after"] < row["error_before"] for row in rows)


def test_searching_ranges_only_leaves_the_weights():
    config = AdaQuantConfig(
        bits=(3,), optimise="qparams", iters=40, calib_size=64, batch=32, norm_tuning=False, bias_tuning=False
    )
    method, run = AdaQuant(config), a_run()
    changed = method.transform(model=net(), run=run)
    before = {name: layer.layer.weight.detach().clone() for name, layer in range_layers(changed).items()}
    Training(changed, run, Plugins([Chosen("quant_adaquant", "", "", method)], extensions=())).run_all()
    for name, layer in range_layers(changed).items():
        assert torch.equal(layer.layer.weight, before[name])
    assert all(row["error_after"] <= row["error_before"] * 1.05 for row in method.structure["layers"])
    method.pipeline.calibration.close()


def test_sequential_inputs_come_from_the_quantized_layers_and_targets_from_float(monkeypatch):
    config = AdaQuantConfig(bits=(2,), iters=1, calib_size=40, batch=8, norm_tuning=False, bias_tuning=False)
    seen = {}
    from eff_quant_adaquant import pipeline as module

    original = module.LayerUnit.__init__

    def spy(self, layer, inputs, targets, *rest):
        seen[len(seen)] = (inputs.read(slice(0, 5)), targets.read(slice(0, 5)))
        original(self, layer, inputs, targets, *rest)

    monkeypatch.setattr(module.LayerUnit, "__init__", spy)
    method, run = AdaQuant(config), a_run()
    changed = method.transform(model=net(), run=run)
    work = method.pipeline
    work.step(0)
    work.step(1)
    batch = next(iter(work.calibration))
    batch = {"image": batch["image"][:5], "label": batch["label"][:5]}
    taken = {}
    handle = changed.conv2.register_forward_pre_hook(lambda m, a: taken.update(x=a[0]))
    run.forward(changed, batch)
    handle.remove()
    handle = work.teacher.conv2.register_forward_hook(lambda m, a, o: taken.update(y=o.clone()))
    run.forward(work.teacher, batch)
    handle.remove()
    assert torch.allclose(seen[1][0], taken["x"]) and torch.allclose(seen[1][1], taken["y"], atol=1e-5)
    work.calibration.close()


# --- bits


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 8))
def test_the_programme_equals_brute_force_and_meets_the_size(seed, layers):
    draws = np.random.default_rng(seed)
    weights = draws.integers(10, 2000, layers).tolist()
    bits = [[8, 4, 2]] * layers
    budget = size_budget(weights, bits, float(draws.uniform(0.07, 0.25)))
    cost = np.concatenate([np.zeros((layers, 1)), draws.random((layers, 2))], 1)
    best = min(
        sum(cost[row, choice] for row, choice in enumerate(choices))
        for choices in itertools.product(range(3), repeat=layers)
        if sum(budget.use[row, choice] for row, choice in enumerate(choices)) <= budget.limit * (1 + 1e-9)
    )
    found = choose_bits(cost, budget)
    assert found.cost == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert found.used["target_ratio"] <= budget.limit * (1 + 1e-9)


def test_rises_are_floored_and_the_base_is_free():
    cost = rises(2, 2, lambda layer, candidate: [1.5, 0.9][layer], 1.0)
    assert cost.tolist() == [[0.0, 0.5], [0.0, 1e-6]]


def test_a_size_out_of_reach_is_refused_with_the_interval():
    with pytest.raises(RequestError, match=r"target_ratio 0.1 is out of reach; .* 0.125 to 0.25"):
        check_reachable(size_budget([100, 50], [[8, 4], [8, 4]], 0.1))


def test_a_mixed_model_meets_its_size_and_says_what_the_sum_predicted():
    config = AdaQuantConfig(bits=(8, 2), target_ratio=0.1, **QUICK)
    model, method, _ = calibrated(config)
    bits = {name: layer.weight_quantizer.bits for name, layer in quant_layers(model).items()}
    counts = {name: layer.layer.weight.numel() for name, layer in quant_layers(model).items()}
    assert set(bits.values()) == {8, 2}
    assert sum(bits[n] * counts[n] for n in bits) / 32 / sum(counts.values()) <= 0.1
    programme = method.structure["programme"]
    assert programme["predicted_loss"] >= programme["base_loss"]
    assert programme["true_loss"] > 0
    json.dumps(method.structure)  # goes into the checkpoint's header


def test_a_sensitivity_file_stands_for_the_measured_costs(tmp_path):
    layers = [
        {"layer": name, "parameters": 1, "values": {"output_error": {"8": 0.0, "2": cost}}}
        for name, cost in (("conv1", 5.0), ("conv2", 1.0), ("head", 4.0))
    ]
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"model": "m", "data": "d", "samples": 1, "bits": [8, 2], "layers": layers}))
    # 36, 216 and 960 weights: with 0.2 of float32's size the cheap second layer alone will not do, the head must go
    _, method, _ = calibrated(AdaQuantConfig(bits=(8, 2), target_ratio=0.2, sensitivity=str(file), **QUICK))
    assert method.structure["programme"]["cost"] == [[0.0, 5.0], [0.0, 1.0], [0.0, 4.0]]
    assert method.structure["bits"]["head"][0] == 2 and method.structure["bits"]["conv1"][0] == 8


# --- norms and biases


def test_norm_tuning_restores_the_statistics_and_keeps_the_codes():
    run = a_run()
    model = net()
    work = Pipeline(model, AdaQuantConfig(bits=(8,), calib_size=400, batch=64), {}, run)
    layers = range_layers(model)
    with torch.no_grad():  # a network whose channels have drifted
        for layer in layers.values():
            layer.layer.bias.add_(0.3)
            layer.layer.weight.mul_(1.3)
            layer.cover_measured()
    codes = {
        n: (layer.layer.weight / layer.weight_quantizer(layer.layer.weight)).nan_to_num() for n, layer in layers.items()
    }
    with torch.no_grad():
        assert tune_norms(model, work.folded, work.calibration, run) == 2
    for name, layer in layers.items():
        after = (layer.layer.weight / layer.weight_quantizer(layer.layer.weight)).nan_to_num()
        assert torch.allclose(after, codes[name], rtol=1e-4, atol=1e-4)
    for item in work.folded:
        rows = Walk(work.calibration, model).record(item.layer, inputs=False).outputs.read(slice(0, 400))
        mean, std = rows.mean((0, 2, 3)), rows.std((0, 2, 3))
        assert torch.allclose(mean, item.beta, atol=0.05 * float(item.gamma.abs().max()))
        assert torch.allclose(std, item.gamma.abs(), rtol=0.05, atol=1e-3)
    work.calibration.close()


def test_bias_tuning_moves_biases_only_and_not_the_last():
    config = AdaQuantConfig(bits=(4,), pipeline="advanced", iters=1, bias_epochs=1, calib_size=48, norm_tuning=False)
    method, run = AdaQuant(config), a_run()
    changed = method.transform(model=net(), run=run)
    work = method.pipeline
    for index in range(work.layer_steps):
        work.step(index)
    before = {name: value.detach().clone() for name, value in changed.state_dict().items()}
    work.step(work.layer_steps)
    moved = {name for name, value in changed.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"conv1.layer.bias", "conv2.layer.bias"}
    work.calibration.close()


@pytest.mark.parametrize(("bias_lr", "helps"), [(0.05, True), (300.0, False)])
def test_bias_tuning_that_made_it_worse_is_taken_back(bias_lr, helps):
    config = AdaQuantConfig(
        bits=(2,), act_bits=4, iters=1, bias_epochs=1, calib_size=48, norm_tuning=False, bias_lr=bias_lr
    )
    method, run = AdaQuant(config), a_run()
    changed = method.transform(model=net(), run=run)
    work = method.pipeline
    for index in range(work.layer_steps):
        work.step(index)
    before = [layer.layer.bias.detach().clone() for layer in range_layers(changed).values()]
    for index in range(work.layer_steps, work.step_count):
        work.step(index)
    tuned = [layer.layer.bias.detach().clone() for layer in range_layers(changed).values()]
    work.finish()
    after = [layer.layer.bias.detach() for layer in range_layers(changed).values()]
    assert not all(map(torch.equal, before, tuned))
    assert all(map(torch.equal, after, tuned if helps else before))


def test_the_light_pipeline_changes_no_weight_before_norm_tuning():
    config = AdaQuantConfig(bits=(8, 4), pipeline="light", target_ratio=0.2, norm_tuning=False, calib_size=48)
    model = net()
    folded = copy.deepcopy(model)
    batch = {"image": torch.rand(4, 1, 8, 8)}
    fold_batch_norms(folded, lambda: folded(batch["image"]))
    quantized, method, _ = calibrated(config, model)
    assert method.step_count(a_run()) == 0
    for name, layer in quant_layers(quantized).items():
        assert torch.equal(layer.layer.weight, folded.get_submodule(name).weight)


# --- runs


def test_an_interrupted_run_gives_the_same_model(tmp_path, monkeypatch):
    recipe = Recipe(
        methods=(MethodUse(name="quant_adaquant", options={"bits": [8, 4], "target_ratio": 0.2, **QUICK}),),
        model="zoo:digits_cnn", data="digits?train=64&test=64",
    )  # fmt: skip
    apply(recipe, tmp_path / "whole")
    from eff_quant_adaquant import pipeline as module

    step = module.Pipeline.step
    for stop in (4, 11, 40):  # in a layer, at the second candidate, while the biases are tuned

        def failing(self, index, stop=stop):
            if index == stop:
                raise KeyboardInterrupt
            return step(self, index)

        monkeypatch.setattr(module.Pipeline, "step", failing)
        out = tmp_path / f"stopped{stop}"
        with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
            apply(recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": 1})}), out)
        monkeypatch.setattr(module.Pipeline, "step", step)
        resume(out)
        a = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
        b = torch.load(out / "model.pt", weights_only=True)
        keys = [
            key
            for key, value in a.items()
            if isinstance(value, dict) and any(torch.is_tensor(v) for v in value.values())
        ]
        assert keys
        for key in keys:
            assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


MEASURED = """
import importlib.machinery, pathlib, sys, tempfile, threading, types
import torch
from eff.data import Data
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TaskSpec

SIZE = 96

class Noise:  # made when it is read: the data take no memory themselves
    def __init__(self, samples): self.samples = samples
    def __len__(self): return self.samples
    def batch(self, indices, generator=None):
        images = torch.rand(len(indices), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(int(indices[0])))
        return {"image": images, "label": torch.tensor(list(indices)) % 4}
    def fingerprint(self): return str(self.samples)

def noise(spec, task=None):
    made = TaskSpec(options={"input_shape": [1, SIZE, SIZE], "classes": ["a", "b", "c", "d"]})
    return Data(spec, made, Noise(int(spec.options["train"])), Noise(8))

module = sys.modules["noise_for_the_test"] = types.ModuleType("noise_for_the_test")
module.noise, module.__spec__ = noise, importlib.machinery.ModuleSpec("noise_for_the_test", None)
peaks = []
for samples in (16, 32, 128):  # the first loads what is loaded once
    peak, stop = [0], threading.Event()
    def watch():
        while not stop.wait(0.01):
            for line in open("/proc/self/status"):
                if line.startswith("RssAnon"):
                    peak[0] = max(peak[0], int(line.split()[1]))
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    options = {"bits": [8], "iters": 1, "bias_tuning": False, "calib_size": samples, "batch": 16}
    recipe = Recipe(
        model="eff.testing.samples:tiny_cnn", data=f"noise_for_the_test:noise?train={samples}", device="cpu",
        methods=(MethodUse(name="quant_adaquant", options=options),), export=(),
    )
    with tempfile.TemporaryDirectory() as folder:
        apply(recipe, pathlib.Path(folder, "run"))
    stop.set()
    thread.join()
    peaks.append(peak[0])
print("peaks", *peaks)
"""


def test_changed_options_are_refused_on_resume(tmp_path, monkeypatch):
    recipe = Recipe(
        methods=(MethodUse(name="quant_adaquant", options={"bits": [8], **QUICK}),),
        model="zoo:digits_cnn", data="digits?train=64&test=64", train=TrainOptions(checkpoint_every=1),
    )  # fmt: skip

    def failing(self, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "step", failing)
    with pytest.raises((KeyboardInterrupt, InterruptedRunError)):
        apply(recipe, tmp_path / "run")
    edited = tmp_path / "run" / "recipe.yaml"
    edited.write_text(edited.read_text().replace("iters: 3", "iters: 7"))
    with pytest.raises(RequestError, match=r"quant_adaquant\.iters was 3 and is 7"):
        resume(tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_with_the_samples():
    # One arena, and large blocks given back at once: glibc's leftovers would be as large as what is looked for.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    _, small, large = map(int, done.stdout.split("peaks")[1].split())
    # Between 32 and 128 samples one recording of conv1 (8 channels of 96 x 96, float32) grows by 27 MiB: kept in memory it
    # would show, while allocators' leftovers are some MiB.
    recording = (128 - 32) * 8 * 96 * 96 * 4 // 1024
    assert large - small < recording // 3, f"{small} KiB with 32 samples, {large} KiB with 128"


@pytest.mark.parametrize("format", ["packed", "onnx"])
def test_exports_predict_what_the_model_predicts(tmp_path, format):
    pytest.importorskip("onnxruntime")
    recipe = Recipe(
        methods=(MethodUse(name="quant_adaquant", options={"bits": [4], "pipeline": "light", "calib_size": 64}),),
        model="zoo:digits_cnn", data="digits?train=64&test=128", export=(format,),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "out")
    artifact = next(item for item in report.artifacts if item.format == format)
    if format == "onnx":
        assert artifact.details["agreement"] >= 0.99
    else:
        loaded = evaluate(UseRequest(model=str(tmp_path / "out" / artifact.path), data="digits?train=64&test=128"))
        assert loaded.metrics.values["accuracy"].value == report.after.metrics.values["accuracy"].value
        assert artifact.details["code_bytes"] == -(-72 // 2) + 1152 // 2 + 2304 // 2 + 640 // 2


def test_contract(eff_contract_check):
    eff_contract_check()


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": (4, 8)}, "the first of bits is the base"),
        ({"bits": (9,)}, "bits must be different numbers from 2 to 8"),
        ({"bits": (8, 8)}, "different"),
        ({"target_ratio": 0.3}, "less than or equal to 0.25"),
        ({"calib_size": 4}, "greater than or equal to 8"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        AdaQuantConfig(**options)


def test_wrong_models_and_data_are_refused():
    run = a_run()
    with pytest.raises(ConfigError, match="exclude names 'conv3'.*did you mean"):
        Pipeline(net(), AdaQuantConfig(exclude=("conv3",)), {}, run)
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        Pipeline(nn.Sequential(nn.Flatten(), nn.ReLU()), AdaQuantConfig(), {}, run)
    model = net()
    model.unused = nn.Linear(2, 2)
    method = AdaQuant(AdaQuantConfig(bits=(8,), **QUICK))
    changed = method.transform(model=model, run=run)
    with pytest.raises(UnsupportedModelError, match="unused: the forward pass never reaches it"):
        Training(changed, run, Plugins([Chosen("quant_adaquant", "", "", method)], extensions=())).run_all()


def test_what_is_left_in_float_is_named():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(1, 1, 2)
            self.head = nn.Linear(9, 10)

        def forward(self, x):
            return self.head(nn.functional.adaptive_avg_pool2d(self.up(x), 3).flatten(1))

    run = a_run()
    Pipeline(Mixed(), AdaQuantConfig(bits=(8,), **QUICK), {}, run).calibration.close()
    assert any("left in float: up.weight (ConvTranspose2d, " in warning for warning in run.log.warnings)


def test_labels_are_needed_for_accuracy_only_where_they_are_used():
    run = a_run()
    unlabelled = AdaQuantConfig(bits=(8, 4), ip_metric="mse", **QUICK)
    Pipeline(net(), unlabelled, {}, run).calibration.close()

    def without(model, batch):
        raise KeyError("label")

    run.task.loss = without
    with pytest.raises(ConfigError, match="ip_metric=loss needs 'label' in the data.*use ip_metric=mse"):
        Pipeline(net(), AdaQuantConfig(bits=(8, 4), **QUICK), {}, run)
