"""What quant_quest measures: errors by timestep, distances between sample sets, sizes, and a picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff.data import Data
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff_quant_kit.diffusion.frechet import frechet_distance, pca_features
from eff_quant_kit.diffusion.pictures import draw_samples
from eff_quant_kit.diffusion.sampling import path_error, trajectories
from eff_quant_kit.packed import sizes
from eff_quant_quest.calibration import Calibrated, record_path, task_of

SAMPLES = 256


def describe(
    model: nn.Module, ptq: nn.Module | None, calibrated: Calibrated | None, data: Data | None, run: Run
) -> Metrics:
    """Return sizes and, where the float model is at hand, errors and distances on a path never used before."""
    values = {name: Metric(value=float(size), unit="bytes", better="lower") for name, size in sizes(model).items()}
    if calibrated is None:
        return Metrics(values=values)
    task, teacher = task_of(run), calibrated.teacher
    path = record_path(teacher, task, list(calibrated.path.t), calibrated.config, run, "evaluation")
    errors = path_error(model, path)
    values["eps_mse"] = Metric(value=sum(errors) / len(errors), better="lower")
    table = [{"timestep": t, "eps_mse": error} for t, error in zip(path.t, errors, strict=True)]

    def drawn(which: nn.Module) -> Tensor:
        generator = run.generator("quant_quest/samples")
        labels = task.labels(SAMPLES, generator)
        return trajectories(which, task.schedule, path.t, labels, task.shape, generator).samples

    rows = {"float": drawn(teacher), "quant_quest": drawn(model)}
    if ptq is not None:
        rows = {"float": rows["float"], "calibrated": drawn(ptq), "quant_quest": rows["quant_quest"]}
    features = pca_features(rows["float"])
    values["sample_mse"] = Metric(value=float((rows["float"] - rows["quant_quest"]).square().mean()), better="lower")
    for name, samples in list(rows.items())[1:]:
        distance = frechet_distance(features(rows["float"]), features(samples))
        values[f"frechet_to_float_{name}"] = Metric(value=distance, better="lower")
    if data is not None and data.test is not None and len(data.test) > 1:
        images = 2 * data.test.batch(range(len(data.test)))["image"].to(run.device) - 1
        distance = frechet_distance(features(images), features(rows["quant_quest"]))
        values["frechet_to_data"] = Metric(value=distance, better="lower")
    if run.keeps_files:
        with run.output("samples.png", format="png") as path_of_file:
            draw_samples(path_of_file, rows)
    torch.manual_seed(run.seed)
    return Metrics(values=values, tables={"timesteps": table})  # type: ignore[arg-type]
