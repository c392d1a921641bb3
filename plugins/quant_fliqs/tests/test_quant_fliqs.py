"""quant_fliqs: formats against tables and torch's float8, costs by hand, the policy against autograd, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.data import load_data
from eff.errors import ConfigError, RequestError
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, MODEL, blobs
from eff.use import UseRequest, evaluate
from eff_quant_fliqs import claims
from eff_quant_fliqs.config import FLIQSConfig
from eff_quant_fliqs.formats import best_share, magnitude, parse, quantize, scale_of
from eff_quant_fliqs.layers import FormatLayer, check_target, cost, decisions, format_layers, insert, set_choices
from eff_quant_fliqs.plugin import FLIQS
from eff_quant_fliqs.policy import Policy, entropy_weight, reward
from eff_quant_fliqs.report import draw
from eff_quant_kit.packed import pack_state, unpack_state

EFF_PLUGIN = "quant_fliqs"
NAMES = ("int2", "int4", "int8", "e2m1", "e3m0", "e3m2", "e4m3", "e5m2", "e3m4", "e1m2")


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.mark.parametrize(
    ("name", "largest", "bits"),
    [("e2m1", 6, 4), ("e3m0", 16, 4), ("e3m2", 28, 6), ("e4m3", 448, 8), ("e5m2", 57344, 8), ("int4", 7, 4)],
)
def test_largest_magnitudes_are_those_of_the_paper(name, largest, bits):
    assert parse(name).largest == largest and parse(name).bits == bits


def test_fp4_has_its_fifteen_values():
    assert parse("e2m1").levels().tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert parse("int2").levels().tolist() == [-2, -1, 0, 1] and parse("int2").levels(True).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_fp8_is_torch_float8(name, dtype):
    torch.manual_seed(0)
    format = parse(name)
    u = torch.cat(
        [torch.randn(5000) * 10.0 ** torch.randint(-6, 3, (5000,)), torch.tensor([0.0, 448.0, -0.0019, 1e-9])]
    )
    u = u.clamp(-format.largest, format.largest)
    assert torch.equal(format.round(u), u.to(dtype).float())


@settings(max_examples=200, deadline=None)
@given(value=st.floats(-500, 500, width=32), name=st.sampled_from(NAMES))
def test_rounding_takes_a_nearest_level(value, name):
    format = parse(name)
    levels = format.levels()
    found = float(format.round(torch.tensor(value)))
    assert found in levels.tolist()
    assert abs(found - value) == pytest.approx(float((levels - value).abs().min()), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_magnitude_is_exact_zeros_stay_and_the_gradient_passes(name):
    torch.manual_seed(0)
    x = torch.randn(4, 30).requires_grad_()
    format = parse(name)
    y = quantize(x, format, scale_of(magnitude(x, (1,)), format))
    torch.testing.assert_close(y.detach().abs().amax(1), x.detach().abs().amax(1))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    zeros = torch.zeros(3)
    assert torch.equal(quantize(zeros, format, scale_of(magnitude(zeros, None), format)), zeros)


def test_the_best_share_is_found_by_trying():
    torch.manual_seed(0)
    w = torch.randn(1, 200)
    w = torch.randn(1, 2000)
    w[0, 0] = 6
    format = parse("int4")
    share = best_share(w, format, None, False)

    def error(part):
        return float((quantize(w, format, scale_of(magnitude(w, None) * part, format)) - w).square().sum())

    assert share < 1 and all(error(share) <= error(index / 10) for index in range(1, 11))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d")))
    recipe = TrainOptions(epochs=2, batch_size=32).over(CORE_TRAINING)
    return Run(task, torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=recipe, training=True)


def inserted(run, **options):
    structure = {}
    config = FLIQSConfig(**options)
    return insert(net(), config, structure, run), structure, config


def test_costs_by_hand(run):
    _, structure, config = inserted(run)
    assert structure["macs"] == {"0": 36 * 64, "3": 6 * 2 * 9 * 16, "6": 96 * 8, "8": 32}
    assert structure["fixed"] == ["0", "8"] and structure["decisions"] == [["3"], ["6"]]
    whole = 64 * (2304 + 1728 + 768 + 32)
    assert cost(structure, config, [0, 1]) == pytest.approx((64 * (2304 + 768 + 32) + 16 * 1728) / whole)
    memory = FLIQSConfig(cost_type="memory")
    assert cost(structure, memory, [0, 0]) == pytest.approx(
        (8 * (36 + 32) + 4 * (108 + 768)) / (8 * (36 + 32 + 108 + 768))
    )
    assert cost(structure, config, [1, 1]) == 1.0 and cost(structure, FLIQSConfig(weight_only=True), [1, 1]) == 1.0


def test_a_layer_computes_with_its_format_and_first_and_last_stay_at_int8(run):
    model, structure, _ = inserted(run, formats=("int2", "e2m1"), per_channel=False)
    assert [layer.format.name for layer in format_layers(model).values()] == ["int8", "int2", "int2", "int8"]
    set_choices(model, structure, [1, 0])
    layer = model[3]
    x = torch.rand(2, 4, 8, 8)
    format = parse("e2m1")
    quantized = [quantize(v, format, scale_of(magnitude(v, None), format)) for v in (x, layer.layer.weight)]
    expected = nn.functional.conv2d(quantized[0], quantized[1], layer.layer.bias, 2, 1, 1, 2)
    torch.testing.assert_close(layer(x), expected)


def test_blocks_share_a_decision(run):
    _, structure, _ = inserted(run, granularity="single")
    assert structure["decisions"] == [["3", "6"]]
    assert decisions(["a.q", "b.q", "c"], FLIQSConfig(granularity="block", block_patterns=(r".*\.q", "c"))) == [
        ["a.q", "b.q"],
        ["c"],
    ]
    for patterns, what in (((r".*\.q",), "fits no pattern"), ((".*", "c"), "fits 2 patterns")):
        with pytest.raises(ConfigError, match=f"layer 'c' {what}"):
            decisions(["a.q", "c"], FLIQSConfig(granularity="block", block_patterns=patterns))


@pytest.mark.parametrize(
    ("kind", "quality", "ratio", "expected"),
    [
        ("abs", -1.0, 1.5, -1.5), ("abs", -1.0, 0.5, -1.5), ("abs_one_sided", -1.0, 0.5, -1.0),
        ("soft_exp", -1.0, 2.0, -2.0), ("soft_exp", 0.8, 2.0, 0.4), ("hard_exp", -1.0, 0.5, -1.0), ("hard_exp", 0.8, 0.5, 0.8),
    ],
)  # fmt: skip
def test_rewards_by_hand(kind, quality, ratio, expected):
    assert reward(quality, ratio, FLIQSConfig(reward=kind)) == pytest.approx(expected)


def test_the_entropy_weight_rises_after_the_delay():
    config = FLIQSConfig()
    assert entropy_weight(10, 10, 30, config) == 0 and entropy_weight(30, 10, 30, config) == pytest.approx(0.1)
    assert entropy_weight(20, 10, 30, config) == pytest.approx(0.05)
    assert [entropy_weight(t, 10, 30, FLIQSConfig(entropy_schedule="step")) for t in (19, 20)] == [0, 0.1]
    assert entropy_weight(15, 10, 30, FLIQSConfig(entropy_schedule="linear")) == pytest.approx(0.025)


def test_an_update_follows_reinforce_and_penalises_entropy():
    config = FLIQSConfig(policy_lr=1e-3, ema=0.5)
    policy = Policy(2, 3, config)
    policy.update([0, 1], 1.0, 0.0)
    assert (
        policy.baseline == 1.0 and not policy.optimizer.state[policy.logits]["exp_avg"].any()
    )  # the first advantage is 0
    before = policy.logits.detach().clone()
    policy.update([0, 1], 3.0, 0.0)
    assert policy.baseline == 2.0
    moved = policy.logits.detach() - before
    assert float(moved[0, 0]) > 0 > float(moved[0, 1]) and float(moved[1, 1]) > 0
    sharp = Policy(1, 2, FLIQSConfig())
    with torch.no_grad():
        sharp.logits.copy_(torch.tensor([[0.6, 0.4]]))
    entropy = float(sharp.entropy())
    assert entropy < math.log(2)
    for _ in range(5):
        sharp.update([0], 0.0, 1.0)
    assert float(sharp.entropy()) < entropy
    assert torch.equal(Policy(1, 2, config).probabilities(), torch.tensor([[0.5, 0.5]]))


def test_the_policy_finds_the_better_arm():
    torch.manual_seed(0)
    policy = Policy(1, 3, FLIQSConfig())
    for _ in range(200):
        choice = policy.sample(uniform=False)
        policy.update(choice, float(choice[0] == 2), 0.0)
    assert policy.best() == [2] and float(policy.probabilities()[0, 2].detach()) > 0.9


def test_a_search_ends_with_formats_that_a_file_holds(tmp_path):
    options = {"skip": [], "formats": ["int4", "e2m1", "e4m3"], "target_cost": 0.5, "clip": 0.9}
    recipe = Recipe(
        model=MODEL, data=DATA, methods=(MethodUse(name=EFF_PLUGIN, options=options),), device="cpu",
        train=TrainOptions(epochs=3, batch_size=64), export=("packed",),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    rows = report.after.metrics.tables["formats"]
    assert all(row["format"] in options["formats"] and "p(e2m1)" in row for row in rows)
    packed = evaluate(UseRequest(str(tmp_path / "run" / "model.packed.safetensors"), device="cpu"))
    for key in ("accuracy", "relative_cost"):
        assert packed.metrics.values[key].value == pytest.approx(report.after.metrics.values[key].value)


def test_the_plot_names_every_format_in_its_legend(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="plots need matplotlib")
    monkeypatch.setattr(pyplot, "close", lambda figure: None)
    formats = ["int4", "e2m1", "e3m0", "int8", "e4m3", "e5m2"]
    points = [("found", 0.3, 0.5), *((name, 0.3, 0.5) for name in formats), ("random", 0.4, 0.4)]
    draw(points, 0.3, tmp_path / "pareto.png")
    (legend,) = pyplot.gcf().legends
    monkeypatch.undo()
    pyplot.close("all")
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["random formats", *formats, "front", "found by the policy", "target"]


def test_the_floating_claim_searches_at_the_costs_of_4_and_8_bits(monkeypatch):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    monkeypatch.setattr(claims, "load_data", lambda spec: load_data(f"{spec}&train=128&test=64"))
    monkeypatch.setattr(claims, "EPOCHS", 1)
    monkeypatch.setattr(claims, "FLOATING", ("int4", "e4m3", "int8"))
    found = claims._floating(0)
    named = {side for check in FLIQS.claims[1].checks for side in (check.left, check.right) if isinstance(side, str)}
    assert named - set(found) == {"e2m1"}
    assert found["uniform_4_cost"] < 0.4 and all(
        found["uniform_4_cost"] <= found[f"searched_{b}_cost"] <= 1 for b in (4, 6, 8)
    )


@pytest.mark.parametrize("name", NAMES)
def test_packed_codes_give_the_same_outputs(name):
    torch.manual_seed(0)

    def made():
        return nn.Sequential(FormatLayer(nn.Linear(10, 4), (parse(name),), FLIQSConfig(formats=(name,), clip=0.7)))

    model, again = made(), made()
    model[0].fix()
    tensors, details = pack_state(model)
    assert tensors["0.layer.weight"].numel() == -(-40 * parse(name).bits // 8)
    again.load_state_dict(unpack_state(tensors, details))
    x = torch.randn(3, 10)
    torch.testing.assert_close(again(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["int9"]}, "'int9' is none; write int2 to int8, or eXmY"),
        ({"formats": ["e5m5"]}, "'e5m5' is none"),
        ({"formats": ["int4", "int4"]}, "formats must name different formats"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"granularity": "block"}, "granularity=block and block_patterns belong together"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_fliqs", FLIQSConfig, options)


def test_unfit_requests_are_refused(run):
    _, structure, _ = inserted(run)
    with pytest.raises(RequestError, match=r"target_cost is 0\.1; these formats reach 0\.61.* to 1 of the cost"):
        check_target(structure, FLIQSConfig(target_cost=0.1))
    run.training = False
    with pytest.raises(RequestError, match="found while the network trains; use --epochs above 0"):
        FLIQS().transform(model=net(), run=run)
    run.training = True
    FLIQS(FLIQSConfig(formats=("int8",), target_cost=1.0)).transform(model=net(), run=run)
    assert any("with one format there is nothing to search" in line for line in run.log.warnings)
