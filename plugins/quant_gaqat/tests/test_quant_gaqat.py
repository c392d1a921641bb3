"""quant_gaqat: disorder by hand, the two gradients against autograd, freezing, domains, and bad input."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.data import load_data
from eff.errors import ConfigError, DataError, RequestError
from eff.options import check_config
from eff.run import Run, Step
from eff.schemas import CORE_TRAINING, DataSpec, TrainOptions
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import blobs
from eff_quant_gaqat.config import GAQATConfig
from eff_quant_gaqat.disorder import Tracker, disorder
from eff_quant_gaqat.domains import ANGLES, Joined, Part, rotate, rotated_digits
from eff_quant_gaqat.plugin import GAQAT, Domains
from eff_quant_gaqat.report import domain_accuracy, sharpness
from eff_quant_gaqat.training import Trainer, scale_names

EFF_PLUGIN = "quant_gaqat"
RATE = 1e-2


def test_contract(eff_contract_check):
    eff_contract_check()


@settings(max_examples=100, deadline=None)
@given(a=st.lists(st.integers(-2, 2), min_size=2, max_size=12))
def test_disorder_counts_changes_of_sign_and_zero_equals_both(a):
    values = torch.tensor(a, dtype=torch.float32)
    expected = sum(x * y < 0 for x, y in zip(a, a[1:], strict=False)) / (len(a) - 1)
    assert float(disorder(values[:-1], values[1:])) == pytest.approx(expected)


def test_noise_has_disorder_one_half_and_a_direction_none():
    noise = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(disorder(noise[:, :-1], noise[:, 1:]), torch.full((2,), 0.5), atol=0.02, rtol=0)
    assert float(disorder(torch.ones(5), torch.full((5,), 2.0))) == 0


def tracked(windows, **options):
    """Run a tracker over windows of gradients of three scales: one steady, one that alternates, one random."""
    tracker = Tracker(["a", "b", "c"], GAQATConfig(window=4, **options))
    generator = torch.Generator().manual_seed(0)
    for index in range(4 * windows):
        task = torch.tensor([1.0, (-1.0) ** index, -1.0 if index % 4 == 1 else 1.0])
        tracker.note(task, torch.tensor([1.0, 1.0, -1.0]), generator)
    return tracker


def test_scales_whose_gradient_keeps_its_direction_freeze_and_are_released():
    tracker = tracked(1)
    assert tracker.frozen.tolist() == [True, False, False]
    assert tracker.latest.tolist() == pytest.approx([0, 1, 2 / 3])
    for index in range(4):
        tracker.note(torch.tensor([(-1.0) ** index, 1.0, 1.0]), None, torch.Generator())
    assert tracker.frozen.tolist() == [False, True, True]
    assert tracker.frozen_steps.tolist() == [4, 0, 0] and tracker.conflicts.tolist() == [0, 2, 3]
    assert tracker.conflict_rate() == pytest.approx(5 / 24) and tracker.frozen_share() == pytest.approx(4 / 24)


def test_the_ablations():
    assert not tracked(3, freeze_policy="never").frozen.any() and not tracked(3, tau=0.0).frozen.any()
    assert tracked(1, tau=1.5).frozen.all()
    always = tracked(1, freeze_policy="always_after_first")
    for index in range(8):
        always.note(torch.tensor([(-1.0) ** index, 1.0, 1.0]), None, torch.Generator())
    assert always.frozen.tolist() == [True, False, False]
    counts = {tuple(tracked(n, freeze_policy="random").frozen.tolist()) for n in range(1, 8)}
    assert all(sum(found) == 1 for found in counts) and len(counts) > 1


def test_a_tracker_resumes():
    whole, first = tracked(3), tracked(2)
    again = Tracker(["a", "b", "c"], GAQATConfig(window=4))
    again.load_state_dict(first.state_dict())
    for index in range(4):
        task = torch.tensor([1.0, (-1.0) ** index, -1.0 if index % 4 == 1 else 1.0])
        again.note(task, torch.tensor([1.0, 1.0, -1.0]), torch.Generator())
    assert again.history == whole.history and torch.equal(again.frozen_steps, whole.frozen_steps)


@pytest.fixture
def run():
    task = Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d")))
    data = blobs(DataSpec.parse("eff.testing.samples:blobs"))
    recipe = TrainOptions(optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=0.1).over(CORE_TRAINING)
    return Run(task, torch.device("cpu"), data=data, train=recipe, training=True)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def one_step(run, model, trainer, batch, index=0):
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(index)
    step = Step(
        model, model, batch, optimizer, run, index, 0,
        lambda m, b: (nn.functional.cross_entropy(m(b["image"]), b["label"]), None), lambda loss: loss.backward(),
    )  # fmt: skip
    return trainer.step(step)


def quantized(run, **options):
    method = GAQAT(GAQATConfig(window=4, **options))
    model = method.transform(model=net(), run=run).train()
    return model, method.trainer, next(run.batches("train", 32, 32))


def both_gradients(model, batch, rho, alpha, scales=True):
    """The definition: two passes with autograd on a copy, the same dropout masks."""
    copied = copy.deepcopy(model)
    parameters = dict(copied.named_parameters())

    def gradients():
        torch.manual_seed(0)
        loss = nn.functional.cross_entropy(copied(batch["image"]), batch["label"])
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    task = gradients()
    moved = [name for name in parameters if scales or not name.endswith("quantizer.scale")]
    norm = sum(float(task[name].double().square().sum()) for name in moved) ** 0.5
    with torch.no_grad():
        for name in moved:
            parameters[name].add_(task[name] * (rho / norm - alpha))
    return task, gradients()


@pytest.mark.parametrize("scales", [True, False])
def test_a_step_is_the_mean_of_the_gradients_at_both_points_and_restores_exactly(run, scales):
    model, trainer, batch = quantized(run, perturb_scales=scales)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task, smooth = both_gradients(model, batch, 0.05, 0.001, scales)
    one_step(run, model, trainer, batch)
    for name, parameter in model.named_parameters():
        mixed = 0.5 * (task[name] + smooth[name])
        torch.testing.assert_close((before[name] - parameter.detach()) / RATE, mixed, rtol=1e-2, atol=5e-5)
    only_first = copy.deepcopy(net())
    assert int(model[1].num_batches_tracked) == 1 and only_first is not model
    expected = 0.9 * before["1.running_mean"] + 0.1 * _mean_of(model, before, batch)
    torch.testing.assert_close(model[1].running_mean, expected)


def _mean_of(model, state, batch):
    copied = copy.deepcopy(model)
    copied.load_state_dict(state)
    return copied[0](batch["image"]).mean((0, 2, 3)).detach()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, (0.0, 0.5)), ({"renormalise": True}, (0.0, 1.0)), ({"freeze_policy": "freeze_smooth"}, (0.5, 0.0)),
        ({"flat_optimizer": "sam", "alpha": 0.0}, (0.0, 1.0)),
    ],
)  # fmt: skip
def test_a_frozen_scale_takes_the_other_gradient(run, options, weights):
    model, trainer, batch = quantized(run, **options)
    trainer.tracker.frozen[:] = True
    task, smooth = both_gradients(model, batch, 0.05, options.get("alpha", 0.001))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one_step(run, model, trainer, batch)
    for name in scale_names(model):
        expected = weights[0] * task[name] + weights[1] * smooth[name]
        torch.testing.assert_close((before[name] - model.state_dict()[name]) / RATE, expected, rtol=1e-2, atol=1e-5)


def test_without_a_flat_optimiser_it_is_lsq(run):
    model, trainer, batch = quantized(run, flat_optimizer="none")
    task, _ = both_gradients(model, batch, 0.05, 0.001)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one_step(run, model, trainer, batch)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close((before[name] - parameter.detach()) / RATE, task[name], rtol=1e-2, atol=5e-5)


def test_gradients_that_are_not_finite_skip_the_step(run):
    model, trainer, batch = quantized(run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[0].layer.weight.register_hook(lambda grad: grad * float("nan"))
    one_step(run, model, trainer, batch)
    assert trainer.tracker.skipped == 1 and trainer.tracker.window == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_cannot_work_is_said(run):
    model, trainer, batch = quantized(run, alpha=1000.0)
    one_step(run, model, trainer, batch)
    one_step(run, model, trainer, batch, 1)
    assert sum("is above rho, so the perturbation descends" in line for line in run.log.warnings) == 1
    run.train = run.train.model_copy(update={"epochs": 1})
    GAQAT(GAQATConfig(window=5000)).transform(model=net(), run=run)
    assert any("fewer than the window of 5000; nothing can freeze" in line for line in run.log.warnings)
    run.train = run.train.model_copy(update={"accumulate": 2})
    with pytest.raises(RequestError, match="leave out --accumulate"):
        GAQAT().transform(model=net(), run=run)
    run.precision = "fp16"
    with pytest.raises(RequestError, match="--precision fp16 skipped steps would enter its history"):
        GAQAT().transform(model=net(), run=run)
    with pytest.raises(ConfigError, match="window must be at least 4, got 3"):
        check_config("quant_gaqat", GAQATConfig, {"window": 3})


def test_rotation_is_the_affine_map_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for angle in ANGLES:
        radians = np.deg2rad(angle)
        matrix = np.array([[np.cos(radians), -np.sin(radians)], [np.sin(radians), np.cos(radians)]])
        centre = np.array([3.5, 3.5])
        for image, found in zip(images[:, 0].numpy(), rotate(images, angle)[:, 0].numpy(), strict=True):
            expected = ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=1, mode="constant")
            inside = ndimage.affine_transform(
                np.ones((8, 8)), matrix, centre - matrix @ centre, order=1, mode="constant"
            )
            np.testing.assert_allclose(found[inside > 0.999], expected[inside > 0.999], atol=1e-5)


def digits(target=60, seed=0):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    return load_data(f"rotated_digits?target={target}&seed={seed}", sources=Domains.data_sources)


def test_domains_share_no_image_and_batches_take_as_many_of_each_source():
    data = digits()
    assert list(data.validation) == ["-30", "0", "30"] and data.target == "60" and len(data.train.domains) == 3
    batch = data.train.batch(range(5))
    assert batch["image"].shape == (15, 1, 8, 8) and len(batch["label"]) == 15
    sizes = [len(part) for part in (*data.validation.values(), *data.train.domains, data.test)]
    assert sum(sizes) == 1797
    upright = data.validation["0"].batch(range(3))["image"]
    whole = load_data("digits?seed=0")
    known = torch.cat([whole.split(name).batch(range(len(whole.split(name))))["image"] for name in ("train", "test")])
    assert all(any(torch.allclose(one, other, atol=1e-5) for other in known) for one in upright)
    assert data.fingerprint() != digits(seed=1).fingerprint()


def test_joined_splits_keep_the_order_asked_for():
    data = pytest.importorskip("sklearn") and load_data("digits?seed=0")
    train = data.split("train")
    joined = Joined(Part(train, range(5)), Part(train, range(5, 9)))
    asked = [7, 0, 8, 3]
    assert torch.equal(joined.batch(asked)["image"], train.batch(asked)["image"]) and len(joined) == 9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rotated_digits", r"name the domain to hold out, \?target=NAME; domains are -30, 0, 30, 60"),
        ("rotated_digits?target=45", "no domain '45'"),
        ("rotated_digits?target=0&train=5", "option 'train' is unknown; known are target and seed"),
    ],
)
def test_wrong_domains_are_named(text, message):
    with pytest.raises(DataError, match=message):
        rotated_digits(DataSpec.parse(text), None)


def test_folders_need_two_sources(tmp_path):
    for name in ("photo", "sketch"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="1 source domain is left beside 'sketch'; at least 2 are needed"):
        load_data(f"domains:{tmp_path}?target=sketch", sources=Domains.data_sources)


def test_folders_of_domains_load(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    for number, domain in enumerate(("art", "photo", "sketch")):
        for label in ("cat", "dog"):
            folder = tmp_path / domain / label
            folder.mkdir(parents=True)
            for index in range(5):
                pil.new("L", (8, 8), 40 * number + index).save(folder / f"{index}.png")
    data = load_data(f"domains:{tmp_path}?target=photo", sources=Domains.data_sources)
    assert len(data.test) == 10 and len(data.train) == 8 and sorted(data.validation) == ["art", "sketch"]


def test_accuracy_by_domain_and_sharpness(run):
    data = digits()
    task = Classification(ClassificationOptions.model_validate(data.task.options))
    own = dataclasses.replace(run, task=task, data=data)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    rows = domain_accuracy(model, data, own)
    assert [(row["domain"], row["role"]) for row in rows][0] == ("60", "target") and len(rows) == 4
    before = model[1].weight.detach().clone()
    assert sharpness(model, own, 0.05) > 0 and torch.equal(model[1].weight, before)


def test_trainers_know_the_learned_steps(run):
    model, trainer, _ = quantized(run)
    assert isinstance(trainer, Trainer) and len(scale_names(model)) == 6
