"""quant_quest: roles of layers, ranges, what each stage may change, and what it says about bad input."""

import copy

import pytest
import torch
from torch import nn

from eff.errors import ConfigError, RequestError, RunError
from eff.options import check_config
from eff.run import Run
from eff.tasks import Classification, ClassificationOptions
from eff_quant_kit.diffusion.inputs import operand_quantizer, shrunk_range
from eff_quant_kit.diffusion.models import DigitsDiT
from eff_quant_kit.diffusion.sampling import path_error
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_quest.calibration import Calibrated, quantile_range
from eff_quant_quest.config import QuESTConfig
from eff_quant_quest.finetune import Finetuning
from eff_quant_quest.plugin import QuEST
from eff_quant_quest.rounding import reconstruct, soft_round

EFF_PLUGIN = "quant_quest"
SMALL = {"calib_steps": 3, "calib_samples": 8, "time_epochs": 1, "main_epochs": 1}


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.fixture
def run():
    return Run(Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789"))), torch.device("cpu"))


def model():
    torch.manual_seed(0)
    made = DigitsDiT(width=16, depth=2, heads=2)
    for block in made.blocks:
        nn.init.normal_(block.adaln.weight, std=0.1)
    return made.eval()


def calibrated(run, **options):
    return Calibrated(model(), QuESTConfig(**{**SMALL, **options}), {}, run)


def test_the_shrunk_range_is_that_of_a_search_by_hand():
    torch.manual_seed(0)
    w = torch.randn(3, 40)
    w[:, 0] = 6.0  # worth clipping
    low, high = shrunk_range(w, 3)

    def error(row, a, b):
        delta = (b - a) / 7
        zero = round(float(-a / delta))
        q = [(min(max(round(float(v / delta)) + zero, 0), 7) - zero) * float(delta) for v in row]
        return sum(abs(float(v) - x) ** 2.4 for v, x in zip(row, q, strict=True))

    for row, a, b in zip(w, low, high, strict=True):
        errors = [error(row, row.min() * (1 - i / 100), row.max() * (1 - i / 100)) for i in range(80)]
        assert error(row, a, b) == pytest.approx(min(errors), rel=1e-4)
        assert float(b) < 6.0


def test_the_quantile_range_is_one_of_the_three_candidates():
    torch.manual_seed(0)
    x = torch.randn(2, 5000)
    low, high = quantile_range(x, 4)
    for row, a, b in zip(x, low, high, strict=True):
        pairs = [(row.quantile(1 - q), row.quantile(q)) for q in (0.999, 0.9999, 0.99999)]
        assert any(torch.allclose(torch.stack([a, b]), torch.stack(pair), atol=1e-4) for pair in pairs)


def test_every_operand_has_its_bits_and_granularity(run):
    found = {(item.name, item.side): item for item in calibrated(run).operands}
    assert found["patch_embed", 0].bits == found["final", 0].bits == 8
    assert (found["blocks.0.attn.av_matmul", 0].bits, found["blocks.0.attn.av_matmul", 0].axis) == (8, None)  # softmax
    assert (found["blocks.0.attn.qk_matmul", 1].bits, found["blocks.0.attn.qk_matmul", 1].axis) == (4, -2)
    assert (found["blocks.0.fc1", 0].bits, found["blocks.0.fc1", 0].axis) == (4, -1)
    assert (found["blocks.0.adaln", 0].bits, found["blocks.0.adaln", 0].axis) == (4, None)  # a time layer


def test_stage_1_changes_time_layers_and_stage_2_the_sensitive_ones(run):
    work = calibrated(run, sensitive_layers=("*.fc1",), lr_time_a=1e-3, lr_a=1e-3)
    tuning = Finetuning(work)
    changed = []
    for steps in (range(tuning.first_steps), range(tuning.first_steps, tuning.steps)):
        before = copy.deepcopy(work.model.state_dict())
        for index in steps:
            tuning.step(index)
        after = work.model.state_dict()
        changed.append({name for name, value in after.items() if not torch.equal(value, before[name])})
    first, second = changed
    assert {name for name in first if "layer." in name} == {
        f"{name}.layer.{part}" for name in work.time for part in ("weight", "bias")
    }
    assert {name.rpartition(".input_quantizer")[0] for name in first if "quantizer" in name} <= set(work.time)
    assert {name for name in second if ".layer." in name} == {
        f"blocks.{block}.fc1.layer.{part}" for block in (0, 1) for part in ("weight", "bias")
    }
    assert not any(name.startswith(tuple(work.time)) for name in second)


def test_a_step_moves_the_scales_of_its_own_timestep_alone(run):
    work = calibrated(run, time_epochs=0)
    tuning = Finetuning(work)
    scale = next(operand_quantizer(work.model, i) for i in work.operands if i.name == "blocks.0.fc1").scale
    before = scale.detach().clone()
    tuning.step(0)
    tuning.step(1)
    assert not torch.equal(scale[0], before[0]) and torch.equal(scale[1:], before[1:])


def test_finetuning_lowers_the_error_on_its_own_path(run):
    work = calibrated(run, time_epochs=3, main_epochs=10, lr_time_w=1e-3, lr_time_a=1e-4, lr_w=1e-4)
    path = work.path  # 8 samples of an untrained model do not generalise; the claim measures unseen paths
    before = sum(path_error(work.model, path))
    tuning = Finetuning(work)
    for index in range(tuning.steps):
        tuning.step(index)
    assert sum(path_error(work.model, path)) < before


def test_the_budget_bounds_the_sensitive_layers(run):
    work = calibrated(run, sensitive_budget=0.3)
    candidates = [name for name in work.weights if name not in work.time]
    size = {name: work.teacher.get_submodule(name).weight.numel() for name in candidates}
    assert work.sensitive and sum(size[name] for name in work.sensitive) <= 0.3 * sum(size.values())


def test_soft_rounding_reaches_both_ends_and_reconstruction_stays_on_the_grid(run):
    assert soft_round(torch.tensor([-9.0, 0.0, 9.0])).tolist() == pytest.approx([0.0, 0.5, 1.0])
    work = calibrated(run)
    reconstruct(work, 5)
    layer = work.model.get_submodule("blocks.0.fc1")
    torch.testing.assert_close(layer.weight(), layer.layer.weight)


def test_guidance_calibrates_on_both_halves(run):
    work = calibrated(run, guidance=1.5)
    assert work.path.x.shape[1] == 16 and work.path.labels[8:].eq(10).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 9}, "weight_bits must be between 2 and 8, got 9"),
        ({"calib_samples": 4}, "calib_samples must be at least 8, got 4"),
        ({"calib_steps": 0}, "no timestep would be calibrated"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_quest", QuESTConfig, options)


def test_unfit_requests_are_refused(run):
    with pytest.raises(ConfigError, match="calib_steps names timestep 200; the schedule has 0 to 99"):
        calibrated(run, calib_steps=(200,))
    with pytest.raises(ConfigError, match="calib_steps must be at most 100, got 101"):
        calibrated(run, calib_steps=101)
    with pytest.raises(ConfigError, match=r"sensitive_layers '\*\.qkv' fits no layer"):
        calibrated(run, sensitive_layers=("*.qkv",))
    with pytest.raises(RequestError, match=r"needs a diffusion model, called as model\(x, t, class_labels=...\)"):
        task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a",)))
        QuEST().transform(model=nn.Linear(2, 2), run=Run(task, torch.device("cpu")))
    broken = model()
    nn.init.constant_(broken.final.bias, float("nan"))
    with pytest.raises(RunError, match="prediction at timestep 99 holds NaN"):
        Calibrated(broken, QuESTConfig(**SMALL), {}, run)


def test_without_time_layers_stage_1_is_skipped_with_a_warning(run):
    work = calibrated(run, time_layers=())
    assert Finetuning(work).first_steps == 0
    assert any("stage 1 is skipped" in line for line in run.log.warnings)
