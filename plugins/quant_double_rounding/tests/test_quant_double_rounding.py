"""quant_double_rounding: integers, gradients against autograd, switching, ALRS, the supernet, run-time bits, bad input."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import ConfigError, RequestError, RunError
from eff.options import check_config
from eff.run import Run, Step
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Metric, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, MODEL, blobs
from eff.use import UseRequest, evaluate, export_model
from eff_quant_double_rounding import claims
from eff_quant_double_rounding.config import DoubleRoundingConfig
from eff_quant_double_rounding.layers import SwitchNorm, switch, switch_layers
from eff_quant_double_rounding.plugin import DoubleRounding
from eff_quant_double_rounding.rounding import double_round, integers, limits, shifted, value
from eff_quant_double_rounding.search import subnets
from eff_quant_double_rounding.training import Trainer, eta, roulette
from eff_quant_kit.packed import pack_state, unpack_state

EFF_PLUGIN = "quant_double_rounding"


def test_contract(eff_contract_check):
    eff_contract_check()


@settings(max_examples=200, deadline=None)
@given(stored=st.integers(-128, 127), low=st.integers(2, 8))
def test_the_shift_is_rounding_half_up_with_a_clip(stored, low):
    found = int(shifted(torch.tensor([stored], dtype=torch.int32), 8, low))
    bottom, top = limits(low)
    assert found == max(bottom, min(top, (2 * stored + 2 ** (8 - low)) // 2 ** (9 - low)))


def test_clipping_after_the_second_rounding_is_needed():
    assert shifted(torch.tensor([127, -128, 63, 32]), 8, 2).tolist() == [1, -2, 1, 1]
    assert shifted(torch.tensor([127, -1, 63]), 8, 2, "floor").tolist() == [1, -1, 0]


@pytest.mark.parametrize("low", [8, 6, 4, 2])
def test_values_and_gradients_are_those_of_the_straight_through_form(low):
    torch.manual_seed(0)
    w = torch.randn(200, dtype=torch.float64) * 3
    s = torch.tensor(0.02, dtype=torch.float64)
    grad = torch.randn(200, dtype=torch.float64)
    weight, scale = w.clone().requires_grad_(), s.clone().requires_grad_()
    out = double_round(weight, scale, 8, low)
    out.backward(grad)
    step, (bottom, top) = 2 ** (8 - low), limits(low)
    v = w / (s * step)
    level = shifted(((w / s + 0.5).floor().clamp(-128, 127)).int(), 8, low).double()
    torch.testing.assert_close(out.detach(), level * s * step)
    inside = (v >= bottom) & (v <= top)
    torch.testing.assert_close(weight.grad, grad * inside)
    expected = (grad * step * torch.where(inside, level - v, level)).sum()
    torch.testing.assert_close(scale.grad, expected)
    # Where nothing is clipped this is autograd's answer for round as the identity.
    small = torch.rand(50, dtype=torch.float64) * 0.5
    one, other = (s.clone().requires_grad_() for _ in range(2))
    double_round(small, one, 8, low).sum().backward()
    u = small / other
    rounded = u + (integers(small, s, 8).double() - u).detach()
    second = rounded / step + (shifted(integers(small, s, 8), 8, low).double() - rounded / step).detach()
    (second * other * step).sum().backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_the_middle_of_a_floored_bin_is_its_mean():
    stored = torch.arange(64, 128, dtype=torch.int32)
    middle = value(stored, torch.tensor(1.0), 8, 2, "floor_centred")
    assert middle.unique().tolist() == [95.5] and float(stored.float().mean()) == 95.5


def test_rates_and_roulette_by_hand():
    assert [eta(shift) for shift in (0, 2, 4, 6)] == pytest.approx([1, 0.1, 0.01, 0.001])
    assert [eta(shift) for shift in (1, 3)] == pytest.approx([0.5, 0.05])
    assert [roulette((8, 4), True, draw) for draw in (0.0, 0.66, 0.67)] == [8, 8, 4]
    assert [roulette((8, 4), False, draw) for draw in (0.49, 0.5)] == [8, 4]


def net():
    torch.manual_seed(0)
    layers = []
    for before, after in ((1, 4), (4, 6), (6, 6)):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4))


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d")))
    recipe = TrainOptions(epochs=2, batch_size=32).over(CORE_TRAINING)
    return Run(task, torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=recipe, training=True)


def changed(run, **options):
    method = DoubleRounding(DoubleRoundingConfig(**options))
    model = method.transform(model=net(), run=run)
    with torch.no_grad():  # as trained ones: the scale of the start is so wide that 2 bits are all 0
        for layer in switch_layers(model).values():
            layer.scale.mul_(0.1)
    return model, method


def test_middle_layers_switch_and_every_width_is_nested(run):
    model, method = changed(run)
    layers = switch_layers(model)
    assert list(layers) == ["3", "6"] and method.structure["norms"] == {"1": [], "4": ["3"], "7": ["3", "6"]}
    for width in (8, 6, 4, 2):
        switch(model, method.structure, width)
        assert {module.active for module in model.modules() if isinstance(module, SwitchNorm)} == {str(width)}
        assert len(layers["3"].weight().unique()) <= 2**width
    assert all(layer.nested() for layer in layers.values()) and layers["3"].width == 2


def one_step(run, model, method, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(
        [
            {"params": [p for n, p in model.named_parameters() if not n.endswith(".scale")]},
            {"params": [p for n, p in model.named_parameters() if n.endswith(".scale")]},
        ],
        lr=0.01,
    )
    step = Step(
        model, model, next(run.batches("train", 32, 32)), optimizer, run, 0, 0,
        lambda m, b: (run.task.loss(o := run.forward(m, b), b), o), lambda loss: loss.backward(),
    )  # fmt: skip
    return method.trainer.step(step)


def test_each_width_updates_its_own_norms_and_input_scales(run):
    model, method = changed(run, alrs="off")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = one_step(run, model, method)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for width in (8, 6, 4, 2):
        assert f"4.norms.{width}.weight" in moved and f"3.inputs.{width}.scale" in moved
    assert {"3.scale", "3.layer.weight", "0.weight"} <= moved and set(result.metrics) == {
        f"loss_{b}" for b in (8, 6, 4, 2)
    }
    assert isinstance(method.trainer, Trainer) and switch_layers(model)["3"].width == 8


@pytest.mark.parametrize(("alrs", "expected"), [("off", [0.1] * 3), ("ratio", [0.1, 0.01, 0.001])])
def test_rates_of_scales_follow_alrs(run, alrs, expected):
    _, method = changed(run, alrs=alrs)
    assert [method.trainer._scale_rate(0.1, shift, 0.04) for shift in (0, 2, 4)] == pytest.approx(expected)
    _, literal = changed(run)
    rates = [literal.trainer._scale_rate(0.1, shift, 0.04) for shift in (0, 2)]
    assert rates == pytest.approx([0.06, 0.006]) and literal.trainer._scale_rate(0.1, 0, 0.2) == 0.0


def test_an_accumulated_update_is_one_step_on_the_sum(run):
    model, method = changed(run, accumulate=True, bits=(4, 2))
    reference, other = changed(run, bits=(4, 2))
    batch = next(run.batches("train", 32, 32))
    reference.zero_grad()
    for width in (4, 2):
        switch(reference, other.structure, width)
        run.task.loss(run.forward(reference, batch), batch).backward()
    before = model[3].layer.weight.detach().clone()
    one_step(run, model, method)
    torch.testing.assert_close(
        (before - model[3].layer.weight.detach()) / 0.01, reference[3].layer.weight.grad, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("distill", ["self", "teacher"])
def test_distillation_adds_a_term(run, distill):
    model, method = changed(run, distill=distill, bits=(8, 2))
    plain, other = changed(run, bits=(8, 2))
    one_step(run, model, method)
    one_step(run, plain, other)
    assert not torch.equal(model[3].layer.weight, plain[3].layer.weight)


def test_the_supernet_draws_widths_and_the_search_meets_its_mean(run):
    model, method = changed(run, mixed=True, mixed_share=0.9, hessian_samples=64, target_avg_bits=5)
    assert set(method.structure["traces"]) == {"3", "6"}
    method.trainer._enter_supernet(model)
    assert torch.equal(model[4].norms["8_2"].weight, model[4].norms["2"].weight)
    torch.manual_seed(1)
    one_step(run, model, method)
    nets = subnets(model, method.config, method.structure)
    assert all(sum(found.values()) / 2 <= 5 for found in nets) and len(
        {tuple(found.values()) for found in nets}
    ) == len(nets)
    switch(model, method.structure, {"3": 8, "6": 2})
    assert (model[4].active, model[7].active) == ("8_8", "8_2")


def test_a_sensitivity_file_stands_for_the_measured_traces(run, tmp_path):
    layers = [{"layer": n, "parameters": 1, "values": {}, "hessian_trace": t} for n, t in (("3", 2.0), ("6", -1.0))]
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"model": "m", "data": "d", "samples": 1, "bits": [8], "layers": layers}))
    model, method = changed(run, mixed=True, target_avg_bits=5, sensitivity=file)
    count = dict(model.named_modules())["3"].layer.weight.numel()
    assert method.structure["traces"] == {"3": 2.0 * count, "6": 0.0}
    layers[0]["hessian_trace"] = None
    file.write_text(json.dumps({"model": "m", "data": "d", "samples": 1, "bits": [8], "layers": layers}))
    with pytest.raises(RequestError, match="the sensitivity file has no Hessian traces; run eff sensitivity --metric"):
        changed(run, mixed=True, target_avg_bits=5, sensitivity=file)


def test_a_stored_model_switches_at_run_time_and_the_file_has_one_byte_a_weight(tmp_path):
    recipe = Recipe(
        model=MODEL, data=DATA, methods=(MethodUse(name=EFF_PLUGIN, options={"exclude": []}),), device="cpu",
        train=TrainOptions(epochs=2, batch_size=64), export=("packed",),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    for file in ("model.pt", "model.packed.safetensors"):
        path = str(tmp_path / "run" / file)
        for width in (8, 6, 4, 2):
            found = evaluate(UseRequest(path, device="cpu", settings={"bits": width})).metrics.values
            assert found["width"].value == width
            assert found["accuracy"].value == pytest.approx(report.after.metrics.values[f"accuracy_{width}_bits"].value)
        with pytest.raises(RequestError, match="was not trained for 5 bits; trained are 8, 6, 4, 2"):
            evaluate(UseRequest(path, device="cpu", settings={"bits": 5}))
    weights = sum(row.numel() for name, row in _float_weights().items() if row.ndim > 1)
    assert report.after.metrics.values["code_bytes"].value == weights
    assert report.after.metrics.values["norm_bytes"].value == 4 * 2 * 2 * 8  # widths, numbers, bytes, channels
    written = export_model(
        UseRequest(str(tmp_path / "run" / "model.pt"), device="cpu", settings={"bits": 2}),
        ["safetensors"],
        tmp_path / "o",
    )
    assert written[0].bytes > 0


def _float_weights():
    from eff.testing.samples import tiny_cnn

    return dict(tiny_cnn().named_parameters())


def test_models_without_several_settings_refuse_to_switch(tmp_path):
    recipe = Recipe(model=MODEL, data=DATA, train=TrainOptions(epochs=1), device="cpu")
    apply(recipe, tmp_path / "plain")
    with pytest.raises(RequestError, match=r"has no settings to switch \(bits\)"):
        evaluate(UseRequest(str(tmp_path / "plain" / "model.pt"), device="cpu", settings={"bits": 4}))


def test_the_packed_file_gives_the_same_integers_and_outputs(run):
    model, method = changed(run)
    one_step(run, model, method)
    tensors, details = pack_state(model)
    again, _ = changed(run)
    again.load_state_dict(unpack_state(tensors, details))
    for one, other in zip(switch_layers(model).values(), switch_layers(again).values(), strict=True):
        assert torch.equal(one.stored(), other.stored())
    x = torch.rand(4, 1, 8, 8)
    for width in (8, 6, 4, 2):
        outputs = []
        for net in (model.eval(), again.eval()):
            switch(net, method.structure, width)
            outputs.append(net(x))
        assert torch.equal(*outputs)


def test_four_norms_take_as_much_of_the_file_as_one_in_float32(run):
    model, _ = changed(run)
    tensors, _ = pack_state(model)
    norms = [name for name in tensors if name.startswith(("1.", "4.", "7."))]
    assert norms == ["1.norms.8.weight", "4.norms.8.weight", "7.norms.8.weight"]
    assert sum(tensors[name].nbytes for name in norms) == sum(4 * 4 * channels for channels in (4, 6, 6))
    assert [name for name in tensors if name.startswith("3.inputs.")] == ["3.inputs.8.scale"]


@pytest.mark.parametrize("summand", [0.7, 1e6])  # the second is beyond float16 and is kept in float32
def test_a_norm_in_use_is_the_batch_norm_within_half_precision(summand):
    torch.manual_seed(0)
    norm = SwitchNorm(nn.BatchNorm2d(3), DoubleRoundingConfig(bits=(8, 2)))
    for entry in norm.norms.values():
        nn.init.uniform_(entry.weight, 0.5, 2)
        nn.init.uniform_(entry.bias, summand, 2 * summand)
        entry.running_mean.uniform_(-1, 1)
        entry.running_var.uniform_(0.5, 2)
    x = torch.randn(5, 3, 4, 4)
    found = norm.eval()(x)
    torch.testing.assert_close(found, norm.norms["8"](x), rtol=2e-3, atol=2e-3)
    model = nn.Sequential(norm)
    tensors, details = pack_state(model)
    model.load_state_dict(unpack_state(tensors, details))
    torch.testing.assert_close(norm(x), found, rtol=0 if summand < 1 else 1e-6, atol=0)


def test_norms_without_statistics_or_weights_stay_as_they_are(run):
    for made in (nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, affine=False)):
        norm = SwitchNorm(made, DoubleRoundingConfig(bits=(8, 2))).eval()
        x = torch.randn(5, 3, 4, 4)
        assert torch.equal(norm(x), norm.norms["8"](x)) and norm.packed("") == {}


def test_a_scale_that_was_never_initialised_stays_so_in_the_file(run):
    model, _ = changed(run)
    model[3].inputs["4"].initialised.fill_(False)
    found = unpack_state(*pack_state(model))
    assert [bool(found[f"3.inputs.{b}.initialised"]) for b in (8, 6, 4, 2)] == [True, True, False, True]
    assert torch.equal(found["3.inputs.6.scale"], model[3].inputs["6"].scale.detach())


def test_the_claim_of_the_file_sums_files_of_one_width(monkeypatch):
    def measured(source, seed, method, options):
        size = {"quant_lsq": 1000}.get(method, 100 * sum(options.get("bits", (8, 2))))
        return size, {"code_bytes": Metric(value=5), "norm_bytes": Metric(value=7)}

    monkeypatch.setattr(claims, "_file", measured)
    assert dict(claims._files("net", "zoo:digits_cnn", 0)) == {
        "net_all": 1000, "net_all_code": 5, "net_all_norm": 7, "net_8_alone": 800, "net_8_lsq": 1000,
        "net_four_files": 2000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": [8, 8]}, "bits must name different widths"),
        ({"bits": [9, 4]}, "bits must be between 2 and 8"),
        ({"act_bits": [8]}, "act_bits has 1 widths, bits has 4"),
        ({"mixed": True, "bits": [4, 2], "target_avg_bits": 6}, "target_avg_bits is 6, outside the widths 2 to 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_double_rounding", DoubleRoundingConfig, options)


def test_unfit_requests_are_refused(run):
    model, method = changed(run)
    model[3].inputs["4"].initialised.fill_(False)
    switch(model, method.structure, 4)
    with pytest.raises(RunError, match=r"3\.inputs\.4: used before it was initialised"):
        model(torch.rand(1, 1, 8, 8))
    with pytest.raises(RequestError, match="has no setting 'scale' to switch; it has bits"):
        method.switch(model, {"scale": 1})
    run.train = run.train.model_copy(update={"accumulate": 2})
    with pytest.raises(RequestError, match="leave out --accumulate"):
        changed(run)
