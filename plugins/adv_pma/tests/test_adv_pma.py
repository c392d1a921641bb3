"""PMA's schedule step by step, and the method as a user runs it."""

import json
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from eff.errors import EffError, RequestError
from eff.runner import apply
from eff.schemas import MethodUse, Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL
from eff.use import UseRequest, evaluate
from eff_adv_kit.draws import Draws
from eff_adv_kit.hunt import Hunt
from eff_adv_kit.pgd import PGD
from eff_adv_pma.attack import PMA
from eff_adv_pma.config import PMAConfig
from eff_adv_pma.measure import make_attack

EFF_PLUGIN = "adv_pma"


def test_contract(eff_contract_check):
    eff_contract_check()


def test_moves_fall_from_two_eps_to_nothing_in_each_half():
    """The card's formula, written out for K = 10, K' = 5."""
    moves = [PMA(steps=10).move(i, 0.1) for i in range(10)]
    for i, found in enumerate(moves):
        passed = i - 5 - 1 if i > 5 else i - 1
        assert found == pytest.approx(0.2 / 2 * (1 + math.cos(passed / 5 * math.pi)))
    assert moves[1] == moves[6] == pytest.approx(0.2) and moves[5] == pytest.approx(
        0.2 / 2 * (1 + math.cos(0.8 * math.pi))
    )
    assert [PMA(steps=10, odi=True).move(i, 0.1) for i in (0, 1)] == [0.1, 0.1]


@pytest.mark.parametrize("of", ["pm", "margin"])
def test_terms_follow_the_schedule(of):
    z, y = torch.randn(6, 5), torch.randint(5, (6,))
    hunt = Hunt(torch.rand(6, 1, 2, 2), y, Draws(0, torch.arange(6)))
    scores = z.softmax(1) if of == "pm" else z
    own = scores.gather(1, y[:, None])[:, 0]
    other = scores.scatter(1, y[:, None], -torch.inf).amax(1)
    attack = PMA(of, steps=10)
    for i, run, expected in (
        (0, 0, own), (0, 1, own), (1, 0, -own), (4, 0, -own), (1, 1, other), (4, 1, other), (5, 0, other - own), (9, 1, other - own),
    ):  # fmt: skip
        torch.testing.assert_close(attack.objective(i, run, hunt)(z), expected)


def recipe(data=DATA + "?test=64", **options):
    use = MethodUse(name="adv_pma", options={"steps": 6, "queries": 20, "eps": 0.05, "signs": False} | options)
    return Recipe(model=MODEL, data=data, methods=(use,), device="cpu")


def values(report):
    return {name: metric.value for name, metric in report.after.metrics.values.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adv") / "trained"
    apply(Recipe(model=MODEL, data=DATA, train=TrainOptions(epochs=12, batch_size=32), device="cpu"), folder)
    return str(folder)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("preset", "attacks"), [("pma", 1), ("pma_plus", 2), ("aa_style", 4)])
def test_presets_report_every_stage_and_a_record_per_sample(trained, preset, attacks, norm, tmp_path):
    eps = 0.06 if norm == "linf" else 0.3
    asked = recipe(preset=preset, norm=norm, eps=eps).model_copy(update={"model": trained})
    report = apply(asked, tmp_path / "run")
    found, rows = values(report), report.after.metrics.tables["attacks"]
    assert len(rows) == 1 + attacks and rows[0]["attack"] == "clean"
    assert found["clean_accuracy"] == found["accuracy"] == rows[0]["robust_accuracy"]
    assert found["robust_accuracy_low"] <= found["robust_accuracy"] <= found["robust_accuracy_high"]
    accuracies = [row["robust_accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[-1] == found["robust_accuracy"]
    records = np.load(tmp_path / "run" / "robustness.npz")
    assert len(records["robust"]) == 64 and 100 * records["robust"].mean() == pytest.approx(found["robust_accuracy"])
    assert (records["broken_by"][records["robust"]] == "").all()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"report.json", "recipe.yaml", "robustness.npz"}


def test_a_larger_ball_breaks_more(trained, tmp_path):
    accuracies = []
    for eps in (0.01, 0.1, 0.5):
        asked = recipe(eps=eps, steps=20).model_copy(update={"model": trained})
        accuracies.append(values(apply(asked, tmp_path / str(eps)))["robust_accuracy"])
    assert accuracies[0] > accuracies[1] >= accuracies[2] == 0


def test_evaluate_gives_the_same_and_keeps_files_where_asked(trained, tmp_path):
    asked = recipe().model_copy(update={"model": trained})
    one = values(apply(asked, tmp_path / "run"))["robust_accuracy"]
    request = UseRequest(trained, data=DATA + "?test=64", device="cpu")
    two = evaluate(request, asked.methods, out=tmp_path / "kept").metrics.values["robust_accuracy"].value
    assert one == two and (tmp_path / "kept" / "robustness.npz").exists()


def test_kept_images_are_a_data_set_on_which_the_model_fails(trained, tmp_path):
    asked = recipe(keep=10, eps=0.2, steps=20).model_copy(update={"model": trained})
    apply(asked, tmp_path / "run")
    again = evaluate(UseRequest(trained, data=str(tmp_path / "run" / "adversarial.npz"), device="cpu"))
    assert again.metrics.values["accuracy"].value == 0


def test_records_as_parquet(trained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="records=parquet needs pyarrow")
    apply(recipe(records="parquet").model_copy(update={"model": trained}), tmp_path / "run")
    table = parquet.read_table(tmp_path / "run" / "robustness.parquet")
    assert table.num_rows == 64 and "margin" in table.column_names


def test_the_robust_accuracy_of_a_quantized_model(trained, tmp_path):
    uses = (MethodUse(name="quant_lsq"), *recipe(eps=0.1, steps=10).methods)
    asked = Recipe(model=trained, data=DATA + "?test=64", methods=uses, train=TrainOptions(epochs=1), device="cpu")
    report = apply(asked, tmp_path / "run")
    before, after = (m.metrics.values for m in (report.before, report.after))
    assert before["robust_accuracy"].value < before["clean_accuracy"].value
    assert after["robust_accuracy"].value < after["clean_accuracy"].value  # gradients pass the rounding
    assert "mean_weight_bits" in after


def test_hidden_gradients_are_a_warning_in_the_report(tmp_path):
    asked = recipe(signs=True).model_copy(update={"model": f"{__name__}:stepped"})
    apply(
        asked.model_copy(update={"methods": (), "train": TrainOptions(epochs=8, batch_size=32), "data": DATA}),
        tmp_path / "m",
    )
    report = apply(asked.model_copy(update={"model": str(tmp_path / "m")}), tmp_path / "run")
    assert any("gradients look hidden" in text for text in report.warnings)
    assert values(report)["gradients_look_hidden"] >= 1


class Stepped(torch.nn.Module):
    """A network that sees 3 grey levels, through which no gradient passes."""

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * in_channels, num_classes))

    def forward(self, x):
        return self.net((2 * x).round() / 2)


def stepped(num_classes=4, in_channels=1):
    """Return a network without gradients."""
    return Stepped(num_classes, in_channels)


def test_options_make_the_attacks_they_name():
    config = PMAConfig(preset="custom", sequence=("pgd_dlr", "apgd_ce", "noise"), steps=7)
    assert [make_attack(name, config).name for name in config.attacks] == ["pgd_dlr", "apgd_ce", "noise"]
    assert make_attack("pma", PMAConfig(loss="margin")) == PMA("margin")
    assert make_attack("pma", PMAConfig(loss="dlr", schedule="plain")) == PGD("dlr", 100)
    assert PMAConfig().eps == 8 / 255 and PMAConfig(preset="aa_style").attacks == ("pma", "apgd_t", "fab_t", "square")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "custom"}, "sequence belongs to preset=custom"),
        ({"sequence": ("pma",)}, "sequence belongs to preset=custom"),
        ({"loss": "ce"}, "loss=ce has no two terms to decompose; use schedule=plain"),
        ({"eps": 0}, "eps"),
        ({"steps": 1}, "steps"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        PMAConfig(**options)


def test_more_samples_than_there_are_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(RequestError, match="samples=65, but data .* has 64 test samples"):
        apply(recipe(samples=65), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_too_few_classes_for_targeted_dlr_are_refused(tmp_path):
    images = np.random.default_rng(0).random((30, 8, 8)).astype(np.float32)
    labels = np.arange(30) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    asked = recipe(data=str(tmp_path / "d.npz"), preset="pma_plus")
    with pytest.raises(EffError, match="targeted 'dlr' needs 4; use target_loss=margin") as caught:
        apply(asked, tmp_path / "run")
    assert caught.value.exit_code == 2 and not (tmp_path / "run").exists()
    report = apply(recipe(data=str(tmp_path / "d.npz"), preset="pma_plus", target_loss="margin"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "report.json").read_text()) and "robust_accuracy" in values(report)
