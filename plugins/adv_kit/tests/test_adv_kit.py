"""Losses, balls and attacks against autograd, float64 loops, scipy and closed forms of linear classifiers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import DataError, RunError, UnsupportedModelError
from eff.log import Log
from eff.run import Run
from eff.tasks import Classification, ClassificationOptions
from eff.testing.samples import TinyCNN
from eff_adv_kit.apgd import APGD, TargetedAPGD, checkpoints
from eff_adv_kit.classifier import Classifier, attacked, check_classes, check_images
from eff_adv_kit.draws import Draws
from eff_adv_kit.fab import TargetedFAB, to_hyperplane
from eff_adv_kit.interval import wilson
from eff_adv_kit.losses import LOSSES, TARGETED_LOSSES, dlr, dlr_targeted, logit_margin, mifpe, probability_margin
from eff_adv_kit.obfuscation import look_for_signs
from eff_adv_kit.pgd import PGD, Noise
from eff_adv_kit.runner import CLEAN, STANDING, Plan, run_sequence
from eff_adv_kit.square import Square
from eff_adv_kit.threat import Threat
from eff_adv_kit.training import InnerAttack, adversarial_loss

CPU = torch.device("cpu")


# --- losses


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), classes=st.integers(2, 8), scale=st.floats(0.01, 20))
def test_the_gradient_of_the_probability_margin_is_the_papers_formula(seed, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    z = (scale * torch.randn(5, classes, generator=generator, dtype=torch.float64)).requires_grad_(True)
    y = torch.randint(classes, (5,), generator=generator)
    probability_margin(z, y).sum().backward()
    p = z.detach().softmax(1)
    for row in range(5):
        others = [k for k in range(classes) if k != y[row]]
        j = max(others, key=lambda k, row=row: float(p[row, k]))
        margin = p[row, j] - p[row, y[row]]
        for k in range(classes):
            expected = p[row, k] * ((k == j) - float(k == y[row])) - p[row, k] * margin
            assert float(z.grad[row, k]) == pytest.approx(float(expected), abs=1e-12)


def test_margins_and_ratios_equal_a_loop():
    z = torch.randn(20, 6, dtype=torch.float64)
    y, t = torch.randint(6, (20,)), torch.randint(6, (20,))
    for row in range(20):
        values = z[row].tolist()
        own, best = values[y[row]], max(v for k, v in enumerate(values) if k != y[row])
        ordered = sorted(values, reverse=True)
        assert float(logit_margin(z, y)[row]) == pytest.approx(best - own)
        assert float(dlr(z, y)[row]) == pytest.approx(-(own - best) / (ordered[0] - ordered[2] + 1e-12))
        divisor = ordered[0] - 0.5 * ordered[2] - 0.5 * ordered[3] + 1e-12
        assert float(dlr_targeted(z, y, t)[row]) == pytest.approx(-(own - values[t[row]]) / divisor)
        scaled = [v / (ordered[0] - ordered[1] + 1e-12) for v in values]
        expected = math.log(sum(math.exp(v - max(scaled)) for v in scaled)) + max(scaled) - scaled[y[row]]
        assert float(mifpe(z, y)[row]) == pytest.approx(expected)


def test_the_strongest_other_class_is_right_for_huge_logits():
    z = torch.tensor([[2e4, 1e4, 1.5e4]])
    assert float(logit_margin(z, torch.tensor([0]))) == -5e3


@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_are_one_value_per_sample_and_rise_with_the_other_classes(name):
    z = torch.tensor([[3.0, 1.0, 0.0, -1.0]], requires_grad=True)
    value = LOSSES[name](z, torch.tensor([0]))
    assert value.shape == (1,)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    assert gradient[0, 0] < 0 and gradient[0, 1] > 0


@pytest.mark.parametrize("name", list(TARGETED_LOSSES))
def test_targeted_losses_rise_with_the_target(name):
    z = torch.tensor([[3.0, 1.0, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(TARGETED_LOSSES[name](z, torch.tensor([0]), torch.tensor([2])).sum(), z)
    assert gradient[0, 2] > 0


# --- threat models and draws


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), eps=st.floats(0.01, 2), norm=st.sampled_from(["linf", "l2"]))
def test_projections_stay_in_ball_and_box_and_leave_what_is_inside(seed, eps, norm):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 2, 3, 3, generator=generator)
    far = x + 2 * torch.randn(x.shape, generator=generator)
    threat = Threat(norm, eps)
    near = threat.project(far, x)
    assert (threat.distance(near, x) <= eps * (1 + 1e-5)).all() and near.min() >= 0 and near.max() <= 1
    torch.testing.assert_close(threat.project(near, x), near, rtol=0, atol=1e-6)
    start = threat.random_start(x, Draws(seed, torch.arange(4)), "start")
    assert (threat.distance(start, x) <= eps * (1 + 1e-5)).all()


def test_directions_are_steepest():
    gradient = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.0]]], [[[1e-25, 0.0]]]])
    torch.testing.assert_close(Threat("l2").direction(gradient)[:, 0, 0], torch.tensor([[0.6, -0.8], [0, 0], [1, 0]]))
    assert Threat("linf").direction(gradient)[0].flatten().tolist() == [1, -1]


def test_draws_belong_to_the_sample_and_look_uniform_and_normal():
    draws = Draws(3, torch.arange(2000))
    numbers = draws.uniform("a", (7,))
    torch.testing.assert_close(draws.take(torch.tensor([5, 9])).uniform("a", (7,)), numbers[[5, 9]])
    assert not torch.equal(draws.uniform("b", (7,)), numbers)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01 and abs(float(numbers.var()) - 1 / 12) < 0.002
    normal = draws.normal("n", (5,))
    assert abs(float(normal.mean())) < 0.03 and abs(float(normal.std()) - 1) < 0.02


def test_the_interval_is_wilsons():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12) and wilson(10, 10)[1] == pytest.approx(1)
    with pytest.raises(ValueError, match="got 3 of 2"):
        wilson(3, 2)


# --- attacks on a linear classifier, whose smallest perturbation is known


class Linear(nn.Module):
    """Three classes over 8 pixels, with logits away from the box's edges."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 8, generator=generator))

    def forward(self, x):
        return (x.flatten(1) - 0.5) @ self.weight.T


def smallest(model, x, y, norm):
    """Return the distance to the nearest decision boundary in closed form, no box."""
    with torch.no_grad():
        z = model(x)
        found = []
        for row in range(len(x)):
            distances = []
            for k in range(3):
                if k != y[row]:
                    w = model.weight[k] - model.weight[y[row]]
                    size = w.abs().sum() if norm == "linf" else w.norm()
                    distances.append(float((z[row, y[row]] - z[row, k]) / size))
            found.append(min(distances))
    return torch.tensor(found)


class Tensors:
    """A split of these images and labels."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def batch(self, indices, generator=None):
        chosen = list(indices)
        return {"image": self.x[chosen], "label": self.y[chosen]}

    def fingerprint(self):
        return "t"


def linear_problem(samples=64):
    model = Linear()
    x = 0.5 + 0.2 * (torch.rand(samples, 1, 2, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    return model, Tensors(x, model(x).argmax(1).detach())


def robust(model, split, threat, attacks, batch_size=64, **options):
    classifier = Classifier(model, **options)
    return run_sequence(classifier, split, Plan(threat, attacks, batch_size), CPU, Log())


GRADIENT = [
    PGD("ce", 50),
    PGD("margin", 50),
    PGD("pm", 50),
    APGD("ce", 50),
    TargetedAPGD("margin", 30),
    TargetedFAB(20),
]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", GRADIENT, ids=lambda attack: attack.name)
def test_attacks_find_exactly_what_a_linear_classifier_allows(attack, norm):
    model, split = linear_problem()
    distance = smallest(model, split.x, split.y, norm)
    eps = float(distance.median())
    outcome = robust(model, split, Threat(norm, eps), [attack])
    broken = torch.from_numpy(outcome.records.broken_by == 0)
    assert not broken[distance > eps * 1.001].any()  # nothing beyond what is possible
    possible = broken[distance < eps * 0.97]
    if attack.name in ("apgd_t", "fab_t"):
        assert possible.all()  # and all of it
    else:
        assert possible.float().mean() >= 0.85  # the strongest other class need not be the nearest


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_needs_no_gradient_and_counts_its_queries(norm):
    model, split = linear_problem()
    distance = smallest(model, split.x, split.y, norm)
    outcome = robust(model, split, Threat(norm, 3 * float(distance.max())), [Square(150)])
    stage = outcome.stages[0]
    assert stage.gradients == 0 and stage.broken > 0.8 * len(split)
    still = robust(model, split, Threat(norm, 1e-6), [Square(10)]).stages[0]
    assert still.forwards == 10 * still.attacked and still.broken == 0


def test_gradients_are_counted_and_stop_with_the_sample():
    model, split = linear_problem()
    standing = robust(model, split, Threat("linf", 1e-6), [PGD("ce", 7)]).stages[0]
    assert standing.gradients == 7 * len(split) and standing.robust_accuracy == 100
    broken = robust(model, split, Threat("linf", 0.4), [PGD("ce", 7)]).stages[0]
    assert broken.gradients < 7 * len(split)


@pytest.mark.parametrize(
    "attack",
    [PGD("pm", 10), APGD("dlr", 10), TargetedAPGD("margin", 5), TargetedFAB(5), Square(20), Noise(5)],
    ids=lambda a: a.name,
)
def test_the_batch_size_does_not_change_the_result(attack):
    model, split = linear_problem(23)
    threat = Threat("linf", float(smallest(model, split.x, split.y, "linf").median()))
    one, many = (robust(model, split, threat, [attack], size).records for size in (1, 23))
    np.testing.assert_array_equal(one.broken_by, many.broken_by)
    np.testing.assert_allclose(one.distance, many.distance, atol=1e-6)


def test_each_attack_sees_the_survivors_only_and_the_worst_case_is_kept():
    model, split = linear_problem()
    split.y[:5] = (split.y[:5] + 1) % 3  # misclassified from the start
    eps = float(smallest(model, split.x[5:], split.y[5:], "linf").median())
    outcome = robust(model, split, Threat("linf", eps), [Noise(3), PGD("margin", 40), PGD("ce", 40)])
    codes = outcome.records.broken_by
    assert (codes[:5] == CLEAN).all() and outcome.clean.standing == len(split) - 5
    standing = outcome.clean.standing
    for number, stage in enumerate(outcome.stages):
        assert stage.attacked == standing
        standing -= int((codes == number).sum())
        assert stage.standing == standing
    assert standing == int((codes == STANDING).sum()) == outcome.last.standing
    low, high = outcome.last.interval
    assert low <= outcome.last.robust_accuracy <= high


def test_a_single_survivor_is_attacked_like_many():
    model, split = linear_problem(1)
    outcome = robust(model, split, Threat("linf", 0.4), GRADIENT[:3])
    assert outcome.last.standing == 0


def test_projections_onto_a_hyperplane_in_the_box_are_the_smallest():
    optimize = pytest.importorskip("scipy.optimize", reason="the reference of the projection is scipy's")
    generator = np.random.default_rng(0)
    for _ in range(6):
        x, w = generator.random(6), generator.standard_normal(6)
        b = -float(w @ generator.random(6))  # a plane through the box
        tensors = [torch.from_numpy(value)[None] for value in (x, w)]
        # Linf: minimise t with -t <= d <= t, w d = -(w x + b), x + d in the box.
        constraint = np.concatenate([w, [0.0]])[None]
        both = np.concatenate([np.eye(6), -np.eye(6)])
        upper = np.concatenate([both, -np.ones((12, 1))], 1)
        bounds = [(-value, 1 - value) for value in x] + [(0, None)]
        solved = optimize.linprog(np.eye(7)[6], upper, np.zeros(12), constraint, [-(w @ x + b)], bounds)
        found = to_hyperplane(*tensors, torch.tensor([b]), "linf")[0].numpy()
        assert w @ (x + found) + b == pytest.approx(0, abs=1e-6)
        assert np.abs(found).max() == pytest.approx(solved.fun, abs=1e-6)
        exact = optimize.minimize(
            lambda d: d @ d, found, jac=lambda d: 2 * d, bounds=bounds[:6], method="SLSQP",
            constraints={"type": "eq", "fun": lambda d, w=w, x=x, b=b: w @ (x + d) + b}, options={"ftol": 1e-12},
        )  # fmt: skip
        nearest = to_hyperplane(*tensors, torch.tensor([b]), "l2")[0].numpy()
        assert w @ (x + nearest) + b == pytest.approx(0, abs=1e-6)
        assert np.linalg.norm(nearest) <= math.sqrt(exact.fun) + 1e-5


def test_checkpoints_are_autoattacks():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


# --- the model under attack


def task():
    return Classification(ClassificationOptions(input_shape=(1, 8, 8), classes=("a", "b", "c", "d")))


def test_mode_and_trainability_are_put_back():
    model = TinyCNN().train()
    model.bn1.eval()
    model.fc.weight.requires_grad_(False)
    with attacked(model, Run(task(), CPU)) as classifier:
        assert not model.training
        classifier.gradient(torch.rand(2, 1, 8, 8), lambda z: z[:, 0])
    assert model.training and not model.bn1.training
    assert model.conv1.weight.requires_grad and not model.fc.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inputs_and_labels_out_of_range_are_named():
    x = torch.rand(3, 1, 2, 2)
    x[1, 0, 0, 0] = 1.5
    with pytest.raises(DataError, match=r"image 11 of the test split has pixels from .* to 1.5"):
        check_images(x, torch.zeros(3, dtype=torch.long), 2, 10)
    with pytest.raises(DataError, match="image 2 of the test split has label 7; the model has classes 0 to 3"):
        check_images(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 7]), 4)


def test_too_few_classes_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedModelError, match="has 1 output; an attack needs at least 2"):
        check_classes(1)
    with pytest.raises(UnsupportedModelError, match="targeted 'dlr' needs 4; use target_loss=margin"):
        check_classes(3, targeted=("dlr",))
    with pytest.raises(UnsupportedModelError, match="loss 'dlr' needs 3"):
        check_classes(2, ("dlr",))


def test_probabilities_in_the_place_of_logits_are_a_warning_and_nan_an_error():
    model, split = linear_problem(8)
    log = Log()
    run_sequence(Classifier(lambda x: model(x).softmax(1)), split, Plan(Threat(), []), CPU, log)
    assert any("returns probabilities" in text for text in log.warnings)
    with pytest.raises(RunError, match="NaN or infinite logits"):
        robust(lambda x: model(x) * math.nan, split, Threat(), [])
    with pytest.raises(DataError, match="no samples to attack"):
        robust(model, Tensors(split.x[:0], split.y[:0]), Threat(), [])


# --- hidden gradients


def signs(model):
    _, split = linear_problem()
    threat = Threat("linf", 0.05)
    return look_for_signs(Classifier(model), split, threat, CPU, Log())


def test_an_honest_model_is_not_flagged():
    assert signs(Linear()).warnings() == []


def test_hidden_gradients_are_flagged_by_what_hides_them():
    linear = Linear()
    stepped = signs(lambda x: linear((x * 16).round() / 16))  # no gradient through the rounding
    assert stepped.zero_gradients == 1 and any("no gradient" in text for text in stepped.warnings())
    assert any("black-box" in text or "noise" in text for text in stepped.warnings())
    masked = signs(lambda x: 2000 * linear(x))  # the cross entropy saturates in float32
    assert any("saturates" in text or "no gradient" in text for text in masked.warnings())
    generator = torch.Generator().manual_seed(0)
    noisy = signs(lambda x: linear(x) + 0.01 * torch.randn(len(x), 3, generator=generator))
    assert noisy.randomised and any("-o eot=20" in text for text in noisy.warnings())


def test_averaging_over_passes_finds_the_gradient_of_a_randomised_model():
    linear = Linear()
    generator = torch.Generator().manual_seed(0)
    noisy = lambda x: linear(x) + torch.randn(len(x), 3, generator=generator)  # noqa: E731
    classifier = Classifier(noisy, eot=10)
    x = torch.rand(4, 1, 2, 4)
    _, gradient = classifier.gradient(x, lambda z: z[:, 0])
    torch.testing.assert_close(gradient.flatten(1), linear.weight[0].expand(4, -1).detach())
    assert classifier.gradients == 40


# --- training


@pytest.mark.parametrize("kind", ["at", "trades"])
def test_adversarial_training_minimises_the_worst_case(kind):
    torch.manual_seed(0)
    run, model = Run(task(), CPU), TinyCNN()
    batch = {"image": torch.rand(16, 1, 8, 8), "label": torch.randint(4, (16,))}

    def plain(net, part):
        output = run.forward(net, part)
        return run.task.loss(output, part), output

    loss = adversarial_loss(plain, run, InnerAttack(Threat("linf", 0.2), steps=5), kind)
    value, _ = loss(model, batch)
    assert float(value) > float(plain(model, batch)[0])
    value.backward()
    assert model.training and all(parameter.grad is not None for parameter in model.parameters())
