"""Methods that only measure: no model is written, their files are, and data is asked for only where needed."""

import pytest
import torch

from eff.checkpoint import read_model_file
from eff.errors import PluginError, RequestError
from eff.run import Run
from eff.runner import apply, make_plan
from eff.schemas import MethodUse, Recipe, Report, TrainOptions
from eff.tasks import NoOptions, NoTask
from eff.testing.samples import DATA, MODEL
from eff.use import UseRequest, evaluate

MEASURER = """
from eff.method import Card, Field, Method, MethodConfig, hookimpl

class MadeConfig(MethodConfig):
    pass

class Made(Method[MadeConfig]):
    card = Card(title="T", authors=("A",), venue="V", year=2020, paper="none", url="none", needs={needs}, tasks={tasks})

    def check(self, model, run):
        from eff.errors import ModelError
        if {refuses}:
            raise ModelError("eval_made: cannot measure this")

    @hookimpl
    def evaluate(self, model, data, run):
        from eff.schemas import Metric, Metrics
        if run.keeps_files:
            with run.output("{file}", format="csv", rows=1) as path:
                path.write_text("index,value\\n0,1\\n")
                {then}
        return Metrics.of(kept=Metric(value=float(run.keeps_files)), had_data=Metric(value=float(data is not None)))
"""


@pytest.fixture
def measurer(install):
    def make(needs=("test_data",), tasks=("classification",), file="samples.csv", then="pass", refuses=False):
        code = MEASURER.format(needs=needs, tasks=tasks, file=file, then=then, refuses=refuses)
        install("eval_made", code)
        return (MethodUse(name="eval_made"),)

    return make


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_method_that_only_measures_leaves_a_report_and_its_files_but_no_model(recipe, measurer, tmp_path):
    report = apply(recipe.model_copy(update={"methods": measurer()}), tmp_path / "run")
    assert files(tmp_path / "run") == ["recipe.yaml", "report.json", "samples.csv"]
    assert report.before is None and report.training is None
    values = report.after.metrics.values
    assert values["kept"].value == 1 and values["had_data"].value == 1 and "accuracy" in values
    (artifact,) = Report.model_validate_json((tmp_path / "run" / "report.json").read_text()).artifacts
    assert (str(artifact.path), artifact.format, artifact.details) == ("samples.csv", "csv", {"rows": 1})
    assert artifact.bytes == (tmp_path / "run" / "samples.csv").stat().st_size


def test_the_plan_of_a_measurement_promises_no_model(recipe, measurer):
    plan = make_plan(recipe.model_copy(update={"methods": measurer()}))
    assert not plan.changes and not plan.trains
    assert plan.steps()[-1] == "write report.json, recipe.yaml and the methods' files"


def test_a_measurement_has_nothing_to_export(recipe, measurer):
    asked = recipe.model_copy(update={"methods": measurer(), "export": ("onnx",)})
    with pytest.raises(RequestError, match="changes nothing that could be exported; use eff export MODEL --to"):
        make_plan(asked)


def test_the_measurement_before_a_change_keeps_no_files(recipe, measurer, install, method_code, tmp_path):
    install("quant_made", method_code("@hookimpl\ndef transform(self, model, run): return model"))
    uses = (MethodUse(name="quant_made"), *measurer())
    changed = recipe.model_copy(update={"methods": uses, "train": TrainOptions(epochs=0)})
    report = apply(changed, tmp_path / "run")
    assert report.before.metrics.values["kept"].value == 0 and report.after.metrics.values["kept"].value == 1
    assert files(tmp_path / "run") == ["model.pt", "recipe.yaml", "report.json", "samples.csv"]
    header = read_model_file(tmp_path / "run" / "model.pt").header
    assert [item.name for item in header.methods] == ["quant_made"]  # only what a reload needs


def test_evaluate_keeps_the_files_where_a_folder_is_named(recipe, measurer, tmp_path):
    apply(recipe, tmp_path / "run")
    uses = measurer()
    request = UseRequest(str(tmp_path / "run"), device="cpu")
    assert evaluate(request, uses).metrics.values["kept"].value == 0
    measured = evaluate(request, uses, out=tmp_path / "kept")
    assert measured.metrics.values["kept"].value == 1
    assert files(tmp_path / "kept") == ["measurement.json", "samples.csv"]
    with pytest.raises(RequestError, match="--force"):
        evaluate(request, uses, out=tmp_path / "kept")
    evaluate(request, uses, out=tmp_path / "kept", force=True)


def test_a_method_that_needs_no_data_runs_without_and_gets_none(measurer, tmp_path):
    asked = Recipe(model=MODEL, methods=measurer(needs=(), tasks=("any",)), device="cpu")
    report = apply(asked, tmp_path / "run")
    assert report.after.metrics.values["had_data"].value == 0 and "accuracy" not in report.after.metrics.values
    assert report.after.latency_ms is None and report.after.parameters == 1292


def test_a_method_that_needs_data_says_so(measurer, tmp_path):
    with pytest.raises(RequestError, match="add --data"):
        apply(Recipe(model=MODEL, methods=measurer(), device="cpu"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_for_another_task_is_refused(recipe, measurer, tmp_path):
    with pytest.raises(RequestError, match="eval_made is for dehazing, the model's task is classification"):
        apply(recipe.model_copy(update={"methods": measurer(tasks=("dehazing",))}), tmp_path / "run")


@pytest.mark.parametrize("name", ["../outside.csv", "model.pt", "report.json", "sub/table.csv", ""])
def test_a_file_of_a_method_stays_in_the_folder_and_spares_cores_own(recipe, measurer, tmp_path, name):
    with pytest.raises(PluginError, match="is no name for a method's file"):
        apply(recipe.model_copy(update={"methods": measurer(file=name)}), tmp_path / "run")
    assert not (tmp_path / "outside.csv").exists()


def test_a_file_that_was_not_finished_does_not_appear(recipe, measurer, tmp_path):
    uses = measurer(then="raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        apply(recipe.model_copy(update={"methods": uses}), tmp_path / "run")
    assert not [name for name in files(tmp_path / "run") if "samples" in name]


def test_output_is_refused_where_no_folder_is(tmp_path):
    run = Run(NoTask(NoOptions()), torch.device("cpu"))
    with pytest.raises(PluginError, match="ask run.keeps_files before run.output"), run.output("a.csv", "csv"):
        pass


def test_a_model_that_a_method_cannot_measure_is_refused_before_anything_is_written(recipe, measurer, tmp_path):
    uses = measurer(refuses=True)
    with pytest.raises(RequestError, match="cannot measure this"):
        apply(recipe.model_copy(update={"methods": uses}), tmp_path / "run")
    with pytest.raises(RequestError, match="cannot measure this"):
        evaluate(UseRequest(MODEL, data=DATA, device="cpu"), uses, out=tmp_path / "kept")
    assert not (tmp_path / "run").exists() and not (tmp_path / "kept").exists()
