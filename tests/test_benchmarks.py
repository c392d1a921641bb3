"""The scripts in benchmarks/ and docs/ that measure run, and cover what they say they cover."""

import json
from pathlib import Path

import pytest

from eff.registry import SHIPPED

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def time_per_layer(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import time_per_layer

    return time_per_layer


@pytest.fixture
def make_quantization(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER.parent / "docs"))
    import make_quantization

    return make_quantization


def test_every_quantization_method_has_a_time_per_layer(time_per_layer):
    methods = {name for name in SHIPPED if name.startswith("quant_")}
    assert set(time_per_layer.SETTINGS) == methods
    assert set(json.loads((FOLDER / "results" / "time-per-layer.json").read_text())) == methods


def test_a_training_step_is_measured_by_layer_beside_that_of_the_float_model(time_per_layer):
    row = time_per_layer.measure("quant_lsq", quick=True)
    assert row["layers"] == 20  # 19 convolutions and one linear layer
    assert row["ms_per_layer"] == pytest.approx(row["ms"] / 20, abs=1e-3)
    assert row["over_float"] == pytest.approx(row["ms"] / row["float_ms"], abs=0.02) and row["float_ms"] > 0
    assert row["threads"] >= 1 and row["torch"] and row["date"] and row["device"]


def test_a_calibration_is_measured_by_layer(time_per_layer):
    row = time_per_layer.measure("quant_vq4dit", quick=True)
    assert row["seconds_per_layer"] == pytest.approx(row["seconds"] / row["layers"], abs=2e-3) and row["seconds"] > 0


def test_a_record_replaces_its_own_row_alone(time_per_layer, tmp_path):
    for name, value in (("b", 1), ("a", 2), ("b", 3)):
        time_per_layer.record("x", name, {"value": value}, tmp_path)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": {"value": 2}, "b": {"value": 3}}


def test_a_part_of_the_quantization_page_is_made_anew_and_the_others_stay(make_quantization):
    page = FOLDER.parent / "docs" / "quantization.md"
    parts = make_quantization.kept(page)
    assert [part.split(":")[0].splitlines()[0] for part in parts] == [
        "## A classifier", "## A denoiser", "## Integers beside float", "## Trained networks", "## Methods for other models",
        "## Time per layer",
    ]  # fmt: skip
    assert page.read_text(encoding="utf-8").endswith("\n".join(parts))
    assert parts[-1] == make_quantization.times_part()  # the page shows what the records hold
    assert parts[3] == make_quantization.networks_part()


def test_the_quantization_page_measures_every_method(make_quantization):
    methods = {name for name in SHIPPED if name.startswith("quant_")}
    shown = {text.split(":")[0] for text in (*make_quantization.CLASSIFIER, *make_quantization.DENOISER)}
    assert shown | set(make_quantization.OTHERS) == methods


def test_a_ratio_of_times_is_called_slower_where_it_is_slower(make_quantization):
    assert (make_quantization.pace(2.0), make_quantization.pace(0.5)) == ("2.00x slower", "2.00x faster")


def test_integers_are_timed_and_compared_beside_float(make_quantization, tmp_path):
    training = make_quantization.TrainOptions(epochs=1)
    source, data = "zoo:digits_cnn", "digits?train=128&test=32"
    none = make_quantization.TrainOptions(epochs=0)
    make_quantization.compared(source, data, training, (make_quantization.INT8,), ("packed", "onnx"), tmp_path, none)
    rows = make_quantization.integer_rows(source, tmp_path)
    assert [row[1] for row in rows] == ["onnxruntime", "eff-kernels"]
    for row in rows:
        before, after = (float(cell.split()[0]) for cell in row[2:4])
        assert ("slower" in row[4]) == (after > before) or abs(after - before) < 0.02  # shown with two decimals
        assert float(row[8].split()[0]) >= 90.0  # the same integers, summed in another order
