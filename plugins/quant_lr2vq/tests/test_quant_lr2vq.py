"""LR2VQ: the spectrum's arithmetic, the two-layer block, DKM, the file, and what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from eff.errors import ConfigError, RequestError, UnsupportedModelError
from eff.run import Run
from eff.runner import apply
from eff.schemas import CORE_TRAINING, DataSpec, MethodUse, Recipe, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, MODEL, TinyCNN, blobs
from eff.use import UseRequest, evaluate
from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.codebooks import nearest
from eff_quant_lr2vq.block import Coded, LowRank, from_groups, to_groups
from eff_quant_lr2vq.config import LR2VQConfig
from eff_quant_lr2vq.dkm import attention, dkm, straight_through, temperature
from eff_quant_lr2vq.insert import blocks
from eff_quant_lr2vq.plugin import LR2VQ
from eff_quant_lr2vq.rank import approximation_error, knee, measured_errors, predicted_errors, spectrum, water_filling
from eff_quant_lr2vq.report import layer_bits

EFF_PLUGIN = "quant_lr2vq"
SMALL = {"m": 4, "k": 8, "min_params": 100}


def test_contract(eff_contract_check):
    eff_contract_check()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def run():
    options = ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d"), mean=(0.3,), std=(0.25,))
    torch.manual_seed(0)
    return Run(Classification(options), torch.device("cpu"), data=blobs(DataSpec.parse(DATA)), train=CORE_TRAINING)


def decaying(rate, m=16):
    return [rate**index for index in range(m)]


@pytest.mark.parametrize(("d", "total"), [(2, 3.09), (4, 2.27), (6, 2.03), (8, 1.99), (16, 1.99)])
def test_water_filling_predicts_the_known_errors_of_decaying_spectra(d, total):
    assert predicted_errors(decaying(0.8), 64)[d - 1] == pytest.approx(total, abs=0.006)


@pytest.mark.parametrize(("rate", "d"), [(0.6, 5), (0.8, 6), (0.95, 11)])
def test_the_knee_is_where_it_is_known_to_be(rate, d):
    assert knee(predicted_errors(decaying(rate), 64), 0.02) == d


@settings(deadline=None)
@given(
    values=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12),
    bits=st.floats(0, 12),
)
def test_water_filling_agrees_with_bisection_for_the_water_level(values, bits):
    values = sorted(values, reverse=True)
    variances = np.array(values)
    low, high = -60.0, np.log2(variances[0])
    for _ in range(200):
        middle = (low + high) / 2
        rate = np.maximum(0, 0.5 * (np.log2(variances) - middle)).sum()
        low, high = (middle, high) if rate > bits else (low, middle)
    assert water_filling(values, bits) == pytest.approx(np.minimum(2.0**high, variances).sum(), rel=1e-6)


def test_dimensions_without_power_cost_nothing():
    assert water_filling([1.0, 0.0, 0.0], 2) == pytest.approx(2**-4)
    assert water_filling([0.0, 0.0], 2) == 0
    assert knee(predicted_errors([4.0, 1.0, 0.0, 0.0], 16), 0.0) <= 2


@settings(max_examples=20, deadline=None)
@given(m=st.sampled_from([2, 4, 6]), d=st.integers(1, 6), seed=st.integers(0, 99))
def test_the_first_eigenvectors_are_the_least_squares_optimum(m, d, seed):
    d, s = min(d, m), normal(40, m, seed=seed)
    eigenvalues, vectors = spectrum(s)
    p = vectors[:d]
    error = (s - s @ p.t() @ p).square().sum() / len(s)
    tail = torch.linalg.svdvals(s)[d:].square().sum() / len(s)
    assert float(error) == pytest.approx(float(tail), abs=1e-9)
    assert approximation_error(eigenvalues.tolist(), d) == pytest.approx(float(tail), abs=1e-9)
    torch.testing.assert_close(p @ p.t(), torch.eye(d, dtype=p.dtype))


def test_kmeans_at_every_dimension_falls_like_the_prediction():
    rates = torch.tensor(decaying(0.6, 6), dtype=torch.float64).sqrt()
    s = normal(2000, 6) * rates
    errors = measured_errors(s, 16, 20, torch.Generator().manual_seed(0))
    predicted = predicted_errors(spectrum(s)[0].tolist(), 16)
    assert errors[0] > errors[1] > errors[2]
    # a Gaussian source is coded in blocks without end; k-means has one: within 35 %, never below
    assert all(p <= e <= 1.35 * p for e, p in zip(errors, predicted, strict=True))


def test_attention_is_the_softmax_of_distances_and_rounds_are_weighted_means():
    b, c = normal(6, 3), normal(4, 3, seed=1)
    distances = torch.cdist(b, c)
    expected = torch.exp(-distances / 0.3) / torch.exp(-distances / 0.3).sum(1, keepdim=True)
    torch.testing.assert_close(attention(b, c, 0.3), expected, atol=1e-6, rtol=1e-6)
    clustered, moved = dkm(b, c, 0.3, rounds=1, eps=1e-9)
    means = torch.stack([sum(expected[n, j] * b[n] for n in range(6)) / expected[:, j].sum() for j in range(4)])
    torch.testing.assert_close(moved, means, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(clustered, expected @ means, atol=1e-6, rtol=1e-6)


def test_the_gradient_runs_through_all_rounds():
    b, c = normal(7, 2).requires_grad_(), normal(3, 2, seed=1)
    assert torch.autograd.gradcheck(lambda b: dkm(b, c, 0.5, 3, 1e-12)[0], b)


def test_a_cold_attention_is_the_nearest_codeword_and_equal_points_have_a_finite_slope():
    b, c = normal(20, 3), normal(4, 3, seed=1)
    clustered, moved = dkm(b, c, 1e-6, 1, 1e-9)
    torch.testing.assert_close(clustered, moved[nearest(b, c)[1][:, 0]])
    same = torch.ones(4, 2, requires_grad=True)
    dkm(same, torch.ones(2, 2), 0.1, 3, 1e-9)[0].sum().backward()
    assert bool(torch.isfinite(same.grad).all())


def test_a_codeword_nobody_attends_to_moves_to_the_worst_sub_vector():
    b = torch.tensor([[0.0], [0.1], [5.0]])
    _, c = dkm(b, torch.tensor([[0.0], [100.0]]), 0.01, 1, 1e-9)
    assert c[1].item() == 5.0


def test_straight_through_gives_a_codeword_the_sum_of_its_members_gradients():
    b = torch.tensor([[0.0], [0.2], [4.0]], requires_grad=True)
    c = torch.tensor([[0.1], [5.0]], requires_grad=True)
    out = straight_through(b, c)
    torch.testing.assert_close(out, torch.tensor([[0.1], [0.1], [5.0]]))
    (out * torch.tensor([[1.0], [2.0], [3.0]])).sum().backward()
    assert c.grad.tolist() == [[3.0], [3.0]] and b.grad.tolist() == [[1.0], [2.0], [3.0]]


def test_the_temperature_falls_along_a_cosine():
    assert [temperature(p, 0.5, 0.02) for p in (0, 0.5, 1, 2)] == pytest.approx([0.5, 0.26, 0.02, 0.02])


LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=2, bias=False), (2, 8, 6, 6)),
    "conv1d": (nn.Conv1d(4, 8, 3, dilation=2), (2, 4, 9)),
    "linear": (nn.Linear(8, 12), (2, 3, 8)),
}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("d", [2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_block_is_the_layer_with_the_projected_weight(kind, d, axis):
    layer, shape = LAYERS[kind]
    m = 4 if axis == "out" or kind != "conv" else 2
    layer, d = layer.double(), min(d, m)
    config = LR2VQConfig(m=m, k=4, group_axis=axis)
    block, x = LowRank(layer, m, d, 4, config), normal(*shape)
    s = to_groups(layer.weight.detach(), m, axis)
    torch.testing.assert_close(from_groups(s, axis), layer.weight.detach())
    p = spectrum(s.reshape(-1, m))[1][:d]
    dense = LAYERS[kind][0]
    weight = from_groups(s @ p.t() @ p, axis)
    expected = (
        nn.functional.linear(x, weight, dense.bias) if kind == "linear" else dense._conv_forward(x, weight, dense.bias)
    )
    torch.testing.assert_close(block(x), expected)
    if d == m:
        assert block.projection is None
    block.start_clustering(torch.Generator().manual_seed(0))
    block.eval()
    hard = block.harden()
    assert type(hard) is (CodebookLinear if kind == "linear" and axis == "in" else Coded)
    torch.testing.assert_close(hard(x.float() if False else x.to(hard.codebook.dtype)), block(x), atol=2e-2, rtol=2e-2)


def test_making_the_projection_orthonormal_does_not_change_the_weight():
    block = LowRank(nn.Conv2d(4, 8, 3).double(), 4, 2, 4, LR2VQConfig(m=4, k=4))
    with torch.no_grad():
        block.projection.mul_(3).add_(0.2)
    block.codebook.data = normal(4, 2)
    before, words = block.weight(), block.codebook @ block.projection
    block.orthonormalise()
    torch.testing.assert_close(block.weight(), before)
    torch.testing.assert_close(block.codebook @ block.projection, words)
    torch.testing.assert_close(block.projection @ block.projection.t(), torch.eye(2, dtype=torch.float64))


def transformed(run, model=None, **options):
    method = LR2VQ(LR2VQConfig(**{**SMALL, **options}))
    return method.transform(model=model or TinyCNN(), run=run), method


def test_first_last_and_small_layers_stay_float(run):
    model, _ = transformed(run)
    assert set(blocks(model)) == {"conv2", "conv3"}
    model, _ = transformed(run, skip=("conv3",))
    assert set(blocks(model)) == {"conv2"}  # conv1 has 72 weights, fc 32


def test_a_fixed_dimension_is_taken_and_auto_takes_the_knee(run):
    _, method = transformed(run, d_tilde=3)
    assert {plan["d"] for plan in method.structure["layers"].values()} == {3}
    for estimator in ("waterfill", "empirical"):
        _, method = transformed(run, estimator=estimator)
        for plan in method.structure["layers"].values():
            assert plan["d"] == knee(plan["predicted"], 0.02) and len(plan["predicted"]) == 4


def test_the_codebook_is_reduced_where_there_are_few_sub_vectors(run):
    run.log.warn = (warned := []).append
    _, method = transformed(run, k=256)
    assert method.structure["layers"]["conv2"]["k"] == 144 // 4
    assert warned[0] == "quant_lr2vq: 'conv2' has 144 sub-vectors; its codebook is reduced from 256 to 36"


def test_depthwise_layers_stay_float(run):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(64, 4)
    )
    assert set(blocks(transformed(run, model)[0])) == {"2"}


def test_bits_are_indices_codebook_and_projection():
    plan = {"k": 16, "d": 4, "m": 8, "sub_vectors": 100}
    assert layer_bits(plan) == 100 * 4 + 16 * (16 * 4 + 4 * 8)
    assert layer_bits({**plan, "d": 8}) == 100 * 4 + 16 * 16 * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_tilde": 9, "m": 8}, "d_tilde must be between 1 and m = 8, got 9"),
        ({"tau_start": 0.1, "tau_end": 0.2}, "tau_end must not be above tau_start = 0.1, got 0.2"),
        ({"tau_end": 0}, "greater than 0"),
        ({"k": 1}, "greater than or equal to 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        LR2VQConfig(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"m": 3},
            ConfigError,
            "m = 3 does not divide the 8 outputs of 'conv2'; choose another m or leave the layer out with",
        ),
        ({"m": 3, "group_axis": "in"}, ConfigError, "m = 3 does not divide the 8 inputs of 'conv2'"),
        ({"skip": ("conv9",)}, ConfigError, "exclude names 'conv9', which is no convolution or linear layer"),
        (
            {"min_params": 10**6},
            UnsupportedModelError,
            "none of the 4 layers is left to compress: skipped are conv1, fc",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(run, options, error, message):
    with pytest.raises(error, match=message) as caught:
        transformed(run, **options)
    assert isinstance(caught.value, RequestError) and "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(run):
    model = TinyCNN()
    model.conv2.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UnsupportedModelError, match="the weight of 'conv2' holds NaN or infinity"):
        transformed(run, model)


@pytest.mark.parametrize("options", [{}, {"d_tilde": 4}, {"group_axis": "in"}, {"assignment": "hard"}, {"k": 300}])
def test_the_file_holds_what_was_measured_and_its_ratio_is_counted_from_it(options, tmp_path):
    recipe = Recipe(
        model=MODEL, data=DATA, device="cpu", export=("packed",), train=TrainOptions(epochs=2, batch_size=64),
        methods=(MethodUse(name="quant_lr2vq", options={**SMALL, **options}),),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    artifact = next(item for item in report.artifacts if item.format == "packed")
    again = evaluate(UseRequest(str(tmp_path / "run" / artifact.path), device="cpu"))
    found, expected = again.metrics.values, report.after.metrics.values
    assert {key: found[key].value for key in ("cross_entropy", "accuracy")} == {
        key: expected[key].value for key in ("cross_entropy", "accuracy")
    }
    plans = report.methods[0].structure["layers"]
    codes = sum(-(-plan["sub_vectors"] * max(1, (plan["k"] - 1).bit_length()) // 8) for plan in plans.values())
    assert codes <= artifact.details["code_bytes"] <= codes + len(plans)
    assert artifact.details["scale_bytes"] == sum(
        layer_bits(plan) // 8 - plan["sub_vectors"] * max(1, (plan["k"] - 1).bit_length()) // 8
        for plan in plans.values()
    )
    assert artifact.details["file_ratio"] == pytest.approx(report.methods[0].structure["float_bytes"] / artifact.bytes)
    assert (tmp_path / "run" / "errors.png").stat().st_size > 1000


def test_stages_share_the_epochs_and_the_second_one_clusters(run):
    from eff_quant_lr2vq.stages import stage_steps

    run.train = CORE_TRAINING.model_copy(update={"epochs": 6, "batch_size": 64})
    assert stage_steps(run, LR2VQConfig(stage1_epochs=10, stage2_epochs=20)) == (2 * 4, 4 * 4)
    assert stage_steps(run, LR2VQConfig(stage1_epochs=0, stage2_epochs=0)) == (0, 24)
