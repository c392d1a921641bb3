"""adv_pma: the paper's schedule, what a run leaves, chains, signs of masked gradients, and bad input."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eff.errors import ConfigError, DataError, EffError, MissingDependencyError, UnsupportedModelError
from eff.models import ModelRequest, open_model
from eff.options import check_config
from eff.run import Run
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, Report, TrainOptions
from eff.session import Plugins
from eff.testing.samples import DATA, MODEL, blobs
from eff.use import UseRequest, evaluate
from eff_adv_kit.classifier import Classifier, attacked
from eff_adv_kit.draws import Draws
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.losses import LOSSES
from eff_adv_kit.threat import Threat
from eff_adv_pma.attack import MarginAttack, half, move, part_of_margin
from eff_adv_pma.config import PRESETS, PMAConfig
from eff_adv_pma.robustness import measure_robustness, subset_rows
from eff_adv_pma.sequence import make_sequence

EFF_PLUGIN = "adv_pma"
SHARED = Path(__file__).parents[3] / ".." / "shared"
QUICK = {"steps": 6, "eps": 0.1, "checks": 0}


def test_contract(eff_contract_check):
    eff_contract_check()


# --- the schedule


@settings(deadline=None)
@given(steps=st.integers(2, 300), eps=st.floats(0.001, 1))
def test_the_move_is_the_cards_formula_and_falls_in_each_half(steps, eps):
    k, alpha0 = steps // 2, 2 * eps
    for i in range(steps):
        since = i - k - 1 if i > k else i - 1
        wanted = alpha0 / 2 * (1 + math.cos(since / (steps - k) * math.pi))
        assert move(i, steps, eps) == pytest.approx(wanted, abs=1e-12) and -1e-12 <= wanted <= alpha0 + 1e-12
    for part in (range(1, k + 1), range(k + 1, steps)):
        moves = [move(i, steps, eps) for i in part]
        assert moves == sorted(moves, reverse=True)


def test_the_moves_of_100_steps_start_at_twice_eps_and_end_near_0_in_both_halves():
    assert [move(i, 100, 1.0) for i in (1, 51)] == pytest.approx([2.0, 2.0])
    assert move(50, 100, 1.0) < 0.01 and move(99, 100, 1.0) < 0.02
    assert [move(i, 100, 0.3, odi=True) for i in (0, 1)] == [0.3, 0.3] and move(2, 100, 0.3, True) == move(2, 100, 0.3)


@pytest.mark.parametrize("loss", ["pm", "margin"])
def test_each_search_raises_its_term_first_and_then_the_margin(loss):
    z = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([1])
    values = (z.softmax(1) if loss == "pm" else z)[0]
    label, other = float(values[1]), float(values[2])

    def raised(search, i):
        return part_of_margin(loss, search, i, 10, z, y).item()

    assert half(10) == half(11) == 5
    assert [raised(search, 0) for search in (0, 1)] == pytest.approx([label, label])  # the kick
    assert [raised(0, i) for i in (1, 4)] == pytest.approx([-label, -label])
    assert [raised(1, i) for i in (1, 4)] == pytest.approx([other, other])
    assert [raised(search, i) for search in (0, 1) for i in (5, 9)] == pytest.approx([other - label] * 4)


def linear(classes):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(classes, 12, generator=generator)
    x = 0.5 + 0.01 * torch.randn(10, 3, 2, 2, generator=generator)
    z = x.flatten(1) @ w.T
    b = -z.mean(0)
    return Classifier(lambda image: image.flatten(1) @ w.T + b), x, (z + b), w


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["pm", "margin"])
def test_the_attack_finds_the_smallest_perturbation_of_two_classes(loss, norm):
    classifier, x, z, w = linear(2)
    difference = w[0] - w[1]
    dual = difference.abs().sum() if norm == "linf" else difference.norm()
    smallest = (z[:, 0] - z[:, 1]).abs() / dual
    for n in range(len(x)):
        for factor, broken in ((1.03, True), (0.97, False)):
            hunt = Hunt(x[n : n + 1], z[n : n + 1].argmax(1), Draws(0, torch.tensor([n])))
            MarginAttack(loss, 40)(classifier, Threat(norm, factor * float(smallest[n])), hunt)
            assert hunt.done is broken


def test_the_attack_costs_at_most_two_searches_and_less_as_samples_drop_out():
    classifier, x, z, w = linear(3)
    hunt = Hunt(x, z.argmax(1), Draws(0, torch.arange(10)))
    attack = MarginAttack("pm", 8, restarts=2)
    attack(classifier, Threat("linf", 1e-6), hunt)
    assert classifier.gradients == attack.ticks(3) * 10 == 2 * 8 * 2 * 10
    assert classifier.forwards == classifier.gradients + 4 * 10  # the last iterate of each search is looked at too
    easy, x, z, w = linear(3)
    attack(easy, Threat("linf", 0.3), Hunt(x, z.argmax(1), Draws(0, torch.arange(10))))
    assert easy.gradients < 100


def test_a_start_outside_the_box_is_no_success():
    classifier = Classifier(lambda image: torch.stack([image[:, 0, 0, 0], 0 * image[:, 0, 0, 0]], 1))
    x = torch.zeros(50, 1, 1, 1)  # class 0 wins ties; any value below 0 would be class 1
    hunt = Hunt(x, torch.zeros(50, dtype=torch.long), Draws(0, torch.arange(50)))
    MarginAttack("pm", 4, clamp_start=False)(classifier, Threat("linf", 0.1), hunt)
    assert len(hunt.left) == 50


def test_presets_and_names_become_attacks():
    names = {preset: [a.name for a in make_sequence(PMAConfig(preset=preset), 10)] for preset in PRESETS}
    assert names == {
        "pma": ["pma"], "pma_plus": ["pma", "apgd_t"], "aa_style": ["pma", "apgd_t", "fab_t", "square"],
    }  # fmt: skip
    every = PMAConfig.model_fields["sequence"].annotation.__args__[0].__args__
    made = make_sequence(PMAConfig(preset="custom", sequence=every, steps=7), 10)
    assert tuple(attack.name for attack in made) == every
    plus = make_sequence(PMAConfig(preset="pma_plus"), 10)
    assert (plus[0].steps, plus[1].steps, plus[1].targets, plus[1].loss) == (100, 100, 9, "dlr")


# --- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a tiny classifier that knows its data."""
    folder = tmp_path_factory.mktemp("model") / "run"
    apply(Recipe(model=MODEL, data=DATA, train=TrainOptions(epochs=12, batch_size=32, lr=0.1), device="cpu"), folder)
    return folder


def attack_run(trained, folder, **options):
    use = MethodUse(name="adv_pma", options={**QUICK, **options})
    return apply(Recipe(model=str(trained), methods=(use,), device="cpu"), folder)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_apply_leaves_a_report_and_one_record_per_sample(trained, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    from pyarrow import parquet

    report = attack_run(trained, tmp_path / "run", preset="aa_style", queries=10, records="parquet", examples=3)
    assert files(tmp_path / "run") == ["adversarial.npz", "recipe.yaml", "report.json", "robustness.parquet"]
    values, rows = report.after.metrics.values, report.after.metrics.tables["attacks"]
    assert [row["attack"] for row in rows] == ["clean", "pma", "apgd_t", "fab_t", "square"]
    assert values["clean_accuracy"].value == values["accuracy"].value == rows[0]["accuracy"]
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and values["robust_accuracy"].value == accuracies[-1]
    assert values["robust_after_pma"].value == accuracies[1]
    assert values["robust_accuracy_low"].value < accuracies[-1] < values["robust_accuracy_high"].value
    assert values["gradients_per_sample"].value == sum(row["gradients"] for row in rows) / 128
    table = parquet.read_table(tmp_path / "run" / "robustness.parquet").to_pydict()
    assert len(table["label"]) == 128 and 100 * np.mean(table["robust"]) == pytest.approx(accuracies[-1])
    for row in rows[1:]:
        assert sum(by == row["attack"] for by in table["broken_by"]) == row["broken"]
    saved = Report.model_validate_json((tmp_path / "run" / "report.json").read_text())
    assert {str(item.path): item.details["norm"] for item in saved.artifacts} == {
        "robustness.parquet": "linf", "adversarial.npz": "linf",
    }  # fmt: skip


def test_adversarial_images_fool_the_model_when_read_as_data(trained, tmp_path):
    attack_run(trained, tmp_path / "run", examples=8)
    images = str(tmp_path / "run" / "adversarial.npz")
    measured = evaluate(UseRequest(str(trained), data=images, device="cpu"))
    assert measured.metrics.values["accuracy"].value == 0


def test_evaluate_reports_the_same_and_keeps_files_where_asked(trained, tmp_path):
    use = MethodUse(name="adv_pma", options=QUICK)
    bare = evaluate(UseRequest(str(trained), device="cpu"), (use,))
    kept = evaluate(UseRequest(str(trained), device="cpu"), (use,), out=tmp_path / "kept")
    assert files(tmp_path / "kept") == ["measurement.json", "robustness.npz"]
    ours = attack_run(trained, tmp_path / "run").after.metrics.values["robust_accuracy"]
    assert bare.metrics.values["robust_accuracy"] == kept.metrics.values["robust_accuracy"] == ours


def opened(trained):
    model = open_model(ModelRequest(str(trained), device=torch.device("cpu")), Plugins())
    return model.model, Run(model.task, torch.device("cpu"), data=model.data)


def test_the_result_depends_on_the_seed_and_not_on_the_batch_size(trained):
    model, run = opened(trained)

    def figures(**options):
        found = measure_robustness(model, run.data, run, PMAConfig(**{**QUICK, "eps": 0.11, **options}))
        return found.values["robust_accuracy"].value, found.values["gradients_per_sample"].value

    assert figures() == figures(batch_size=7) == figures(batch_size=128)
    assert figures() != figures(seed=1)


def test_the_model_is_attacked_in_eval_mode_and_comes_back_in_train_mode(trained):
    model, run = opened(trained)
    calm = measure_robustness(model, run.data, run, PMAConfig(**QUICK)).values["robust_accuracy"]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert measure_robustness(model, run.data, run, PMAConfig(**QUICK)).values["robust_accuracy"] == calm
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"norm": "l2", "eps": 0.5}, {"loss": "ce", "schedule": "plain"}, {"odi": True}])
def test_other_norms_losses_and_schedules_break_samples_too(trained, options):
    model, run = opened(trained)
    values = measure_robustness(model, run.data, run, PMAConfig(**{**QUICK, **options})).values
    assert values["robust_accuracy"].value < values["clean_accuracy"].value == 100


def test_images_without_labels_are_judged_by_the_models_own_prediction(trained):
    model, run = opened(trained)
    run.data.test.labels[:] = 0
    values = measure_robustness(model, run.data, run, PMAConfig(**QUICK, labels="prediction")).values
    assert values["clean_accuracy"].value == 100 and 0 < values["robust_accuracy"].value < 100


def test_subsets_are_nested_and_show_their_intervals():
    robust = np.arange(5000) % 4 != 0
    rows = subset_rows(robust, seed=0)
    assert [row["samples"] for row in rows] == [100, 1000]
    assert all(row["low"] < 75 < row["high"] for row in rows) and rows == subset_rows(robust, seed=0)
    assert subset_rows(robust[:100], 0) == []


# --- masked gradients


class Masked(nn.Module):
    def __init__(self, model, how):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x):
        if self.how == "quantized":
            x = torch.round(x * 2) / 2
        z = self.model(x + 0.5 * torch.randn_like(x) if self.how == "random" else x)
        return z * 100 if self.how == "sharp" else z


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("plain", []),
        ("sharp", ["zero_ce is 100 % of samples", "attack the logits: loss=margin"]),
        ("quantized", ["zero_margin is 100 % of samples", "without gradients is stronger than one with them"]),
        ("random", ["give different logits; set eot to 10 or more"]),
    ],
)
def test_masked_gradients_are_warned_of_and_counted(trained, how, words):
    model, run = opened(trained)
    torch.manual_seed(0)
    options = {**QUICK, "checks": 32}
    metrics = measure_robustness(Masked(model, how), run.data, run, PMAConfig(**options))
    flagged = [row["sign"] for row in metrics.tables["signs"] if row["flagged"] == "yes"]
    assert metrics.values["signs_of_masked_gradients"].value == len(flagged) == len(run.log.warnings)
    assert bool(flagged) == bool(words)
    for word in words:
        assert any(word in line for line in run.log.warnings), run.log.warnings


def test_a_probability_margin_saturates_where_a_logit_margin_does_not(trained):
    """The limit of PM that the README states."""
    model, run = opened(trained)
    sharp = Masked(model, "sharp")
    pm, margin = (
        measure_robustness(sharp, run.data, run, PMAConfig(**QUICK, loss=loss)).values["robust_accuracy"].value
        for loss in ("pm", "margin")
    )
    assert pm > margin + 10


def test_averaging_helps_against_a_randomised_model(trained):
    """The image that an attack with averaged gradients leaves is misclassified more often by fresh draws of the noise."""
    model, run = opened(trained)
    noisy = Masked(model, "random")

    def share_broken(eot):
        torch.manual_seed(0)
        split = run.split("test")
        x, y = (split.batch(range(len(split)))[key] for key in ("image", "label"))
        with attacked(noisy, run, eot) as classifier:
            x_adv, gradient = x.clone(), None
            for _ in range(6):
                _, gradient = classifier.gradient(x_adv, lambda z: LOSSES["margin"](z, y))
                x_adv = (x + (x_adv + 0.03 * gradient.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
            return float(torch.stack([(classifier.logits(x_adv).argmax(1) != y).float() for _ in range(20)]).mean())

    assert share_broken(16) > share_broken(1)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "custom"}, "preset=custom needs a sequence, e.g. sequence=pma,apgd_t,square"),
        ({"sequence": "pma,square"}, "sequence is for preset=custom, preset is pma; add preset=custom"),
        ({"preset": "custom", "sequence": "pma,pma"}, "sequence names an attack twice: pma, pma"),
        ({"preset": "custom", "sequence": "pmaa"}, "sequence: input should be"),
        ({"loss": "ce"}, "only pm and margin have two terms to decompose; loss=ce needs schedule=plain"),
        ({"eps": 8}, r"eps is for images in \[0, 1\], got 8; for 8 of 255 write 8/255"),
        ({"eps": "8/0"}, "eps: input should be a valid number"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"n_targets": 0}, "n_targets must be at least 1, got 0"),
        ({"norm": "l1"}, "norm: input should be 'linf' or 'l2'"),
        ({"step": 10}, "option 'step' is unknown; did you mean 'steps'"),
    ],
)
def test_wrong_options_are_refused_in_words(options, message):
    with pytest.raises(ConfigError, match=message):
        check_config("adv_pma", PMAConfig, options)


def test_eps_may_be_written_as_a_fraction_and_has_a_default_per_norm():
    assert check_config("adv_pma", PMAConfig, {"eps": "8/255"}).radius == 8 / 255 == PMAConfig().radius
    assert PMAConfig(norm="l2").radius == 0.5 and PMAConfig(norm="l2", eps=3).radius == 3


def test_classes_are_checked_before_anything_is_attacked():
    with pytest.raises(UnsupportedModelError, match="targeted 'dlr' needs 4; use target_loss=margin"):
        make_sequence(PMAConfig(preset="pma_plus"), 3)
    with pytest.raises(UnsupportedModelError, match="loss 'dlr' needs 3; use loss margin or pm"):
        make_sequence(PMAConfig(loss="dlr", schedule="plain"), 2)
    with pytest.raises(UnsupportedModelError, match="at least 2 classes"):
        make_sequence(PMAConfig(), 1)
    two = make_sequence(PMAConfig(preset="pma_plus", target_loss="margin"), 2)
    assert two[1].ticks(2) == 100  # K - 1 = 1 target


def test_images_outside_the_box_and_wrong_labels_are_refused(trained, tmp_path):
    model, run = opened(trained)
    run.data.test.images[5] *= 255
    with pytest.raises(
        DataError, match=r"image 5 of the test split has pixels from .* attacks need images in \[0, 1\]"
    ):
        measure_robustness(model, run.data, run, PMAConfig(**QUICK))
    model, run = opened(trained)
    run.data.test.labels[3] = 9
    with pytest.raises(DataError, match="image 3 of the test split has label 9; the model has classes 0 to 3"):
        measure_robustness(model, run.data, run, PMAConfig(**QUICK))


def test_a_model_of_probabilities_is_warned_of(trained):
    model, run = opened(trained)
    measure_robustness(nn.Sequential(model, nn.Softmax(1)), run.data, run, PMAConfig(**QUICK))
    assert any("returns probabilities (rows sum to 1), attacks expect logits" in line for line in run.log.warnings)


def test_parquet_without_pyarrow_is_refused_before_the_attack(trained, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    use = MethodUse(name="adv_pma", options={**QUICK, "records": "parquet"})
    with pytest.raises(
        MissingDependencyError, match="records=parquet needs pyarrow; pip install .* or take records=npz"
    ):
        apply(Recipe(model=str(trained), data=DATA, methods=(use,), device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_test_split_says_so(trained, tmp_path):
    use = MethodUse(name="adv_pma", options=QUICK)
    with pytest.raises(EffError, match="test"):
        apply(Recipe(model=str(trained), data=f"{DATA}?test=0", methods=(use,), device="cpu"), tmp_path / "run")


def test_a_model_for_another_task_is_refused(tmp_path):
    use = MethodUse(name="adv_pma", options=QUICK)
    with pytest.raises(EffError) as caught:
        apply(Recipe(model="eff.testing.samples:tiny_cnn", methods=(use,), device="cpu"), tmp_path / "run")
    assert caught.value.exit_code == 2 and "--data" in str(caught.value)


# --- real data


@pytest.mark.slow
def test_a_trained_cifar_network_falls_to_0_at_8_of_255():
    weights, data = SHARED / "models" / "resnet20-12fca82f.th", SHARED / "data" / "cifar10" / "test.parquet"
    for path in (weights, data):
        if not path.exists():
            pytest.skip(f"needs ../shared/{path.relative_to(SHARED)}")
    use = MethodUse(name="adv_pma", options={"steps": 10, "checks": 0})
    request = UseRequest(str(weights), arch="zoo:cifar_resnet20", data=f"{data}?test=64", device="cpu")
    values = evaluate(request, (use,)).metrics.values
    assert values["clean_accuracy"].value > 85 and values["robust_accuracy"].value == 0


def test_the_commands_of_the_readme_are_options_that_exist():
    done = subprocess.run(
        [sys.executable, "-m", "eff", "info", "adv_pma"], capture_output=True, text=True, check=True
    )  # fmt: skip
    lines = done.stdout.split()
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    used = {word.partition("=")[0] for line in readme.splitlines() for word in line.split("-o ")[1:]}
    assert used and used <= set(lines), used - set(lines)


def test_blobs_stay_as_they_are():
    """What some tests above change is a copy of their own."""
    from eff.schemas import DataSpec

    assert blobs(DataSpec.parse(DATA)).test.images.max() <= 1
