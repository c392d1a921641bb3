"""Runs: repeatable, resumable, honest about failures."""

import shutil

import numpy
import pytest
import torch

from eff.beginning import state_fingerprint
from eff.errors import DataError, EffError, InterruptedRunError, NonFiniteLossError, Problems, RequestError
from eff.runner import apply, default_out, make_plan, read_recipe, resume
from eff.schemas import MethodUse, Recipe, Report, TrainOptions
from eff.testing.samples import DATA, MODEL
from eff.use import UseRequest, bench, evaluate, export_model


def test_one_seed_gives_one_result_and_another_seed_another(recipe, tmp_path, weights, same):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        apply(recipe.model_copy(update={"seed": seed}), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize("step", [1, 4, 6])  # within an epoch, at its end, in the next
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(recipe, tmp_path, step, weights, same, stop_at):
    apply(recipe, tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match="stopped at step .* of 8; go on with --resume") as caught:
        apply(recipe, tmp_path / "parts", log=stop_at(step))
    assert caught.value.exit_code == 130
    report = resume(tmp_path / "parts")
    assert report.training.resumed_at is not None and report.training.steps == 8
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["model.pt", "recipe.yaml", "report.json"]


def test_a_finished_run_cannot_be_resumed(recipe, tmp_path):
    apply(recipe, tmp_path / "run")
    with pytest.raises(RequestError, match="this run is finished"):
        resume(tmp_path / "run")
    with pytest.raises(RequestError, match="holds no run to resume"):
        resume(tmp_path)


@pytest.fixture
def stopped(recipe, tmp_path, stop_at):
    """Return the folder of a run on a model file and stored data, interrupted in its second epoch."""
    first = recipe.model_copy(update={"train": TrainOptions(epochs=1, batch_size=64)})
    for seed in (0, 1):
        apply(first.model_copy(update={"seed": seed}), tmp_path / f"made{seed}")
    for name, count in (("data", 64), ("other", 64), ("larger", 96)):
        images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(len(name)))
        numpy.savez(tmp_path / f"{name}.npz", images=images.numpy(), labels=numpy.arange(count) % 4)
    shutil.copy(tmp_path / "made0" / "model.pt", tmp_path / "input.pt")
    began = recipe.model_copy(
        update={
            "model": str(tmp_path / "input.pt"),
            "data": f"npz:{tmp_path / 'data.npz'}?train=48",
            "train": TrainOptions(epochs=4, batch_size=16),
        }
    )
    with pytest.raises(InterruptedRunError):
        apply(began, tmp_path / "run", log=stop_at(5))
    return tmp_path / "run"


def _edit(folder, old, new):
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new))


CHANGES = {
    "another model file in its place": (
        lambda run: shutil.copy(run.parent / "made1" / "model.pt", run.parent / "input.pt"),
        r"the model .*input\.pt has other weights;",
    ),
    "other images in its place": (
        lambda run: shutil.copy(run.parent / "other.npz", run.parent / "data.npz"),
        r"the data npz:.*data\.npz\?train=48 has other samples;",
    ),
    "fewer samples": (lambda run: _edit(run, "train=48", "train=32"), "has other samples and options"),
    "a training option": (lambda run: _edit(run, "epochs: 4", "epochs: 5"), r"train\.epochs was 4 and is 5;"),
    "the seed": (lambda run: _edit(run, "seed: 0", "seed: 3"), "seed was 0 and is 3"),
    "the precision": (lambda run: _edit(run, "fp32", "bf16"), 'precision was "fp32" and is "bf16"'),
    "a further method": (
        lambda run: _edit(run, "methods: []", "methods: [{name: train_adamp}]"),
        r'methods was \[\] and is \["train_adamp"\]',
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_that_began_otherwise_is_not_resumed(change, stopped):
    act, message = CHANGES[change]
    if "train_adamp" in message:
        pytest.importorskip("eff_train_adamp", reason="the plugin train_adamp is not installed")
    act(stopped)
    before = {path.name: path.stat().st_mtime_ns for path in stopped.iterdir()}
    with pytest.raises(RequestError, match=message) as caught:
        resume(stopped)
    assert caught.value.exit_code == 2
    assert "restore that, or start anew with --force" in str(caught.value)
    assert {path.name: path.stat().st_mtime_ns for path in stopped.iterdir()} == before


def test_two_changes_are_named_together(stopped):
    CHANGES["another model file in its place"][0](stopped)
    _edit(stopped, "epochs: 4", "epochs: 5")
    with pytest.raises(RequestError, match="has other weights; train.epochs was 4 and is 5; restore"):
        resume(stopped)


def test_moved_files_another_device_name_and_further_exports_do_not_hinder_a_resume(stopped, weights, same):
    shutil.copytree(stopped, stopped.parent / "same")
    resume(stopped.parent / "same")
    for name, old in (("input.pt", "input.pt"), ("data.npz", "data.npz")):
        (stopped.parent / name).rename(stopped.parent / f"moved-{name}")
        _edit(stopped, old, f"moved-{name}")
    _edit(stopped, "device: cpu", "device: cpu:0\nexport: [safetensors]")
    _edit(stopped, "trust_pickle: false", "trust_pickle: true")
    _edit(stopped, "batch_size: 16", "batch_size: 16\n  checkpoint_every: 1")
    report = resume(stopped)
    assert report.training.resumed_at == 6 and (stopped / "model.safetensors").exists()
    assert same(weights(stopped), weights(stopped.parent / "same"))


def test_a_resume_file_without_a_beginning_is_refused(stopped):
    state = torch.load(stopped / "resume.pt", weights_only=True)
    del state["began"]
    torch.save(state, stopped / "resume.pt")
    with pytest.raises(RequestError, match="resume.pt was written by another version of eff; start anew with --force"):
        resume(stopped)


def test_the_fingerprint_of_a_state_sees_names_types_shapes_and_bits():
    state = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)}
    others = [
        {"w": state["w"].reshape(3, 2), "n": state["n"]},
        {"w": state["w"].double(), "n": state["n"]},
        {"v": state["w"], "n": state["n"]},
        {"w": state["w"], "n": torch.tensor(4)},
        {"w": state["w"].bfloat16(), "n": state["n"]},
        {"w": torch.where(state["w"] == 0, -0.0, state["w"]), "n": state["n"]},
    ]
    hashes = [state_fingerprint(item) for item in (state, *others)]
    assert len(set(hashes)) == len(hashes)
    assert state_fingerprint({"w": state["w"].T.contiguous().T, "n": state["n"]}) == hashes[0]  # strides do not count
    assert state_fingerprint({"w": state["w"].to_sparse(), "n": state["n"]}) == hashes[0]


def test_training_learns_and_the_report_says_what_happened(recipe, tmp_path):
    longer = recipe.model_copy(update={"train": TrainOptions(epochs=12, batch_size=32)})
    report = apply(longer, tmp_path / "run")
    assert report.after.metrics.values["accuracy"].value > 90
    assert report.training.steps == 96 and len(report.training.loss) == 12
    again = Report.model_validate_json((tmp_path / "run" / "report.json").read_text())
    assert again.after == report.after and again.versions["torch"] == torch.__version__


def test_a_recipe_repeats_its_run(recipe, tmp_path, weights, same):
    apply(recipe, tmp_path / "first")
    apply(read_recipe(tmp_path / "first" / "recipe.yaml"), tmp_path / "second")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_state(recipe, tmp_path):
    wild = recipe.model_copy(update={"train": TrainOptions(epochs=3, batch_size=64, lr=1e30)})
    with pytest.raises(
        NonFiniteLossError, match=r"the loss is .* at step \d+ of 12; start again with a smaller --lr"
    ) as caught:
        apply(wild, tmp_path / "run")
    assert caught.value.exit_code == 1
    state = torch.load(tmp_path / "run" / "resume.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values() if value.is_floating_point())


def test_a_bare_recipe_for_a_finished_model_measures_before_and_after(recipe, tmp_path):
    apply(recipe, tmp_path / "run")
    report = apply(Recipe(model=str(tmp_path / "run"), train=TrainOptions(epochs=0), device="cpu"), tmp_path / "again")
    assert report.before.metrics == report.after.metrics


def test_evaluate_equals_the_report(recipe, tmp_path):
    report = apply(recipe, tmp_path / "run")
    found = evaluate(UseRequest(str(tmp_path / "run"), device="cpu"))
    assert found.metrics.values["accuracy"] == report.after.metrics.values["accuracy"]
    # Another batch size may sum in another order.
    assert found.metrics.values["cross_entropy"].value == pytest.approx(
        report.after.metrics.values["cross_entropy"].value, rel=1e-6
    )


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
def test_standard_exports_agree_with_the_model(recipe, tmp_path, format):
    apply(recipe, tmp_path / "run")
    (artifact,) = export_model(UseRequest(str(tmp_path / "run"), device="cpu"), [format], tmp_path / "out")
    assert artifact.path.exists() and artifact.bytes == artifact.path.stat().st_size
    if format == "onnx":
        assert artifact.details["agreement"] == 1.0 and artifact.details["max_difference"] < 1e-5
        return
    request = UseRequest(str(artifact.path), data=DATA, device="cpu", trust_pickle=format == "pt2")
    expected = evaluate(UseRequest(str(tmp_path / "run"), device="cpu")).metrics.values["accuracy"]
    assert evaluate(request).metrics.values["accuracy"] == expected


def test_bench_measures_what_it_says(recipe, tmp_path):
    apply(recipe, tmp_path / "run")
    (row,) = bench([UseRequest(str(tmp_path / "run"), device="cpu")], seconds=0.05)
    assert row.latency_p90_ms >= row.latency_ms > 0 and row.throughput > 0
    assert row.parameters == 1292 and row.bytes == (tmp_path / "run" / "model.pt").stat().st_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA + "?train=0"}, "has no train split|empty|training"),
        ({"data": "digts"}, "did you mean 'digits'"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"train": TrainOptions(optimizer="sdg")}, "there is no optimizer 'sdg'; did you mean 'sgd'"),
        ({"export": ("onxx",)}, "nothing in this run writes 'onxx'; did you mean 'onnx'"),
        ({"model": "eff.testing.samples:tiny_cn"}, "has no function 'tiny_cn'; did you mean 'tiny_cnn'"),
        ({"methods": (MethodUse(name="quant_nope"),)}, "plugin 'quant_nope' is not installed"),
        ({"data": None}, "add --data"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_written(recipe, tmp_path, change, message):
    with pytest.raises(EffError, match=message) as caught:
        apply(recipe.model_copy(update=change), tmp_path / "run")
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_data_of_another_shape_or_with_more_classes_is_refused(recipe, tmp_path):
    import numpy as np

    apply(recipe, tmp_path / "run")
    images = np.zeros((40, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.arange(40) % 9, x_test=images, y_test=np.arange(40) % 9)
    with pytest.raises(DataError, match="9 classes"):
        evaluate(UseRequest(str(tmp_path / "run"), data=str(tmp_path / "data.npz"), device="cpu"))


def test_several_wrong_methods_are_all_reported(recipe):
    wrong = (MethodUse(name="quant_nope"), MethodUse(name="adv_nope"))
    with pytest.raises(Problems) as caught:
        make_plan(recipe.model_copy(update={"methods": wrong}))
    assert "quant_nope" in str(caught.value) and "adv_nope" in str(caught.value)


def test_two_providers_of_one_hook_are_refused_with_their_names(recipe, install, method_code):
    hooks = "@hookimpl\ndef train_step(self, step): return None"
    install("quant_one", method_code(hooks))
    install("train_two", method_code(hooks))
    uses = (MethodUse(name="quant_one"), MethodUse(name="train_two"))
    with pytest.raises(EffError, match="quant_one and train_two both provide train_step"):
        make_plan(recipe.model_copy(update={"methods": uses}))


def test_methods_are_chained_in_the_order_given(recipe, install, method_code, tmp_path):
    for name in ("quant_one", "train_two"):
        install(
            name,
            method_code(
                f"@hookimpl\ndef transform(self, model, run):\n    model.order = [*getattr(model, 'order', []), '{name}']\n    print(*model.order)\n    return model"
            ),
        )
    uses = tuple(MethodUse(name=name) for name in ("train_two", "quant_one"))
    report = apply(recipe.model_copy(update={"methods": uses, "train": TrainOptions(epochs=0)}), tmp_path / "run")
    assert [item.name for item in report.methods] == ["train_two", "quant_one"]


def test_a_transform_that_returns_nothing_is_named(recipe, install, method_code, tmp_path):
    install("quant_made", method_code("@hookimpl\ndef transform(self, model, run): pass"))
    with pytest.raises(EffError, match="quant_made: transform returned NoneType; it must return the module"):
        apply(recipe.model_copy(update={"methods": (MethodUse(name="quant_made"),)}), tmp_path / "run")


def test_a_metric_reported_twice_is_an_error(recipe, install, method_code, tmp_path):
    hooks = "@hookimpl\ndef evaluate(self, model, data, run):\n    from eff.schemas import Metric, Metrics\n    return Metrics.of(accuracy=Metric(value=1))"
    install("quant_made", method_code(hooks))
    with pytest.raises(
        EffError,
        match="metric 'accuracy' is reported by eff and by quant_made|metric 'accuracy' is reported by quant_made and by eff",
    ):
        apply(recipe.model_copy(update={"methods": (MethodUse(name="quant_made"),)}), tmp_path / "run")


def test_a_wrapper_around_evaluate_sees_every_measurement_and_may_change_it(recipe, install, method_code, tmp_path):
    install(
        "quant_made",
        method_code(
            """
            @hookimpl(wrapper=True)
            def evaluate(self, model, data, run):
                found = yield
                from eff.schemas import Metric, Metrics
                return [*found, Metrics.of(parts=Metric(value=len(found)))]
            """
        ),
    )
    report = apply(recipe.model_copy(update={"methods": (MethodUse(name="quant_made"),)}), tmp_path / "run")
    assert list(report.after.metrics.values) == ["parts", "accuracy", "cross_entropy"]
    assert report.after.metrics.values["parts"].value >= 1  # installed extensions may measure too


def test_a_wrapper_changes_the_objective_through_the_step(recipe, install, method_code, tmp_path):
    hooks = """
    @hookimpl(wrapper=True)
    def train_step(self, step):
        inner = step.loss
        def doubled(model, batch):
            loss, output = inner(model, batch)
            return 0 * loss + 42, output
        step.loss = doubled
        result = yield
        return result
    """
    install("train_made", method_code(hooks))
    report = apply(recipe.model_copy(update={"methods": (MethodUse(name="train_made"),)}), tmp_path / "run")
    assert report.training.loss == [42.0, 42.0]


def test_a_broken_recipe_is_refused_with_all_its_faults(tmp_path):
    (tmp_path / "r.yaml").write_text("model: a.pt\nseed: -1\ntrain:\n  epocs: 3\n")
    with pytest.raises(Problems) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert "seed" in str(caught.value) and "did you mean 'epochs'" in str(caught.value)


def test_the_default_folder_is_named_after_model_and_methods():
    uses = (MethodUse(name="quant_lsq"),)
    assert str(default_out("digits/model.pt", uses)) == "digits-quant_lsq"
    assert str(default_out("net.pt", uses)) == "net-quant_lsq"
    assert str(default_out("zoo:vit_tiny?depth=2", ())) == "vit_tiny"
    assert MODEL.endswith(str(default_out(MODEL, ())))
