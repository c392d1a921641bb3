"""quant_adapt: formats against fractions, the switching rules by hand, the master copy, the performance model."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import ConfigError, NonFiniteLossError, RequestError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run, Step
from eff.schemas import TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.training import make_optimizer
from eff_quant_adapt.config import AdaPTConfig
from eff_quant_adapt.cost import Cost, multiply_adds, overhead, size_ratio
from eff_quant_adapt.formats import (
    State,
    codes_of,
    divergence,
    next_strategy,
    push_down,
    push_up,
    quantize,
    smallest_lossless,
)
from eff_quant_adapt.layers import FixedPointLayer, fixed_layers, initialise, insert, owners
from eff_quant_adapt.plugin import AdaPT
from eff_quant_adapt.training import Trainer
from eff_quant_kit.packed import pack_state, unpack_state

EFF_PLUGIN = "quant_adapt"


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 4, 4), classes=("a", "b", "c")))
    return Run(task, torch.device("cpu"), train=TrainOptions(lr=0.1, momentum=0.9, weight_decay=0.0, optimizer="sgd"))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@settings(max_examples=200, deadline=None)
@given(value=st.floats(-300, 300, width=32), wl=st.integers(2, 32), fl=st.integers(0, 20))
def test_rounding_to_nearest_is_the_nearest_code_in_range(value, wl, fl):
    if fl >= wl:
        return
    code = Fraction(int(codes_of(torch.tensor([value]), wl, fl)))
    exact = Fraction(value) * 2**fl
    clipped = max(-(Fraction(2) ** (wl - 1)), min(exact, Fraction(2) ** (wl - 1) - 1))
    assert abs(code - clipped) <= Fraction(1, 2)


def test_stochastic_rounding_is_unbiased_and_stays_on_the_grid():
    torch.manual_seed(0)
    x = torch.full((200_000,), 0.3)
    q = quantize(x, 8, 4)
    assert set((q * 16).tolist()) == {4.0, 5.0} and abs(float(q.mean()) - 0.3) < 1e-3
    assert quantize(torch.tensor([100.0, -100.0]), 8, 4).tolist() == [7.9375, -8.0]


def test_the_divergence_is_the_one_through_numpy():
    torch.manual_seed(0)
    w = torch.randn(500)
    q = quantize(w, 6, 2, stochastic=False)
    edges = np.histogram_bin_edges(w.numpy(), 40)
    p = np.histogram(w.numpy(), edges)[0] / 500
    other = np.histogram(q.clamp(w.min(), w.max()).numpy(), edges)[0] / 500
    expected = sum(a * math.log(a / (b + 1e-12)) for a, b in zip(p, other, strict=True) if a > 0)
    assert divergence(w, q, 40) == pytest.approx(expected, rel=1e-3)
    assert divergence(w, w, 40) == pytest.approx(0, abs=1e-9)


@given(low=st.integers(0, 30), high=st.integers(0, 32), threshold=st.integers(-2, 34))
def test_bisection_finds_the_smallest_lossless_value(low, high, threshold):
    found = smallest_lossless(low, high, lambda value: value < threshold)
    assert found == (max(low, high) if high <= low or threshold > high else max(low, threshold))


def test_push_down_finds_the_grid_that_the_weights_lie_on():
    torch.manual_seed(0)
    w = (torch.randn(2000) * 2**6).round().clamp(-250, 250) / 2**6  # needs 6 bits of fraction, and 9 in all
    word, fraction = push_down(w, 20, 12, 4000, AdaPTConfig())
    assert (word, fraction) == (9, 6)
    assert push_down(w, 8, 4, 4000, AdaPTConfig()) == (8, 4)  # lossy already: kept
    assert push_down(torch.ones(5), 20, 12, 50, AdaPTConfig()) == (5, 4)
    assert push_down(w, 20, 12, 4000, AdaPTConfig(kl_rounding="stochastic"))[1] == 6


@pytest.mark.parametrize(
    ("diversity", "strategy", "expected"),
    [
        # l = ln(e^1.5) - 1 = 0.5: s1 = 4, s2 = 8 - 5 = 3; FL 8, WL max(8, 8) + 1 = 9, then at least FL + 8
        (math.exp(1.5), "min", (16, 8)), (math.exp(1.5), "mean", (17, 9)), (math.exp(1.5), "max", (17, 9)),
        (math.exp(0.5), "max", (14, 6)),  # l below 0: one bit
        (math.inf, "max", (14, 6)),
        (math.exp(3.0), "max", (32, 24)),  # s2 = 27: FL 32, cut to 24 by the buffer
    ],
)  # fmt: skip
def test_push_up_by_hand(diversity, strategy, expected):
    assert push_up(8, 5, diversity, strategy, AdaPTConfig()) == expected


def test_push_up_can_follow_the_printed_formula_or_be_left_out():
    assert push_up(8, 5, math.exp(0.5), "min", AdaPTConfig(log_shift=0)) == (16, 8)
    assert push_up(8, 5, math.exp(1.5), "min", AdaPTConfig(push_up=False)) == (8, 5)


def test_diversity_lookback_and_resolution_by_hand():
    state = State(8, 4, 25, 50)
    assert state.diversity() == math.inf
    state.collect(torch.tensor([3.0, 0.0]))
    state.collect(torch.tensor([0.0, 5.0]))
    assert state.diversity() == pytest.approx(2 / math.sqrt(2))
    state.adjust(AdaPTConfig())  # 100 / 1.414 = 70.7
    assert (state.lookback, state.bins) == (71, 50)
    state.collect(torch.zeros(2))
    assert state.count == 3 and bool(torch.isfinite(state.total).all())
    aligned = State(8, 4, 25, 50)
    aligned.collect(torch.ones(2))
    for _ in range(3):
        aligned.adjust(AdaPTConfig())
    assert (aligned.lookback, aligned.bins) == (100, 53)
    half = State(8, 4, 25, 50)
    half.collect(torch.ones(2))
    half.adjust(AdaPTConfig(gamma=0.5))
    assert half.lookback == 63


def test_the_strategy_escalates_while_the_loss_does_not_fall():
    assert next_strategy("min", [], 1.0) == "min"
    assert next_strategy("min", [1.0, 1.0], 1.0) == "mean" and next_strategy("max", [1.0], 2.0) == "max"
    assert next_strategy("max", [1.0, 1.0], 0.9) == "min"


def take_steps(run, model, config, count=1, **batch):
    trainer = Trainer(model, config, run)
    optimizer = make_optimizer(
        model, run.train, type("None", (), {"chosen": (), "look_up": lambda *a: torch.optim.SGD})()
    )
    for index in range(count):
        model.zero_grad()
        step = Step(
            model, model, batch, optimizer, run, index, 0,
            lambda m, b: (nn.functional.cross_entropy(m(b["x"]), b["y"]), None), lambda loss: loss.backward(),
        )  # fmt: skip
        trainer.step(step)
    return trainer


def batch():
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.rand(8, 1, 4, 4, generator=generator), "y": torch.randint(3, (8,), generator=generator)}


def test_an_update_goes_to_the_master_copy_and_the_model_shows_it_quantized(run):
    config = AdaPTConfig(wl_init=16, fl_init=8, quant_grads=False, quant_inputs=False, quant_outputs=False, l1=0.0)
    model = insert(net(), config)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(1)
    trainer = take_steps(run, model, config, **batch())
    for name, parameter in model.named_parameters():
        moved = trainer.master[name] - expected[name]
        assert float(moved.norm()) == pytest.approx(0.1, rel=1e-3)  # lr times a gradient of norm 1
        assert float((parameter - trainer.master[name]).abs().max()) <= 2.0**-8
        assert torch.equal((parameter * 2**8).round(), parameter * 2**8)


def test_small_updates_accumulate_in_the_master_copy(run):
    run.train = run.train.model_copy(update={"lr": 1e-4, "momentum": 0.0})
    config = AdaPTConfig(adapt=False)
    model = insert(net(), config)
    trainer = take_steps(run, model, config, 1, **batch())
    assert 0 < float((trainer.master["0.layer.weight"] - net()[0].weight).abs().max()) < 2.0**-4


def test_formats_switch_reach_the_buffers_and_are_logged(run):
    config = AdaPTConfig(lb_min=2, lb_max=2, wl_init=16, fl_init=8)
    model = insert(net(), config)
    trainer = take_steps(run, model, config, 4, **batch())
    assert [row[0] for row in trainer.history] == [0, 0, 2, 2, 4, 4]
    for place, (name, layer) in enumerate(fixed_layers(model).items()):
        assert layer.lengths == (trainer.states[name].wl, trainer.states[name].fl)
        assert list(layer.lengths) == [row for row in trainer.history if row[1] == place][-1][2:4]
    assert len(trainer.word_lengths) == 4


def test_one_dimensional_parameters_take_the_format_before_them():
    model = insert(net(), AdaPTConfig())
    assert owners(model) == {
        "0.layer.weight": "0", "0.layer.bias": "0", "1.weight": "0", "1.bias": "0", "4.layer.weight": "4", "4.layer.bias": "4",
    }  # fmt: skip


def test_evaluation_rounds_to_nearest_and_training_at_random():
    layer = FixedPointLayer(nn.Linear(4, 3), AdaPTConfig())
    x = torch.full((2, 4), 0.3)
    assert torch.equal(layer.eval()(x), layer(x))
    torch.manual_seed(0)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.layer.weight.sum(0).expand(2, 4))  # straight through


def test_the_initialisation_has_its_deviation_and_its_cut():
    torch.manual_seed(0)
    model = insert(nn.Sequential(nn.Linear(400, 300)), AdaPTConfig())
    initialise(model, 0.5)
    weight = model[0].layer.weight.detach()
    bound = math.sqrt(3 * 0.5 / 400)
    normal = torch.distributions.Normal(0, 1)
    cut = math.sqrt(3)
    inside = 2 * float(normal.cdf(torch.tensor(cut))) - 1
    variance = 1 - 2 * cut * math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) / inside
    assert float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(math.sqrt(0.5 / 400 * variance), rel=0.02)


def test_the_performance_model_by_hand(run):
    model = insert(net(), AdaPTConfig())
    assert multiply_adds(model, run) == {"0": 4 * 9 * 16, "4": 64 * 3}
    layers = fixed_layers(model)
    state = State(12, 4, 50, 60)
    # T = 4 * 9, b = 2 log2 4 = 4: 32 (3 * 36 * 4 * 60 * 0.5 + 51 * 36 + 1) / 50 / 2
    assert overhead(layers["0"], state, 0.5, 2) == pytest.approx(32 * (12960 + 1836 + 1) / 100)
    with torch.no_grad():
        layers["0"].layer.weight.zero_()
        layers["4"].layer.weight.fill_(1.0)
    assert size_ratio(layers) == pytest.approx(192 * 8 / (32 * (192 + 36)))
    cost = Cost(multiply_adds(model, run))
    assert cost.inference_speedup(layers) == pytest.approx(32 * (576 + 192) / (192 * 8))
    assert cost.training_speedup() == 1.0
    cost.note(layers, {name: State(8, 4, 25, 50) for name in layers}, 1)
    assert cost.training_speedup() == pytest.approx(2 * cost.full / (cost.quantized + cost.full))


def test_the_packed_file_holds_the_codes(run):
    model = insert(net(), AdaPTConfig())
    Trainer(model, AdaPTConfig(), run)
    model.eval()
    tensors, details = pack_state(model)
    again = insert(net(), AdaPTConfig()).eval()
    again.load_state_dict(unpack_state(tensors, details))
    x = batch()["x"]
    assert torch.equal(again(x), model(x)) and tensors["4.layer.weight"].numel() <= 192


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fl_init": 8}, "fl_init must be below wl_init, got 8 and 8"),
        ({"lb_min": 200}, "lb_min is 200, above lb_max, which is 100"),
        ({"res_min": 1}, "res_min must be at least 2, got 1"),
        ({"wl_init": 33}, "wl_init must be between 2 and 32, got 33"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_adapt", AdaPTConfig, options)


def test_unfit_models_and_requests_are_refused(run):
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        AdaPT().transform(model=nn.Sequential(nn.ReLU()), run=run)
    run.precision = "bf16"
    with pytest.raises(RequestError, match="--precision bf16 is a second precision"):
        AdaPT().transform(model=net(), run=run)


def test_a_loss_that_is_not_finite_stops_with_the_formats_and_missing_gradients_keep_theirs(run):
    config = AdaPTConfig(lb_min=1, lb_max=1)
    model = insert(net(), config)
    model[0].layer.requires_grad_(False)
    trainer = take_steps(run, model, config, 1, **batch())
    assert trainer.states["0"].wl == 8 and trainer.states["4"].wl != 8
    broken = {**batch(), "x": torch.full((8, 1, 4, 4), float("nan"))}
    with pytest.raises(NonFiniteLossError, match=r"the loss is nan with the formats 0 <8, 4>, 4 <8, 4>"):
        take_steps(run, insert(net(), config), config, 1, **broken)
