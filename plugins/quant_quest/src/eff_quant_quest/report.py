"""What quant_quest measures: errors by timestep, distances between sample sets, sizes, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eff.data import Data
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_quant_kit.diffusion.frechet import frechet_distance, pca_features
from eff_quant_kit.diffusion.sampling import path_error, trajectories
from eff_quant_kit.packed import size_metrics
from eff_quant_quest.calibration import Calibrated, record_path, task_of

SAMPLES = 256


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return sizes, and what was measured when the float model was at hand."""
    values = size_metrics(model)
    measured: dict[str, float] = structure.get("measured", {})
    values |= {name: Metric(value=value, better="lower") for name, value in measured.items()}
    return Metrics(values=values, tables={"timesteps": structure.get("errors", [])})


def measure(
    model: nn.Module, ptq: nn.Module | None, calibrated: Calibrated, data: Data | None, run: Run
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the error to the float model and distances between sample sets, on a path and noise never used before."""
    task, timesteps = task_of(run), list(calibrated.path.t)
    path = record_path(calibrated.teacher, task, timesteps, calibrated.config, run, "evaluation")
    errors = path_error(model, path)
    rows = draw(model, ptq, calibrated, run)
    features = pca_features(rows["float"])
    values = {
        "eps_mse": sum(errors) / len(errors),
        "sample_mse": float((rows["float"] - rows["quant_quest"]).square().mean()),
    }
    for name, samples in list(rows.items())[1:]:
        values[f"frechet_to_float_{name}"] = frechet_distance(features(rows["float"]), features(samples))
    if data is not None and data.test is not None and len(data.test) > 1:
        images = 2 * data.test.batch(range(len(data.test)))["image"].to(run.device) - 1
        values["frechet_to_data"] = frechet_distance(features(images), features(rows["quant_quest"]))
    return values, [{"timestep": t, "eps_mse": error} for t, error in zip(path.t, errors, strict=True)]


def draw(model: nn.Module, ptq: nn.Module | None, calibrated: Calibrated, run: Run) -> dict[str, Tensor]:
    """Return samples of the float model, the calibrated and the finetuned one from the same noise."""
    task = task_of(run)

    def drawn(which: nn.Module) -> Tensor:
        generator = run.generator("quant_quest/samples")
        labels = task.labels(SAMPLES, generator)
        return trajectories(which, task.schedule, calibrated.path.t, labels, task.shape, generator).samples

    models = {"float": calibrated.teacher, "calibrated": ptq, "quant_quest": model}
    return {name: drawn(which) for name, which in models.items() if which is not None}
