"""The main job on real data, across packages: train, quantize, ship, read back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eff.errors import PluginError
from eff.registry import SHIPPED
from eff.runner import apply, resume
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.use import UseRequest, evaluate, export_model

pytest.importorskip("sklearn", reason="the digits need scikit-learn")

ROOT = Path(__file__).parents[1]


def eff(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "eff", *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A float model trained for a few epochs."""
    folder = tmp_path_factory.mktemp("digits") / "float"
    recipe = Recipe(model="zoo:digits_cnn?width=16", data="digits", train=TrainOptions(epochs=6), device="cpu")
    report = apply(recipe, folder)
    assert report.after.metrics.values["accuracy"].value > 90
    return folder


@pytest.fixture(scope="module")
def quantized(digits):
    folder = digits.parent / "quantized"
    recipe = Recipe(
        model=str(digits / "model.pt"),
        methods=(MethodUse(name="quant_lsq"),),
        train=TrainOptions(epochs=3),
        device="cpu",
    )
    return folder, apply(recipe, folder)


def accuracy(model):
    return evaluate(UseRequest(str(model), device="cpu")).metrics.values["accuracy"].value


def test_four_bits_stay_close_to_float_and_the_file_is_much_smaller(quantized):
    _, report = quantized
    before, after = (m.metrics.values["accuracy"].value for m in (report.before, report.after))
    assert after >= before - 2.0  # 719 test samples: 0.14 points each
    assert report.before.bytes / report.after.bytes > 4


def test_checkpoint_packed_file_and_report_agree(quantized):
    folder, report = quantized
    reported = report.after.metrics.values["accuracy"].value
    assert accuracy(folder / "model.pt") == reported
    assert accuracy(folder / "model.packed.safetensors") == reported


def test_onnxruntime_predicts_the_same(quantized, tmp_path):
    pytest.importorskip("onnxruntime", reason="comparing ONNX needs onnxruntime")
    (artifact,) = export_model(UseRequest(str(quantized[0]), device="cpu"), ["onnx"], tmp_path)
    assert artifact.details["agreement"] == 1.0


def test_an_interrupted_quantization_resumes_to_the_same_weights(digits, tmp_path):
    from eff.errors import InterruptedRunError
    from eff.training import Training

    recipe = Recipe(
        model=str(digits),
        methods=(MethodUse(name="quant_lsq", options={"distill": True}),),
        train=TrainOptions(epochs=2),
        device="cpu",
    )
    apply(recipe, tmp_path / "whole")
    original = Training._step

    def stop_at_five(self, *arguments):
        if self.done == 5:
            self.save()
            raise InterruptedRunError("stopped")
        return original(self, *arguments)

    Training._step = stop_at_five
    try:
        with pytest.raises(InterruptedRunError):
            apply(recipe, tmp_path / "parts")
    finally:
        Training._step = original
    resume(tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "model.pt", weights_only=True)["state_dict"] for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_second_quantization_of_the_same_model_is_refused(quantized, tmp_path):
    recipe = Recipe(model=str(quantized[0]), methods=(MethodUse(name="quant_lsq"),))
    with pytest.raises(PluginError, match="quant_lsq has already been applied"):
        apply(recipe, tmp_path / "twice")


def test_the_shell_commands_work_together(digits, tmp_path):
    done = eff(
        "apply",
        "quant_lsq",
        digits / "model.pt",
        "-o",
        "weight_bits=3",
        "--epochs",
        1,
        "--out",
        "out",
        "--json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"][0]["config"]["weight_bits"] == 3
    again = eff("apply", "quant_lsq", digits / "model.pt", "--out", "out", cwd=tmp_path)
    assert again.returncode == 2 and "out exists and is not empty; add --force" in again.stderr
    wrong = eff(
        "apply", "quant_lsq", digits / "model.pt", "-o", "weight_bits=9", "-o", "bit=2", "--out", "x", cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert "weight_bits must be between 2 and 8, got 9" in wrong.stderr and "option 'bit' is unknown" in wrong.stderr


def test_compare_makes_a_table_and_a_picture(digits, tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    done = eff(
        "compare",
        "quant_lsq",
        "quant_lsq:weight_bits=2:act_bits=2",
        digits / "model.pt",
        "--epochs",
        1,
        "--export",
        "onnx",
        "--export",
        "packed",
        "--out",
        "c",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())["rows"]
    assert [row["setting"] for row in rows] == ["as it came", "quant_lsq", "quant_lsq:weight_bits=2:act_bits=2"]
    assert (tmp_path / "c" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert [[item["format"] for item in row["artifacts"]] for row in rows][0] == ["onnx"]
    for row in rows[1:]:
        files = {item["format"]: item for item in row["artifacts"]}
        assert files["onnx"]["details"]["latency_ms"] > 0 and files["packed"]["bytes"] == row["measured"]["bytes"]
        assert row["measured"]["metrics"]["values"]["kernel_latency"]["value"] > 0
        assert row["measured"]["metrics"]["values"]["kernel_layers"]["value"] == 100
        assert row["seconds"] > 0
    table = (tmp_path / "c" / "compare.md").read_text().splitlines()
    assert len(table) == 5 and "kernel latency" in table[0] and "onnxruntime" in table[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_suite_of_every_shipped_plugin_runs_the_contract(name):
    suite = "".join(file.read_text() for file in (ROOT / "plugins" / name / "tests").glob("*.py"))
    assert f'EFF_PLUGIN = "{name}"' in suite and "def test_contract(eff_contract_check" in suite
