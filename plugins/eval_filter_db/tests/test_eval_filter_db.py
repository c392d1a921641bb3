"""Filter statistics against scikit-learn, scipy and numpy loops; the method as a user runs it."""

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from eff.errors import EffError, ModelError, UnsupportedModelError
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL, TinyCNN
from eff.use import UseRequest, evaluate
from eff_eval_filter_db.basis import fit_basis, scale_by_peak
from eff_eval_filter_db.config import FilterDBConfig
from eff_eval_filter_db.database import read_database, write_database
from eff_eval_filter_db.drift import EMPTY, Projector, distributions, measure_drift, shift_matrix
from eff_eval_filter_db.layers import Layer, layers_of_model, layers_of_state, swap_transposed
from eff_eval_filter_db.quality import (
    layer_quality,
    orthogonality,
    orthogonality_bound,
    random_entropy,
    sparse_filters,
    variance_entropy,
)
from eff_eval_filter_db.sources import split_tag

EFF_PLUGIN = "eval_filter_db"
CONFIG = FilterDBConfig()


def test_contract(eff_contract_check):
    eff_contract_check()


def layer(weight, name="conv", groups=1, model="m"):
    weight = np.asarray(weight, dtype=np.float64)
    return Layer(model, name, 0, 0.0, weight.shape[:2], groups, lambda: weight)


def gaussian(count, seed=0, model="m"):
    return layer(np.random.default_rng(seed).standard_normal((count, 1, 3, 3)), model=model)


# --- basis


def test_the_basis_is_scikit_learns_pca():
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the reference of the PCA is scikit-learn's")
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((40, 2, 3, 3)) * rng.uniform(0.2, 2, (1, 1, 3, 3)) for _ in range(3)]
    basis = fit_basis([layer(weight) for weight in weights], 9)
    rows = scale_by_peak(np.concatenate([weight.reshape(-1, 9) for weight in weights]))
    expected = decomposition.PCA(n_components=9, svd_solver="full").fit(rows)
    np.testing.assert_allclose(basis.ratios, expected.explained_variance_ratio_, rtol=1e-9)
    np.testing.assert_allclose(basis.mean, expected.mean_, atol=1e-12)
    np.testing.assert_allclose(np.abs((basis.components * expected.components_).sum(1)), 1, rtol=1e-9)
    largest = np.abs(basis.components).argmax(1)
    assert (basis.components[np.arange(9), largest] > 0).all()
    np.testing.assert_allclose(np.abs(basis.coefficients(rows)), np.abs(expected.transform(rows)), atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), parts=st.integers(1, 6), shift=st.floats(-1e4, 1e4))
def test_streaming_in_parts_is_one_pass(seed, parts, shift):
    rows = np.random.default_rng(seed).standard_normal((60, 9)) + shift
    whole = fit_basis([layer(rows.reshape(60, 1, 3, 3))], 9, scale=False)
    split = [layer(part.reshape(-1, 1, 3, 3)) for part in np.array_split(rows, parts)]
    np.testing.assert_allclose(fit_basis(split, 9, scale=False).ratios, whole.ratios, rtol=1e-6)


def test_gaussian_filters_have_no_preferred_direction():
    count = 20_000
    basis = fit_basis([gaussian(count)], 9, scale=False)
    assert (np.abs(basis.ratios - 1 / 9) < 3 / math.sqrt(count)).all()


def test_a_zero_filter_stays_zero_and_peaks_are_one():
    rows = np.array([[0.0, 0, 0], [1, -4, 2]])
    np.testing.assert_array_equal(scale_by_peak(rows), [[0, 0, 0], [0.25, -1, 0.5]])


# --- drift


def test_the_divergence_is_scipys_on_the_lifted_histogram():
    entropy = pytest.importorskip("scipy.stats", reason="the reference of the divergence is scipy's").entropy
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 9, (2, 9, 70))
    ratios = rng.dirichlet(np.ones(9))
    width = 0.05
    made = distributions(counts, width)
    expected = 0.0
    for axis in range(9):
        p, q = (np.where(c == 0, EMPTY, c / (c.sum() * width)) for c in counts[:, axis])
        expected += ratios[axis] * (entropy(p, q) + entropy(q, p))  # which normalises, and takes natural logarithms
    matrix = shift_matrix(made, ratios)
    assert matrix[0, 1] == pytest.approx(expected, rel=1e-9) and matrix[0, 1] == pytest.approx(matrix[1, 0])
    np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-15)


def test_equally_many_filters_are_compared_and_one_source_is_at_the_floor():
    groups = {
        "small": [gaussian(300, 1)],
        "large": [gaussian(6000, 2)],
        "other": [layer(np.abs(gaussian(900, 3).read()))],
    }
    layers = [found for members in groups.values() for found in members]
    basis = fit_basis(layers, 9)
    drift = measure_drift(groups, Projector(basis, layers, 70, True, "float64"), np.random.default_rng(0))
    assert drift.drawn == 300 and set(drift.names) == set(groups)
    found = {(a, b): drift.matched[i, j] for i, a in enumerate(drift.names) for j, b in enumerate(drift.names)}
    assert found["small", "large"] < 1.5 * drift.floor < found["other", "large"]
    # Unmatched, the small group's empty bins make it look farther away than it is.
    unmatched = {(a, b): drift.unmatched[i, j] for i, a in enumerate(drift.names) for j, b in enumerate(drift.names)}
    assert unmatched["small", "large"] > 0
    assert len(drift.rows()) == 3 and drift.names[-1] == "other"


# --- quality


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 40), seed=st.integers(0, 999))
def test_variance_entropy_is_the_singular_values_entropy(count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, 9))
    s = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    v = s**2 / (count - 1)
    p = v[v > 1e-12 * v.sum()] / v.sum()
    assert variance_entropy(rows) == pytest.approx(-(p * np.log10(p)).sum(), abs=1e-7)
    assert 0 <= variance_entropy(rows) <= math.log10(9) + 1e-9


def test_equal_filters_have_no_entropy_and_equal_directions_have_all():
    assert variance_entropy(np.tile(np.random.default_rng(0).standard_normal(9), (50, 1))) == 0
    assert variance_entropy(np.concatenate([np.eye(9), -np.eye(9)])) == pytest.approx(math.log10(9))


def test_the_threshold_is_the_papers_fit():
    assert random_entropy(2**20) == pytest.approx(1.2618047 - 0.31050834, abs=1e-4)
    expected = 1.2618047 / (1 + math.exp(-0.88767525 * (6 - 2.30436435))) - 0.31050834
    assert random_entropy(64) == pytest.approx(expected)
    assert random_entropy(3) > 0
    assert random_entropy(2) is None and random_entropy(0) is None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_a_layer_of_very_few_filters_is_not_called_random_or_of_low_diversity(count):
    """n filters vary in n - 1 directions at most, so that their entropy is low whatever they are."""
    filters = layer(np.random.default_rng(0).standard_normal((count, 1, 3, 3)))
    assert "low diversity" not in layer_quality(filters, CONFIG).flags(CONFIG)
    if count < 3:
        assert layer_quality(filters, CONFIG).flags(CONFIG) == []


def test_a_filter_is_sparse_where_all_its_weights_are_small():
    rows = np.array([[1.0] + [0] * 8, [0.009] * 9, [0.009] * 8 + [0.02], [0.0] * 9])
    assert sparse_filters(rows, 0.01).tolist() == [False, True, False, True]
    assert sparse_filters(np.zeros((2, 9)), 0.01).tolist() == [True, True]


def test_orthogonality_is_one_for_orthonormal_and_zero_for_parallel_rows():
    rows = np.linalg.qr(np.random.default_rng(0).standard_normal((9, 9)))[0]
    assert orthogonality(rows.reshape(9, 1, 3, 3), 1) == pytest.approx(1.0)
    assert orthogonality(np.ones((4, 2, 3, 3)), 1) == pytest.approx(0.0)
    weight = np.random.default_rng(1).standard_normal((5, 2, 3, 3))
    flat = weight.reshape(5, -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    expected = 1 - sum(abs(float(flat[i] @ flat[j]) - (i == j)) for i in range(5) for j in range(5)) / 20
    assert orthogonality(weight, 1) == pytest.approx(expected)


def test_groups_are_measured_apart_and_a_single_channel_is_not():
    weight = np.ones((4, 1, 3, 3))
    weight[2:, :, 1] = -1  # differs between groups
    assert orthogonality(weight, 2) == pytest.approx(0.0)
    assert orthogonality(weight, 4) is None and orthogonality(weight[:1], 1) is None
    assert orthogonality_bound((9, 1), 1, 9) == 1.0 and orthogonality_bound((10, 1), 1, 9) < 1


def test_flags_name_what_is_wrong():
    zero, noise = layer(np.zeros((8, 8, 3, 3))), gaussian(4096)
    repeated = layer(np.random.default_rng(0).standard_normal((64, 1, 1, 1)) * np.ones((1, 1, 3, 3)))
    assert layer_quality(zero, CONFIG).flags(CONFIG) == ["all zero", "sparse", "low diversity"]
    assert layer_quality(noise, CONFIG).flags(CONFIG) == ["random"]
    assert layer_quality(repeated, CONFIG).flags(CONFIG) == ["low diversity"]


def test_clean_scores_leave_the_sparse_filters_out():
    weight = gaussian(100).read().copy()
    weight[:50] *= 1e-4
    found = layer_quality(layer(weight), CONFIG)
    assert found.sparsity == 0.5 and found.clean_filters == 50
    assert found.clean_entropy == pytest.approx(variance_entropy(weight[50:].reshape(50, 9)))


# --- layers


class Mixed(nn.Module):
    """Convolutions of several kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 3, groups=2)


def test_every_3x3_convolution_is_found_with_its_depth():
    found = layers_of_model(Mixed(), "m")
    assert [(item.name, item.index, item.shape, item.groups) for item in found] == [
        ("stem", 0, (8, 3), 1),
        ("depthwise", 2, (8, 1), 8),
        ("up", 3, (4, 4), 2),
    ]
    assert [item.depth for item in found] == [0.0, pytest.approx(2 / 3), 1.0]
    assert len(layers_of_state(Mixed().state_dict(), "m")) == 3


def test_a_transposed_convolution_is_brought_into_the_layout_of_one():
    up = nn.ConvTranspose2d(4, 6, 3, groups=2)
    swapped = swap_transposed(up.weight.detach(), 2)
    x = torch.randn(1, 4, 5, 5)
    flipped = torch.flip(swapped, (2, 3))
    expected = nn.functional.conv2d(x, flipped, up.bias, padding=2, groups=2)
    torch.testing.assert_close(up(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv2d(3, 4, 5), r"found no 3x3 convolution in Conv2d; it has 5x5 \(1\); try -o kernel=5"),
        (nn.Linear(3, 4), "it has no 2D convolution at all"),
    ],
)
def test_a_model_without_such_filters_is_refused(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        layers_of_model(model, "m")


def test_weights_that_are_no_finite_floats_are_refused():
    model = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        model.weight[0] = math.nan
    with pytest.raises(UnsupportedModelError, match="holds NaN or infinity"):
        layers_of_model(model, "m")
    with pytest.raises(UnsupportedModelError, match="is int8; give the model with float weights"):
        layers_of_state({"conv.weight": torch.ones(2, 2, 3, 3, dtype=torch.int8)}, "m")


# --- as a user runs it


def recipe(model=MODEL, **options):
    use = MethodUse(name="eval_filter_db", options={"min_filters": 9, "figures": False} | options)
    return Recipe(model=model, methods=(use,), device="cpu")


def test_it_runs_without_data_and_leaves_tables_that_add_up(tmp_path):
    report = apply(recipe(group_by="layer"), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"filters.parquet", "layers.parquet", "basis.parquet", "drift.parquet", "report.json"} <= names
    assert "model.pt" not in names
    values = report.after.metrics.values
    assert values["filters"].value == 8 + 64 + 64 == pq.read_metadata(tmp_path / "run" / "filters.parquet").num_rows
    rows = report.after.metrics.tables["filter_quality"]
    assert [row["layer"] for row in rows] == ["conv1", "conv2", "conv3"]
    basis = pq.read_table(tmp_path / "run" / "basis.parquet").to_pylist()
    explained = [row["explained"] for row in basis if row["basis"] == "common" and row["component"] > 0]
    assert sum(explained) == pytest.approx(1.0) and len(explained) == 9


def test_trained_and_untrained_models_and_a_stored_data_base_are_compared(tmp_path):
    train = Recipe(model=MODEL, data=DATA, train=TrainOptions(epochs=2, batch_size=64), device="cpu")
    apply(train, tmp_path / "trained")
    apply(recipe(), tmp_path / "untrained")
    stored = str(tmp_path / "untrained" / "filters.parquet")
    live = apply(recipe(str(tmp_path / "trained"), others=[MODEL]), tmp_path / "live")
    again = apply(recipe(str(tmp_path / "trained"), others=[stored]), tmp_path / "again")
    one, two = (report.after.metrics.values["filter_drift_mean"].value for report in (live, again))
    assert one == two > 0
    assert {row["first"] for row in live.after.metrics.tables["filter_drift_pairs"]} <= {"trained", "tiny_cnn"}


def test_a_data_base_survives_its_file(tmp_path):
    layers = layers_of_model(Mixed(), "m")
    write_database(tmp_path / "filters.parquet", layers, 3)
    again = read_database(tmp_path / "filters.parquet", 3)
    assert [(a.name, a.shape, a.groups, a.depth) for a in again] == [
        (b.name, b.shape, b.groups, b.depth) for b in layers
    ]
    for a, b in zip(again, layers, strict=True):
        np.testing.assert_array_equal(a.read(), b.read())
    with pytest.raises(ModelError, match="holds 3x3 filters; add -o kernel=3"):
        read_database(tmp_path / "filters.parquet", 5)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(ModelError, match="cannot be read as Parquet"):
        read_database(tmp_path / "text.parquet", 3)


def test_groups_by_tag_and_depth(tmp_path):
    tagged = apply(recipe(group_by="tag", tag="new", others=[f"old={MODEL}"]), tmp_path / "tags")
    (row,) = tagged.after.metrics.tables["filter_drift_pairs"]
    assert {row["first"], row["second"]} == {"new", "old"}
    depth = apply(recipe(group_by="depth", depth_bins=3), tmp_path / "depth")
    assert len(depth.after.metrics.tables["filter_drift_pairs"]) == 1
    assert split_tag("faces=x.pt") == ("faces", "x.pt") and split_tag("x.pt") == ("", "x.pt")


def test_small_groups_are_left_out_by_name(tmp_path):
    report = apply(recipe(group_by="layer", min_filters=20), tmp_path / "run")
    assert any("left out of the drift: tiny_cnn/conv1 (8)" in text for text in report.warnings)


def test_a_quantized_models_own_weights_are_measured(tmp_path):
    """What it computes with, not the float weights it keeps for training."""
    quantize = Recipe(
        model=MODEL, data=DATA, methods=(MethodUse(name="quant_lsq", options={"weight_bits": 2}),),
        train=TrainOptions(epochs=0), device="cpu",
    )  # fmt: skip
    apply(quantize, tmp_path / "q")
    request = UseRequest(str(tmp_path / "q"), device="cpu")
    measured = evaluate(request, recipe().methods).metrics.values["filter_variance_entropy"].value
    plain = evaluate(UseRequest(MODEL, device="cpu"), recipe().methods).metrics.values["filter_variance_entropy"].value
    assert measured != plain


def test_figures_are_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    apply(recipe(figures=True, others=[MODEL]), tmp_path / "run")
    for name in ("eigen_filters", "coefficients", "layer_quality", "drift"):
        assert (tmp_path / "run" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"others": ["nowhere.parquet"]}, "nowhere.parquet"),
        ({"others": ["eff.testing.samples:tiny_cn"]}, "tiny_cn"),
        ({"kernel": 7}, r"found no 7x7 convolution in TinyCNN; it has 3x3 \(3\)"),
        ({"group_by": "tag", "tag": "a", "others": [MODEL]}, "has no tag; write -o others=TAG="),
    ],
)
def test_what_cannot_be_analysed_is_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(EffError, match=message) as caught:
        apply(recipe(**options), tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [{"bins": 1}, {"sparsity_eps": 0}, {"low_entropy": 0.95}, {"min_filters": 8}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        FilterDBConfig(**options)
    with pytest.raises(ValidationError, match="group_by=tag needs the measured model's tag"):
        FilterDBConfig(group_by="tag")


def test_an_all_zero_layer_is_named(tmp_path):
    apply(Recipe(model=f"{__name__}:half_zero", data=DATA, train=TrainOptions(epochs=0), device="cpu"), tmp_path / "z")
    report = apply(recipe(str(tmp_path / "z")), tmp_path / "run")
    assert any("all weights are zero in conv2" in text for text in report.warnings)


def half_zero(num_classes=4, in_channels=1):
    """Return the tiny network with a dead layer."""
    model = TinyCNN(num_classes, in_channels)
    nn.init.zeros_(model.conv2.weight)
    return model


def test_bare_weights_are_said_to_lack_their_architecture_and_take_one(tmp_path):
    torch.save(TinyCNN().state_dict(), tmp_path / "bare.pth")
    bare = str(tmp_path / "bare.pth")
    found = apply(recipe(others=[bare]), tmp_path / "run")
    assert any("bare are bare weights" in line and "?arch=ARCH" in line for line in found.warnings)
    known = apply(recipe(others=[f"{bare}?arch={MODEL}"]), tmp_path / "known")
    assert not any("bare weights" in line for line in known.warnings)
    for report, defined in ((found, False), (known, True)):
        rows = [row for row in report.after.metrics.tables["filter_quality"] if row["model"] == "bare"]
        assert rows and all((row["orthogonality"] is not None) == defined for row in rows)
