"""What quant_efficientdm measures: error by step, distances between sample sets, changed integers, sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eff.data import Data
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_quant_efficientdm.distill import Distillation, evaluation_path
from eff_quant_kit.diffusion.frechet import frechet_distance, pca_features
from eff_quant_kit.diffusion.sampling import path_error, trajectories
from eff_quant_kit.packed import size_metrics

SAMPLES, ERROR_SAMPLES = 256, 64


def measure(distillation: Distillation, changed: Mapping[str, float], data: Data | None, run: Run) -> dict[str, Any]:
    """Return figures and tables for the checkpoint, measured on noise that training never used."""
    path = evaluation_path(distillation.teacher, distillation.task, distillation.timesteps, run, ERROR_SAMPLES)
    errors = path_error(distillation.model, path)
    rows = draw(distillation, run)
    features = pca_features(rows["float"])
    values = {"eps_mse": sum(errors) / len(errors)}
    for name in ("calibrated", "efficientdm"):
        values[f"frechet_to_float_{name}"] = frechet_distance(features(rows["float"]), features(rows[name]))
    if data is not None and data.test is not None and len(data.test) > 1:
        images = 2 * data.test.batch(range(len(data.test)))["image"].to(run.device) - 1
        values["frechet_to_data"] = frechet_distance(features(images), features(rows["efficientdm"]))
    return {
        "measured": values,
        "errors": [{"timestep": t, "eps_mse": error} for t, error in zip(path.t, errors, strict=True)],
        "changed": [{"layer": name, "changed_share": share} for name, share in changed.items()],
    }


def draw(distillation: Distillation, run: Run) -> dict[str, Tensor]:
    """Return samples of the float, the calibrated and the distilled model from the same noise."""
    task = distillation.task

    def drawn(which: nn.Module) -> Tensor:
        generator = run.generator("quant_efficientdm/samples")
        labels = task.labels(SAMPLES, generator)
        return trajectories(which, task.schedule, distillation.timesteps, labels, task.shape, generator).samples

    models = {"float": distillation.teacher, "calibrated": distillation.ptq, "efficientdm": distillation.model}
    return {name: drawn(which) for name, which in models.items()}


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return sizes and what was measured when the float model was at hand."""
    values = size_metrics(model)
    values |= {name: Metric(value=value, better="lower") for name, value in structure.get("measured", {}).items()}
    return Metrics(values=values, tables={key: structure.get(key, []) for key in ("errors", "changed")})
