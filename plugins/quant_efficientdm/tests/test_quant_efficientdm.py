"""quant_efficientdm: adapters inside the quantizer, what trains at which rate, and bad input."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eff.errors import ConfigError, RequestError
from eff.options import check_config
from eff.run import Run
from eff.tasks import Classification, ClassificationOptions
from eff_quant_efficientdm.adapters import AdaptedWeight
from eff_quant_efficientdm.config import EfficientDMConfig
from eff_quant_efficientdm.distill import Distillation, evaluation_path
from eff_quant_efficientdm.plugin import EfficientDM
from eff_quant_kit.diffusion.inputs import operand_quantizer
from eff_quant_kit.diffusion.models import DigitsDiT, DigitsUNet
from eff_quant_kit.diffusion.sampling import path_error
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_kit.quantizer import Quantizer

EFF_PLUGIN = "quant_efficientdm"
SMALL = {"steps": 4, "epochs": 1, "rank": 4, "calib_samples": 8}


def test_contract(eff_contract_check):
    eff_contract_check()


@pytest.fixture
def run():
    return Run(Diffusion(DiffusionOptions(input_shape=(1, 8, 8), classes=tuple("0123456789"))), torch.device("cpu"))


def model():
    torch.manual_seed(0)
    made = DigitsDiT(width=16, depth=1, heads=2)
    nn.init.normal_(made.blocks[0].adaln.weight, std=0.1)
    return made.eval()


def distillation(run, made=None, **options):
    torch.manual_seed(1)
    return Distillation(made or model(), EfficientDMConfig(**{**SMALL, **options}), {}, run)


def weight_quantizer(weight, bits=4):
    quantizer = Quantizer(bits, False, channels=len(weight), axis=0, with_offset=True)
    low, high = weight.flatten(1).amin(1).clamp(max=0), weight.flatten(1).amax(1).clamp(min=0)
    scale = (high - low) / 15
    quantizer.set_scale(scale, -(-low / scale).round() * scale)
    return quantizer


def test_the_adapter_of_a_convolution_is_two_convolutions():
    weight, x = torch.randn(6, 3, 3, 3), torch.randn(2, 3, 8, 8)
    adapted = AdaptedWeight(weight_quantizer(weight), weight, 4, packed=False)
    nn.init.normal_(adapted.up)
    two = F.conv2d(F.conv2d(x, adapted.down.view(-1, 3, 3, 3)), adapted.up[:, :, None, None])
    torch.testing.assert_close(F.conv2d(x, adapted.merged()), F.conv2d(x, weight) + two, rtol=1e-4, atol=1e-4)


def test_the_quantizer_is_the_formula_in_a_loop():
    torch.manual_seed(0)
    weight = torch.randn(3, 5)
    adapted = AdaptedWeight(weight_quantizer(weight), weight, 2, packed=False)
    nn.init.normal_(adapted.up, std=0.3)
    adapted.requires_grad_(False)
    expected = torch.tensor(
        [
            [(min(max(round(float(v / s)) + float(z), 0), 15) - float(z)) * float(s) for v in row]
            for row, s, z in zip(weight + adapted.up @ adapted.down, adapted.scale, adapted.zero_point, strict=True)
        ]
    )
    torch.testing.assert_close(adapted(weight), expected)


def test_before_training_the_model_is_the_calibrated_one(run):
    work = distillation(run)
    path = evaluation_path(work.teacher, run.task, work.timesteps, run, 4)
    assert path_error(work.model, path) == pytest.approx(path_error(work.ptq, path), rel=1e-5)


def test_merging_keeps_every_prediction_and_reports_changed_integers(run):
    work = distillation(run, lora_lr_div=1.0, epochs=2)
    for index in range(work.steps):
        work.step(index)
    path = evaluation_path(work.teacher, run.task, work.timesteps, run, 4)
    before = path_error(work.model, path)
    changed = work.finish()
    assert path_error(work.model, path) == pytest.approx(before, rel=1e-4)
    assert set(changed) == set(work.adapted) and max(changed.values()) > 0


def test_the_rates_follow_the_scales_and_the_mean_without_awareness(run):
    work, flat = distillation(run), distillation(run, scale_aware=False)
    expected = [float(item.scale.detach().mean()) / 2500 for item in work.adapted.values()]
    assert work.rates == pytest.approx([*expected, 1e-6, 5e-4])
    assert flat.rates[:-2] == pytest.approx([sum(expected) / len(expected)] * len(expected))


def test_only_adapters_and_step_sizes_train_each_once(run):
    work = distillation(run)
    before = copy.deepcopy(work.model.state_dict())
    for index in range(work.steps):
        work.step(index)
    changed = {name for name, value in work.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.endswith((".down", ".up", ".scale", ".zero_point")) for name in changed)
    listed = [id(p) for group in work.optimizer.param_groups for p in group["params"]]
    assert len(listed) == len(set(listed))


def test_every_step_owns_a_scale_and_without_temporal_there_is_one(run):
    for options, sets in (({}, 4), ({"temporal": False}, 1)):
        work = distillation(run, **options)
        assert {len(operand_quantizer(work.model, item).scale) for item in work.operands} == {sets}


def test_the_ends_stay_at_eight_bits_without_adapters(run):
    work = distillation(run, n_first8=2, n_last8=1)
    eight = [name for name, bits in work.weight_bits.items() if bits == 8]
    assert len(eight) == 3 and not set(eight) & set(work.adapted)


def test_distillation_lowers_the_error(run):
    work = distillation(run, epochs=40, lora_lr_div=50, lr_act=1e-3)
    path = evaluation_path(work.teacher, run.task, work.timesteps, run, 16)
    before = sum(path_error(work.model, path))
    for index in range(work.steps):
        work.step(index)
    assert sum(path_error(work.model, path)) < before


def test_a_unet_with_convolutions_works(run):
    work = distillation(run, DigitsUNet(width=8).eval())
    assert torch.isfinite(work.step(0)) and work.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits_w": 9}, "bits_w must be between 2 and 8, got 9"), ({"rank": 0}, "rank must be at least 1, got 0")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_efficientdm", EfficientDMConfig, options)


def test_unfit_requests_are_refused(run):
    with pytest.raises(ConfigError, match="steps must be at most the schedule's 100, got 200"):
        distillation(run, steps=200)
    with pytest.raises(ConfigError, match="leave none of 12 layers at 4 bits"):
        distillation(run, n_first8=50)
    with pytest.raises(RequestError, match="needs a diffusion model"):
        task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a",)))
        EfficientDM().transform(model=nn.Linear(2, 2), run=Run(task, torch.device("cpu")))
