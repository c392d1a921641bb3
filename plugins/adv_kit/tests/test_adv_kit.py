"""adv_kit: losses, threat models and projections against references; attacks where the answer is known; bookkeeping."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.data import load_data
from eff.errors import DataError, RunError, UnsupportedModelError
from eff.log import Log
from eff.run import Run
from eff.schemas import CORE_TRAINING, DataSpec
from eff.session import Plugins
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import DATA, TinyCNN, blobs
from eff.training import Training
from eff_adv_kit.apgd import APGD, TargetedAPGD, checkpoints
from eff_adv_kit.checks import Subset, find_signs
from eff_adv_kit.classifier import Classifier, attacked, check_classes
from eff_adv_kit.draws import Draws
from eff_adv_kit.fab import TargetedFAB, search_boundary, to_hyperplane
from eff_adv_kit.files import record_columns, write_examples, write_records
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.interval import wilson
from eff_adv_kit.losses import (
    LOSSES,
    TARGETED_LOSSES,
    dlr,
    dlr_targeted,
    logit_margin,
    mifpe,
    probability_margin,
    probability_margin_targeted,
    runner_up,
)
from eff_adv_kit.pgd import PGD, Noise
from eff_adv_kit.runner import CLEAN, STANDING, Plan, run_sequence
from eff_adv_kit.square import Square, bump, changed_share, move_l2, move_linf, side, two_bumps
from eff_adv_kit.threat import Threat
from eff_adv_kit.training import AdversarialTraining, InnerAttack, divergence

CPU = torch.device("cpu")
GRADIENT_ATTACKS = [PGD("ce", 60), PGD("margin", 60), PGD("pm", 60), APGD("ce", 60), TargetedAPGD("margin", 60, 3)]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- losses


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 12), scale=st.floats(0.1, 5))
def test_the_gradient_of_the_probability_margin_is_the_cards_formula(seed, classes, scale):
    z = (scale * normal(5, classes, seed=seed)).requires_grad_(True)
    y = torch.randint(0, classes, (5,), generator=torch.Generator().manual_seed(seed))
    (found,) = torch.autograd.grad(probability_margin(z, y).sum(), z)
    p, z_detached = z.detach().softmax(1), z.detach()
    for n in range(5):
        others = [k for k in range(classes) if k != int(y[n])]
        j = max(others, key=lambda k, n=n: float(z_detached[n, k]))
        margin = p[n, j] - p[n, y[n]]
        wanted = [p[n, k] * ((k == j) - (k == int(y[n]))) - p[n, k] * margin for k in range(classes)]
        assert found[n].tolist() == pytest.approx([float(value) for value in wanted], abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), classes=st.integers(4, 12))
def test_dlr_is_that_of_a_loop(seed, classes):
    z = 3 * normal(6, classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (6,), generator=generator)
    t = (y + torch.randint(1, classes, (6,), generator=generator)) % classes
    for n, row in enumerate(z.tolist()):
        ordered = sorted(row, reverse=True)
        best = max(value for k, value in enumerate(row) if k != int(y[n]))
        plain = -(row[y[n]] - best) / (ordered[0] - ordered[2] + 1e-12)
        targeted = -(row[y[n]] - row[t[n]]) / (ordered[0] - 0.5 * (ordered[2] + ordered[3]) + 1e-12)
        assert dlr(z, y)[n].item() == pytest.approx(plain, rel=1e-9)
        assert dlr_targeted(z, y, t)[n].item() == pytest.approx(targeted, rel=1e-9)


def test_mifpe_is_cross_entropy_of_logits_over_their_gap_which_has_no_gradient():
    z = torch.tensor([[5.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0])
    value = mifpe(z, y)
    scaled = torch.tensor([5.0, 1.0, 0.0], dtype=torch.float64) / 4
    assert value.item() == pytest.approx(-math.log(scaled.softmax(0)[0]), rel=1e-9)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient[0].tolist() == pytest.approx(((scaled.softmax(0) - torch.tensor([1.0, 0, 0])) / 4).tolist())


def test_the_runner_up_is_found_among_logits_of_any_size():
    z = torch.tensor([[1e8, 3e8, 2e8], [0.0, -1e30, -2e30]], dtype=torch.float64)
    assert runner_up(z, torch.tensor([1, 0])).tolist() == [2, 1]
    assert logit_margin(z, torch.tensor([1, 1])).tolist() == [-1e8, 1e30]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_one_finite_value_per_sample_that_grows_towards_the_other_class(name):
    near, far = torch.tensor([[2.0, 1.9, -1.0]]), torch.tensor([[2.0, 0.0, -1.0]])
    y = torch.tensor([0])
    assert LOSSES[name](near, y).shape == (1,)
    if name != "mifpe":  # the gap of the first two logits is its unit
        assert LOSSES[name](near, y) > LOSSES[name](far, y)


@pytest.mark.parametrize("name", sorted(TARGETED_LOSSES))
def test_every_targeted_loss_is_larger_nearer_to_the_target(name):
    z = torch.tensor([[3.0, 1.0, 2.0, -1.0]]).repeat(2, 1)
    near, far = TARGETED_LOSSES[name](z, torch.tensor([0, 0]), torch.tensor([2, 3])).tolist()
    assert near > far


def test_the_targeted_probability_margin_by_hand():
    z = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    assert probability_margin_targeted(z, torch.tensor([2]), torch.tensor([1])).item() == pytest.approx((2 - 5) / 8)


# --- threat models


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 3), norm=st.sampled_from(["linf", "l2"]))
def test_a_projection_is_allowed_and_leaves_what_is_allowed(seed, eps, norm):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    threat = Threat(norm, eps)
    far = x + 2 * normal(4, 2, 3, 3, seed=seed + 1)
    once = threat.project(far, x)
    assert (threat.distance(once, x) <= eps + 1e-12).all() and once.min() >= 0 and once.max() <= 1
    assert torch.allclose(threat.project(once, x), once, atol=1e-12)
    if norm == "linf":  # the nearest allowed point: coordinate by coordinate
        wanted = np.clip(far.numpy(), np.maximum(x.numpy() - eps, 0), np.minimum(x.numpy() + eps, 1))
        assert np.allclose(once.numpy(), wanted)


def test_the_l2_ball_keeps_directions_and_shortens():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert torch.allclose(Threat("l2", 1.0).into_ball(delta), torch.tensor([[0.6, 0.8], [0.3, 0.4]]))


def test_the_direction_of_a_tiny_gradient_has_length_1_and_of_none_is_0():
    gradient = torch.tensor([[3e-30, 4e-30], [0.0, 0.0]])
    assert torch.allclose(Threat("l2", 1.0).direction(gradient), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert Threat("linf", 1.0).direction(gradient).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_fill_the_ball(norm):
    x = torch.full((400, 1, 2, 2), 0.5)
    threat = Threat(norm, 0.2)
    distance = threat.distance(threat.random_start(x, Draws(0, torch.arange(400)), "a"), x)
    assert distance.max() <= 0.2 + 1e-6
    # The share of a ball within half its radius is 2^-4 in four dimensions: 25 of 400, standard deviation 4.8.
    assert 8 <= int((distance < 0.1).sum()) <= 45


# --- random numbers


def test_draws_belong_to_sample_name_and_seed_alone():
    ids = torch.tensor([3, 5, 1_000_000])
    one = Draws(0, ids).uniform("a", (2, 3))
    assert torch.equal(Draws(0, ids[1:2]).uniform("a", (2, 3)), one[1:2])
    assert torch.equal(Draws(0, ids).take(torch.tensor([False, False, True])).uniform("a", (2, 3)), one[2:])
    assert not torch.equal(Draws(1, ids).uniform("a", (2, 3)), one)
    assert not torch.equal(Draws(0, ids).uniform("b", (2, 3)), one)


def test_draws_are_uniform_normal_and_unrelated_between_neighbours():
    stats = pytest.importorskip("scipy.stats", reason="the reference is scipy")
    draws = Draws(7, torch.arange(100))
    uniform, bell = draws.uniform("u", (100,)), draws.normal("n", (100,))
    assert uniform.min() >= 0 and uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(bell.flatten().numpy(), "norm").pvalue > 1e-3
    for a, b in ((uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.05  # 5 standard deviations


# --- APGD and FAB against references


def test_the_checkpoints_of_100_steps_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@settings(deadline=None)
@given(steps=st.integers(1, 400))
def test_checkpoints_are_where_a_counter_puts_them(steps):
    window, counter, wanted = max(int(0.22 * steps), 1), 0, []
    for step in range(1, steps + 1):  # as AutoAttack counts
        counter += 1
        if counter == window:
            wanted.append(step)
            counter, window = 0, max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    assert checkpoints(steps) == wanted


def planes(seed, dimensions=7):
    generator = np.random.default_rng(seed)
    x, w = generator.uniform(0, 1, dimensions), generator.normal(size=dimensions)
    inside = generator.uniform(0, 1, dimensions)  # a point of the box on the plane: it can be reached
    return x, w, -float(w @ inside)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_linf_move_to_a_plane_inside_the_box_is_that_of_linear_programming(seed):
    optimize = pytest.importorskip("scipy.optimize", reason="the reference is scipy")
    x, w, b = planes(seed)
    n = len(x)
    d = to_hyperplane(*(torch.tensor(value, dtype=torch.float64)[None] for value in (x, w, b)), "linf")[0].numpy()
    solved = optimize.linprog(  # minimise t with |d_i| <= t
        np.r_[np.zeros(n), 1.0], A_eq=np.r_[w, 0.0][None], b_eq=[-(w @ x + b)],
        A_ub=np.block([[np.eye(n), -np.ones((n, 1))], [-np.eye(n), -np.ones((n, 1))]]), b_ub=np.zeros(2 * n),
        bounds=[*((-value, 1 - value) for value in x), (0, None)],
    )  # fmt: skip
    assert abs(w @ (x + d) + b) < 1e-9 and (x + d).min() > -1e-12 and (x + d).max() < 1 + 1e-12
    assert np.abs(d).max() == pytest.approx(solved.fun, abs=1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_l2_move_to_a_plane_inside_the_box_is_that_of_a_solver(seed):
    optimize = pytest.importorskip("scipy.optimize", reason="the reference is scipy")
    x, w, b = planes(seed)
    d = to_hyperplane(*(torch.tensor(value, dtype=torch.float64)[None] for value in (x, w, b)), "l2")[0].numpy()
    solved = optimize.minimize(
        lambda d: d @ d, np.zeros_like(x), jac=lambda d: 2 * d, method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        constraints={"type": "eq", "fun": lambda d: w @ (x + d) + b, "jac": lambda d: w},
        bounds=[(-value, 1 - value) for value in x],
    )  # fmt: skip
    assert abs(w @ (x + d) + b) < 1e-9 and (x + d).min() > -1e-12 and (x + d).max() < 1 + 1e-12
    assert np.linalg.norm(d) == pytest.approx(math.sqrt(solved.fun), abs=1e-5)


def test_a_plane_beyond_the_box_is_approached_as_far_as_the_box_goes():
    x, w = torch.tensor([[0.2, 0.7]]), torch.tensor([[1.0, -2.0]])
    for norm in ("linf", "l2"):
        d = to_hyperplane(x, w, torch.tensor([-50.0]), norm)
        assert (x + d)[0].tolist() == pytest.approx([1.0, 0.0])


# --- a linear classifier, where the smallest perturbation is known


class Images:
    """A split made of tensors."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def batch(self, indices, generator=None):
        return {"image": self.x[list(indices)], "label": self.y[list(indices)]}

    def fingerprint(self):
        return "images"


def linear(samples=24, classes=4, seed=0):
    """Return weights, images far inside the box, and the smallest perturbations by norm."""
    w = normal(classes, 12, seed=seed, dtype=torch.float32)
    x = 0.5 + 0.01 * normal(samples, 3, 2, 2, seed=seed + 1, dtype=torch.float32)
    z = x.flatten(1) @ w.T
    b = -z.mean(0)
    z = z + b
    y = z.argmax(1)
    gap = (z.gather(1, y[:, None]) - z).clamp(min=0)
    difference = w[y][:, None] - w[None]
    smallest = {}
    for norm, dual in (("linf", difference.abs().sum(2)), ("l2", difference.norm(dim=2))):
        ratio = gap / dual.clamp(min=1e-12)
        smallest[norm] = ratio.scatter(1, y[:, None], torch.inf).amin(1)
    return Classifier(lambda image: image.flatten(1) @ w.T + b), x, y, smallest


def outcome_of(classifier, x, y, threat, *attacks, **changes):
    plan = Plan(threat, attacks, **{"batch_size": 8, **changes})
    return run_sequence(classifier, Images(x, y), plan, CPU, changes.pop("log", Log()))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", GRADIENT_ATTACKS, ids=lambda attack: attack.name)
def test_attacks_find_the_smallest_perturbation_of_a_linear_classifier(attack, norm):
    # Without targets the nearest class in logits need not be the nearest in the image: two classes decide it.
    classifier, x, y, smallest = linear(classes=4 if attack.name == "apgd_t" else 2)
    for n in range(0, len(x), 4):
        size = float(smallest[norm][n])
        for factor, broken in ((1.03, True), (0.97, False)):
            hunt = Hunt(x[n : n + 1], y[n : n + 1], Draws(0, torch.tensor([n])))
            attack(classifier, Threat(norm, factor * size), hunt)
            assert hunt.done is broken


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fab_measures_the_smallest_perturbation_of_a_linear_classifier(norm):
    classifier, x, y, smallest = linear()
    best = torch.full((len(x),), torch.inf)
    for offset in (1, 2, 3):
        target = (y + offset) % 4
        best = torch.minimum(best, search_boundary(classifier, norm, x, y, lambda t=target: t, 30).distance)
    ratio = best / smallest[norm]  # overshoot 1.05 from a point at 0.9: 0.9 + 1.05 * 0.1 = 1.005 is where it settles
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.007
    eps = 1.02 * float(smallest[norm].median())
    hit = outcome_of(classifier, x, y, Threat(norm, eps), TargetedFAB(30, 3))
    assert hit.last.standing == int((smallest[norm] > eps).sum())


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", [Square(200), Noise()], ids=["square", "noise"])
def test_attacks_without_gradients_break_nothing_that_cannot_be_broken(attack, norm):
    classifier, x, y, smallest = linear()
    outcome = outcome_of(classifier, x, y, Threat(norm, 0.99 * float(smallest[norm].min())), attack)
    assert outcome.last.broken == 0
    far = outcome_of(classifier, x, y, Threat(norm, 3 * float(smallest[norm].max())), Square(200))
    assert far.last.standing == 0


# --- Square


def test_the_squares_shrink_as_in_the_paper():
    assert [changed_share(q, 10_000, 0.8) for q in (0, 10, 11, 51, 201, 8001)] == [0.8, 0.8, 0.4, 0.2, 0.1, 0.8 / 512]
    assert changed_share(6, 5000, 0.8) == 0.4  # shrinks with the number of queries
    assert [side(share, 32, 32, odd=False) for share in (0.8, 0.05, 1e-9)] == [29, 7, 1]
    assert [side(share, 32, 32, odd=True) for share in (0.8, 0.06, 1e-9)] == [29, 9, 3]


def test_square_counts_each_query_of_each_standing_sample_once():
    classifier, x, y, smallest = linear()
    queries = []
    classifier.tick = lambda: queries.append(1)
    hunt = Hunt(x, y, Draws(0, torch.arange(len(x))))
    Square(37)(classifier, Threat("linf", 0.5 * float(smallest["linf"].min())), hunt)
    assert classifier.forwards == 37 * len(x) and len(queries) == 37 and classifier.gradients == 0


def test_square_stops_asking_where_all_are_broken():
    classifier, x, y, smallest = linear()
    Square(50)(classifier, Threat("linf", 0.4), Hunt(x, y, Draws(0, torch.arange(len(x)))))
    assert len(x) <= classifier.forwards < 50 * len(x)


def test_a_square_changes_one_square_to_one_colour_per_channel():
    delta = torch.zeros(5, 3, 64)
    moved = move_linf(delta, Threat("linf", 0.1), Draws(0, torch.arange(5)), "q", (3, 8, 8)).view(5, 3, 8, 8)
    for image in moved:
        rows, columns = image[0].nonzero(as_tuple=True)
        assert len(rows) == 9 and rows.max() - rows.min() == 2 and columns.max() - columns.min() == 2
        for channel in image:
            assert torch.equal(channel != 0, image[0] != 0) and channel[channel != 0].unique().numel() == 1
    assert torch.allclose(moved.abs()[moved != 0], torch.tensor(0.1))


def test_an_l2_move_keeps_the_whole_budget():
    threat = Threat("l2", 0.7)
    delta = threat.into_ball(normal(6, 3, 64, dtype=torch.float32)) * 0.8
    moved = move_l2(delta, threat, Draws(0, torch.arange(6)), "q", (3, 8, 8))
    assert moved.flatten(1).norm(dim=1).tolist() == pytest.approx([0.7] * 6, rel=1e-5)


def test_bumps_rise_to_the_middle_and_the_two_are_opposite():
    assert bump(3, 3).norm().item() == pytest.approx(1) and int(bump(3, 3).argmax()) == 4
    eta = two_bumps(5)
    assert eta.norm().item() == pytest.approx(1) and (eta[:2] > 0).all() and (eta[2:] < 0).all()


# --- who stands


def test_misclassified_samples_are_never_attacked_and_count_as_not_robust():
    classifier, x, y, smallest = linear()
    wrong = y.clone()
    wrong[:6] = (wrong[:6] + 1) % 4
    outcome = outcome_of(classifier, x, wrong, Threat("linf", 0.4), PGD("margin", 10), keep=100)
    assert (outcome.records.broken_by[:6] == CLEAN).all() and outcome.clean.standing == 18
    assert outcome.stages[0].attacked == 18 and min(outcome.examples.index) >= 6
    assert (outcome.records.distance[:6] == 0).all()


@pytest.mark.parametrize("standing", [0, 1, 2])
@pytest.mark.parametrize("attack", [*GRADIENT_ATTACKS, TargetedFAB(5, 3), Square(5), Noise(2)], ids=lambda a: a.name)
def test_a_single_survivor_and_none_are_fine(attack, standing):
    classifier, x, y, smallest = linear(samples=9)
    labels = (y + 1) % 4
    labels[:standing] = y[:standing]
    outcome = outcome_of(classifier, x, labels, Threat("linf", 1e-5), attack, attack)
    assert [stage.standing for stage in outcome.stages] == [standing, standing]
    assert outcome.stages[1].attacked == standing


def test_each_attack_sees_the_survivors_of_those_before_and_the_union_counts():
    classifier, x, y, smallest = linear()
    eps = float(smallest["linf"].median())
    outcome = outcome_of(classifier, x, y, Threat("linf", eps), Noise(3), PGD("margin", 40), Square(30))
    attacked = [stage.attacked for stage in outcome.stages]
    assert attacked == [24, outcome.stages[0].standing, outcome.stages[1].standing]
    assert outcome.last.standing == int((outcome.records.broken_by == STANDING).sum())
    assert outcome.last.standing == pytest.approx(int((smallest["linf"] > eps).sum()), abs=1)
    inside = outcome.records.distance <= eps * (1 + 1e-5)
    assert inside.all() and (outcome.records.adversarial_margin[outcome.records.broken_by >= 0] <= 0).all()


def test_hunt_keeps_the_first_adversarial_image():
    x, y = torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.long)
    hunt = Hunt(x, y, Draws(0, torch.arange(3)))
    hunt.settle(x + 0.1, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]))
    hunt.settle(hunt.x + 0.2, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert hunt.found.flatten().tolist() == pytest.approx([0.1, 0.0, 0.2]) and hunt.left.tolist() == [1]
    assert hunt.left.ndim == 1 and len(hunt.x) == len(hunt.y) == len(hunt.draws.ids) == 1


# --- a small network


@pytest.fixture(scope="module")
def trained():
    """Return a classifier of the tiny data, and what is needed to run it."""
    data = blobs(DataSpec.parse(DATA))
    torch.manual_seed(0)
    run = Run(Classification(ClassificationOptions(**data.task.options)), CPU, data=data, training=True)
    run.train = CORE_TRAINING.model_copy(update={"epochs": 12, "batch_size": 32, "lr": 0.1})
    model = TinyCNN()
    Training(model, run, Plugins((), extensions=())).run_all()
    return model.eval(), run


ALL = (PGD("ce", 4), APGD("dlr", 6), TargetedAPGD("dlr", 4, 2), TargetedFAB(3, 2), Square(12))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_result_does_not_depend_on_the_batch_size(trained, norm):
    model, run = trained
    threat = Threat(norm, 0.06 if norm == "linf" else 0.4)
    results = []
    for size in (1, 5, 16):
        with attacked(model, run) as classifier:
            outcome = run_sequence(classifier, Subset(run.data.test, range(16)), Plan(threat, ALL, size), CPU, Log())
        results.append(outcome.records)
    assert 0 < results[0].robust.sum() < 16
    for records in results[1:]:
        assert np.array_equal(records.broken_by, results[0].broken_by)
        assert np.allclose(records.distance, results[0].distance, atol=1e-4)


def test_the_seed_decides_the_starts(trained):
    model, run = trained
    distances = []
    for seed in (0, 0, 1):
        with attacked(model, run) as classifier:
            plan = Plan(Threat("linf", 0.1), (PGD("ce", 3),), seed=seed)
            distances.append(run_sequence(classifier, run.data.test, plan, CPU, Log()).records.adversarial_margin)
    assert np.array_equal(distances[0], distances[1]) and not np.array_equal(distances[0], distances[2])


def test_the_model_comes_back_in_its_mode_and_trainable_also_after_an_error(trained):
    model, run = trained
    model.train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    model.zero_grad()
    try:
        with pytest.raises(ZeroDivisionError), attacked(model, run) as classifier:
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            classifier.gradient(run.data.test.batch([0])["image"], lambda z: z[:, 0])
            raise ZeroDivisionError
        assert model.training and model.conv1.training and not model.bn1.training
        assert model.fc.bias.requires_grad and not model.fc.weight.requires_grad
        assert all(parameter.grad is None for parameter in model.fc.parameters())
    finally:
        model.fc.weight.requires_grad_(True)
        model.eval()


def test_attacks_work_where_the_caller_has_switched_gradients_off(trained):
    model, run = trained
    plan = Plan(Threat("linf", 0.2), (PGD("ce", 5),))
    standing = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context(), attacked(model, run) as classifier:
            standing.append(run_sequence(classifier, run.data.test, plan, CPU, Log()).last.standing)
    assert standing[0] == standing[1] == standing[2] < 128


def test_the_normalisation_of_the_model_is_part_of_what_is_attacked(trained):
    model, run = trained
    batch = run.data.test.batch([0, 1])
    with attacked(model, run) as classifier:
        assert torch.allclose(classifier.logits(batch["image"]), model((batch["image"] - 0.3) / 0.25), atol=1e-6)


def test_passes_are_counted_and_averaged_for_randomised_models():
    values = iter(range(100))
    classifier = Classifier(lambda image: image.flatten(1) * next(values), eot=4)
    x = torch.ones(3, 2, 1, 1)
    logits, gradient = classifier.gradient(x, lambda z: z[:, 0])
    assert logits[0].tolist() == [1.5, 1.5] and gradient[0].flatten().tolist() == [1.5, 0.0]
    assert (classifier.gradients, classifier.forwards) == (12, 12)
    classifier.logits(x)
    assert (classifier.gradients, classifier.forwards) == (12, 24)


def test_images_can_be_rounded_to_256_levels_before_the_model_sees_them():
    classifier = Classifier(lambda image: image.flatten(1), eight_bit=True)
    logits, gradient = classifier.gradient(torch.tensor([0.5, 0.1]).view(1, 2, 1, 1), lambda z: z.sum(1))
    assert (logits * 255).tolist()[0] == pytest.approx([128, 26], abs=1e-3) and gradient.flatten().tolist() == [1, 1]


# --- bad input


def refusal(kind, x=None, y=None, forward=None, match=""):
    x = torch.full((3, 1, 2, 2), 0.5) if x is None else x
    y = torch.zeros(len(x), dtype=torch.long) if y is None else y
    classifier = Classifier(forward or (lambda image: image.flatten(1)))
    with pytest.raises(kind, match=match):
        outcome_of(classifier, x, y, Threat(), PGD("ce", 2))


def test_images_outside_the_box_are_refused():
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1, 0, 0, 0] = 255.0
    refusal(
        DataError, x, match=r"image 1 of the test split has pixels from 0.5 to 255; attacks need images in \[0, 1\]"
    )
    x[1, 0, 0, 0] = torch.nan
    refusal(DataError, x, match="image 1 of the test split has pixels from nan")


def test_labels_without_an_output_are_refused():
    refusal(
        DataError,
        y=torch.tensor([0, 4, 0]),
        match="image 1 of the test split has label 4; the model has classes 0 to 3",
    )


def test_one_class_is_refused():
    refusal(UnsupportedModelError, forward=lambda image: image.flatten(1)[:, :1], match="needs at least 2 classes")


def test_an_output_that_is_no_table_of_logits_is_refused():
    refusal(UnsupportedModelError, forward=lambda image: image, match=r"shape \(3, 1, 2, 2\); attacks need logits")


def test_nan_logits_are_an_error():
    refusal(RunError, forward=lambda image: image.flatten(1) * torch.nan, match="NaN or infinite logits")


def test_no_samples_are_refused():
    refusal(DataError, x=torch.zeros(0, 1, 2, 2), match="no samples to attack")


def test_losses_that_need_more_classes_are_refused_with_a_way_out():
    with pytest.raises(UnsupportedModelError, match="has 2 classes, loss 'dlr' needs 3; use loss margin or pm"):
        check_classes(2, ("dlr",))
    with pytest.raises(UnsupportedModelError, match="has 3 classes, targeted 'dlr' needs 4; use target_loss=margin"):
        check_classes(3, (), ("dlr",))
    check_classes(4, ("dlr",), ("dlr",))


def test_probabilities_are_warned_of():
    log = Log()
    classifier = Classifier(lambda image: image.flatten(1).softmax(1))
    run_sequence(classifier, Images(torch.rand(4, 1, 2, 2), torch.zeros(4).long()), Plan(Threat(), ()), CPU, log)
    assert len(log.warnings) == 1 and "returns probabilities (rows sum to 1)" in log.warnings[0]


# --- signs of masked gradients


class Masked(nn.Module):
    """A model behind something that hides its gradients."""

    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x):
        if self.how == "quantized":
            x = torch.round(x * 4) / 4
        z = self.model(x + 0.3 * torch.randn_like(x) if self.how == "random" else x)
        return z * 100 if self.how == "sharp" else z


def signs(trained, how, eot=1):
    model, run = trained
    torch.manual_seed(0)
    with attacked(Masked(model, how), run, eot) as classifier:
        found = find_signs(classifier, run.data.test, Plan(Threat("linf", 0.1), ()), np.arange(48), CPU)
    return {sign.name: sign for sign in found}


def test_an_ordinary_model_shows_no_sign(trained):
    assert not [name for name, sign in signs(trained, "plain").items() if sign.flagged]


def test_sharpened_logits_show_in_the_cross_entropy(trained):
    found = signs(trained, "sharp")
    assert found["zero_ce"].flagged and "loss=margin" in found["zero_ce"].advice
    assert found["margin_beats_ce"].flagged and not found["zero_margin"].flagged


def test_a_rounding_layer_shows_in_the_margin_and_against_a_black_box(trained):
    found = signs(trained, "quantized")
    assert found["zero_margin"].value == 100 and found["zero_margin"].flagged
    assert "straight-through" in found["zero_margin"].advice
    assert found["black_box"].flagged


def test_a_randomised_model_shows_and_eot_is_advised(trained):
    found = signs(trained, "random")
    assert found["random"].flagged and "set eot to 10" in found["random"].advice


def test_signs_of_no_samples_are_none(trained):
    model, run = trained
    with attacked(model, run) as classifier:
        assert find_signs(classifier, run.data.test, Plan(Threat(), ()), np.arange(0), CPU) == []


# --- intervals, files, training


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 3000), share=st.floats(0, 1))
def test_the_ends_of_the_interval_are_where_the_score_test_turns(samples, share):
    successes = round(share * samples)
    found = successes / samples
    for p in wilson(successes, samples):  # (found - p)^2 = z^2 p (1 - p) / n
        assert (found - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / samples, abs=1e-12)


def test_the_interval_of_8_in_10_is_that_of_the_tables():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 of 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, 1.0)


@pytest.mark.parametrize("format", ["npz", "parquet"])
def test_records_are_written_and_say_what_broke_each_sample(tmp_path, format):
    classifier, x, y, smallest = linear()
    y = y.clone()
    y[0] = (y[0] + 1) % 4
    outcome = outcome_of(classifier, x, y, Threat("linf", float(smallest["linf"].median())), PGD("margin", 30))
    path = tmp_path / f"records.{format}"
    if format == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    write_records(outcome, path, format)
    table = dict(np.load(path)) if format == "npz" else parquet.read_table(path).to_pydict()
    wanted = record_columns(outcome)
    assert list(table) == list(wanted) and all(list(table[name]) == list(wanted[name]) for name in wanted)
    assert table["broken_by"][0] == "clean" and set(table["broken_by"][1:]) == {"pgd_margin", ""}
    for ok, robust, by in zip(table["clean_ok"], table["robust"], table["broken_by"], strict=True):
        assert robust == (by == "") and ok == (by != "clean")


def test_adversarial_images_are_data_for_eff(tmp_path):
    classifier, x, y, smallest = linear()
    outcome = outcome_of(classifier, x, y, Threat("linf", 0.4), PGD("margin", 30), keep=5)
    write_examples(outcome, tmp_path / "adversarial.npz", ("a", "b", "c", "d"))
    split = load_data(f"npz:{tmp_path / 'adversarial.npz'}").split("test")
    batch = split.batch(range(len(split)))
    assert len(split) == 5 and batch["image"].shape == (5, 3, 2, 2)
    assert (classifier.logits(batch["image"]).argmax(1) != batch["label"]).all()


def test_own_predictions_serve_as_labels():
    classifier, x, y, smallest = linear()
    none = torch.full_like(y, 99)  # no labels
    eps = float(smallest["linf"].median())
    own = outcome_of(classifier, x, none, Threat("linf", eps), PGD("margin", 30), own_labels=True)
    assert own.clean.standing == 24
    known = outcome_of(classifier, x, y, Threat("linf", eps), PGD("margin", 30))
    assert np.array_equal(own.records.broken_by, known.records.broken_by)


def test_divergence_is_that_of_torch_distributions():
    p, z = normal(4, 5).softmax(1), normal(4, 5, seed=1)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=p), torch.distributions.Categorical(logits=z)
    )
    assert torch.allclose(divergence(p, z), wanted)


@pytest.mark.parametrize("kind", ["at", "trades"])
def test_adversarial_training_makes_a_model_more_robust(trained, kind):
    plain, run = trained
    model = copy.deepcopy(plain)
    plugins = Plugins((), extensions=())
    plugins.manager.register(AdversarialTraining(InnerAttack(Threat("linf", 0.1), 3), kind), "adversarial training")
    run.train = CORE_TRAINING.model_copy(update={"epochs": 8, "batch_size": 32, "lr": 0.05})
    Training(model, run, plugins).run_all()
    accuracy = {}
    for name, net in (("plain", plain), ("hard", model)):
        with attacked(net, run) as classifier:
            plan = Plan(Threat("linf", 0.1), (PGD("ce", 10),))
            accuracy[name] = run_sequence(classifier, run.data.test, plan, CPU, Log()).last.robust_accuracy
    assert accuracy["hard"] >= accuracy["plain"] + 10


def test_the_inner_attack_stays_in_the_ball_and_leaves_no_gradients(trained):
    model, run = trained
    model.zero_grad()
    batch = run.data.test.batch(range(16))
    inner = InnerAttack(Threat("l2", 0.3), 3)
    x_adv = inner(model, run, batch["image"], lambda z: -z[:, 0])
    assert inner.threat.distance(x_adv, batch["image"]).max() <= 0.3 + 1e-6 and 0 <= x_adv.min() <= x_adv.max() <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
