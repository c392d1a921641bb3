"""The scripts in benchmarks/ run, and cover what they say they cover."""

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


def test_every_quantization_method_has_a_time_per_layer(time_per_layer):
    methods = {name for name in SHIPPED if name.startswith("quant_")} - {"quant_kit"}
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
