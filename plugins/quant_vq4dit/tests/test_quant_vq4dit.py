"""quant_vq4dit: ratios and freezing by hand, soft decoding against a loop, calibration, the file, bad input."""

import copy
import math

import pytest
import torch
from torch import nn

from eff.errors import ConfigError, RequestError, UnsupportedModelError
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import MethodUse, Recipe
from eff.tasks import Classification, ClassificationOptions
from eff.use import UseRequest, evaluate
from eff_quant_kit.codebook_layers import CodebookLinear
from eff_quant_kit.diffusion.models import DigitsDiT
from eff_quant_kit.diffusion.sampling import path_error
from eff_quant_kit.diffusion.task import Diffusion, DiffusionOptions
from eff_quant_kit.layers import replace_module
from eff_quant_vq4dit.calibrate import Calibration, choose_layers, insert, soft_layers, teacher_of
from eff_quant_vq4dit.config import VQ4DiTConfig
from eff_quant_vq4dit.plugin import VQ4DiT
from eff_quant_vq4dit.report import held_out_path, layer_bits
from eff_quant_vq4dit.soft import SoftLinear

EFF_PLUGIN = "quant_vq4dit"
SMALL = {"k": 16, "trajectories": 2, "sampler_steps": 5, "kmeans_iters": 10}


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


def soft(k=8, candidates=3, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(12, 10)
    return layer, SoftLinear.of(layer, k, 4, candidates, 20, torch.Generator().manual_seed(0))


def test_ratios_start_in_proportion_to_one_over_the_distance():
    layer, vq = soft()
    points = layer.weight.detach().reshape(-1, 4)
    for point, codes, ratios in zip(points, vq.candidates, vq.ratios().detach(), strict=True):
        distances = (point - vq.codebook.detach()[codes]).norm(dim=1)
        assert distances.tolist() == sorted(distances.tolist())
        inverse = 1 / distances.clamp(min=1e-5)
        torch.testing.assert_close(ratios, inverse / inverse.sum(), rtol=1e-2, atol=2e-3)
        everything = (point - vq.codebook.detach()).norm(dim=1).sort().values
        torch.testing.assert_close(distances, everything[:3])


def test_the_soft_weight_is_the_mix_in_a_loop():
    _, vq = soft()
    ratios = vq.ratios().detach()
    rows = [
        sum(float(ratios[n, j]) * vq.codebook.detach()[vq.candidates[n, j]] for j in range(3))
        for n in range(len(ratios))
    ]
    torch.testing.assert_close(vq.weight().detach(), torch.stack(rows).view(10, 12))


def test_the_ratio_loss_by_hand():
    _, vq = soft(candidates=2)
    with torch.no_grad():
        vq.logits.copy_(torch.tensor([math.log(3.0), 0.0]).expand(30, 2))
    assert float(vq.ratio_loss().detach()) == pytest.approx(2 * 0.75 * 0.25)
    vq.frozen[:] = True
    assert float(vq.ratio_loss().detach()) == 0


def test_sub_vectors_freeze_and_stay_and_a_layer_settles():
    _, vq = soft(candidates=2)
    with torch.no_grad():
        vq.logits.zero_()
        vq.logits[:10, 1] = 6.0
    vq.freeze(0.99, 0.99)
    assert int(vq.frozen.sum()) == 10 and not vq.hard
    assert vq.logits[:10].detach().unique().tolist() == [0.0, 1e4] and not vq.logits[10:].any()
    optimizer = torch.optim.RMSprop([vq.logits], lr=0.05)
    vq.weight().sum().backward()
    optimizer.step()
    vq.freeze(0.99, 0.99)
    assert torch.equal(vq.codes()[:10], vq.candidates[:10, 1])
    vq.freeze(0.99, 0.3)
    assert bool(vq.hard) and bool(vq.frozen.all()) and not vq.logits.requires_grad
    torch.testing.assert_close(vq.weight(), vq.codebook[vq.codes()].view(10, 12))


def test_the_finished_layer_computes_the_same_up_to_float16():
    _, vq = soft()
    vq.settle()
    done = vq.finished()
    x = torch.randn(5, 12)
    assert isinstance(done, CodebookLinear)
    torch.testing.assert_close(done(x), vq(x), rtol=1e-2, atol=1e-2)


def work(run, **options):
    teacher = model()
    config = VQ4DiTConfig(**{**SMALL, **options})
    structure = {}
    student = insert(copy.deepcopy(teacher), config, structure, run)
    return Calibration(teacher_of(teacher), student, config, run), teacher, student, structure


def test_layers_of_blocks_are_taken_and_those_outside_left():
    names = choose_layers(model(), VQ4DiTConfig())
    assert "blocks.0.adaln" in names and "blocks.1.attn.to_q" in names
    assert all(name.startswith("blocks.") for name in names)
    assert "final" in choose_layers(model(), VQ4DiTConfig(ignore=("patch_embed", "time_embed.*", "final_adaln")))


def test_calibration_lowers_the_error_and_every_layer_ends_hard(run):
    calibration, teacher, student, _ = work(run, trajectories=30, cfg_scale=1.0)
    path = held_out_path(teacher, run)
    plain, *_ = work(run, n_candidates=1, trajectories=0)
    before = sum(path_error(plain.student, path))
    moved = {name: layer.codebook.detach().clone() for name, layer in soft_layers(student).items()}
    for index in range(calibration.steps):
        calibration.step(index)
    forced = calibration.finish()
    assert 0 <= forced <= 1 and all(bool(layer.hard) for layer in soft_layers(student).values())
    assert any(not torch.equal(layer.codebook, moved[name]) for name, layer in soft_layers(student).items())
    assert sum(path_error(student, path)) < before


def test_nothing_but_the_vq_layers_changes(run):
    calibration, teacher, student, _ = work(run)
    for index in range(3):
        calibration.step(index)
    soft_names = tuple(soft_layers(student))
    for name, value in student.state_dict().items():
        if not name.startswith(soft_names):
            assert torch.equal(value, teacher.state_dict()[name])


def test_the_student_never_leads_the_path(run):
    calibration, teacher, *_ = work(run)
    calibration.step(0)
    first = calibration.x.clone()
    again, *_ = work(run, n_candidates=1)
    again.step(0)
    assert torch.equal(first, again.x)


def test_codebooks_wait_for_their_layer_after_freeze(run):
    calibration, _, student, _ = work(run, codebook_schedule="after_freeze")
    before = {name: layer.codebook.detach().clone() for name, layer in soft_layers(student).items()}
    next(iter(soft_layers(student).values())).settle()
    calibration.step(0)
    changed = [not torch.equal(layer.codebook, before[name]) for name, layer in soft_layers(student).items()]
    assert changed[0] and not any(changed[1:])


def test_the_gate_adds_the_ratio_loss_only_where_it_rose(run):
    calibration, *_ = work(run)
    calibration.step(0)
    wanted = [value.detach() for value in calibration.seen["student"]]
    calibration.best = 1000.0
    assert float(calibration._loss(wanted).detach()) == pytest.approx(0, abs=1e-6) and calibration.best < 1000
    calibration.best = 0.0
    assert float(calibration._loss(wanted).detach()) > 0.01


def test_sizes_follow_the_formula_and_the_file_counts(tmp_path):
    recipe = Recipe(
        model="diffusion:digits_dit?width=32&depth=2&heads=2", data="diffusion_digits?train=64&test=32", device="cpu",
        methods=(MethodUse(name=EFF_PLUGIN, options={**SMALL, "trajectories": 1}),), export=("packed",),
    )  # fmt: skip
    report = apply(recipe, tmp_path / "run")
    artifact = next(item for item in report.artifacts if item.format == "packed")
    path = tmp_path / "run" / artifact.path
    found = report.after.metrics.values
    assert found["mean_weight_bits"].value == pytest.approx(
        1 + 16 * 16 * 4 * 16 / sum([6144, 1024, 1024, 1024, 1024, 4096, 4096] * 2), rel=0.2
    )
    assert artifact.details["file_ratio"] == pytest.approx(
        sum(v.numel() * 4 for v in DigitsDiT(width=32, depth=2, heads=2).state_dict().values()) / path.stat().st_size
    )
    packed = evaluate(UseRequest(str(path), device="cpu"))
    assert packed.metrics.values["noise_mse"].value == pytest.approx(found["noise_mse"].value, rel=1e-4)
    assert layer_bits({"shape": [8, 8], "k": 4}, 4) == 16 * 2 + 16 * 4 * 4


def test_small_layers_get_smaller_codebooks_with_a_warning(run):
    _, _, student, structure = work(run, k=4096, n_candidates=8)
    assert structure["layers"]["blocks.0.attn.to_q"]["k"] == 16
    assert any("its codebook is reduced from 4096 to 16" in line for line in run.log.warnings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 48}, "k must be a power of two, got 48"),
        ({"k": 2, "n_candidates": 4}, "n_candidates is 4, more than the 2 codewords"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("quant_vq4dit", VQ4DiTConfig, options)


def test_unfit_models_and_requests_are_refused(run):
    with pytest.raises(ConfigError, match=r"d = 5 does not divide the 16 inputs of 'blocks\.0\.attn\.to_q'"):
        choose_layers(model(), VQ4DiTConfig(d=5))
    with pytest.raises(ConfigError, match=r"ignore 'head' fits no linear layer"):
        choose_layers(model(), VQ4DiTConfig(ignore=("head",)))
    with pytest.raises(UnsupportedModelError, match="has no list of blocks"):
        choose_layers(nn.Sequential(nn.Linear(4, 4)), VQ4DiTConfig())
    broken = model()
    nn.init.constant_(broken.blocks[0].fc1.weight, float("nan"))
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.0\.fc1' holds NaN"):
        choose_layers(broken, VQ4DiTConfig())
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a",)))
    with pytest.raises(RequestError, match="needs a diffusion transformer; this model's task is classification"):
        VQ4DiT().transform(model=model(), run=Run(task, torch.device("cpu")))


def test_replaced_layers_are_the_same_module_everywhere():
    holder = nn.Sequential(nn.Linear(8, 8))
    replace_module(holder, "0", SoftLinear.of(holder[0], 4, 4, 2, 3, torch.Generator()))
    assert isinstance(holder[0], SoftLinear)
