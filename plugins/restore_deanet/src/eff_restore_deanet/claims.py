"""The paper's claim at desk scale: photographs under synthetic haze.

400 photos for training and 60 for testing, crops of 64 x 64, haze by the scattering equation over smooth
random depth. deanet:tiny (width 8, blocks 1, 1, 2), 500 steps of 8 images, mean absolute error, Adam with
a cosine from 1e-3: 500 steps are too few for the paper's 1e-4. Baselines of the same size when deployed:
plain convolutions in place of DEConvs; and these without attention. PSNR in dB on the test photos.

The photos: the folder that EFF_PHOTOS names, else ../shared/data/imagenet1k_samples (seen from the project
or the current folder), else the samples of scikit-image and scikit-learn, 67 and 27 parts of 7 photos.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from eff.claims import ClaimRun
from eff.data import Data
from eff.measure import task_metrics
from eff.run import Run
from eff.schemas import CORE_TRAINING, DataSpec, TaskSpec
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_restore_deanet.building import make_deanet
from eff_restore_deanet.config import DEANetConfig
from eff_restore_deanet.network import DEANet as Network
from eff_restore_deanet.plugin import DEANet
from eff_restore_kit.sources import load_photos
from eff_restore_kit.task import Restoration

STEPS, BATCH, TRAIN, TEST = 500, 8, 400, 60
CONFIG = DEANetConfig(lr=1e-3, lr_min=0, w_cr=0, batch=BATCH)
SETTINGS: dict[str, dict[str, Any]] = {
    "deanet": {},
    "plain_conv": {"branches": "none"},
    "no_attention": {"attention": False},
}


def photo_source() -> tuple[str, str]:
    """Return the data source of the photos without its seed, and a word for it."""
    project = Path(__file__).resolve().parents[4]
    places = [os.environ.get("EFF_PHOTOS", "")]
    places += [str(root / ".." / "shared" / "data" / "imagenet1k_samples") for root in (project, Path.cwd())]
    for place in places:
        if place and Path(place).is_dir():
            return f"photos:{place}?degrade=haze&size=64&train={TRAIN}&test={TEST}", place
    return "photos?degrade=haze&size=64", "samples of scikit-image and scikit-learn"


def dehaze_photos(run: ClaimRun) -> dict[str, list[float]]:
    """Return PSNR of each setting for each seed, with the error and the weights of folding."""
    names = (*SETTINGS, "hazy", "fold_error", "folded_weights", "plain_weights")
    measured: dict[str, list[float]] = {name: [] for name in names}
    source, where = photo_source()
    run.log.info(f"photos: {where}")
    for seed in run.log.track(run.seeds, "dehaze_photos"):
        data = load_photos(DataSpec.parse(f"{source}&seed={seed}"), None)
        for name, options in SETTINGS.items():
            seed_everything(seed, "model")
            model = make_deanet("tiny", **options)
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on CPUs
            method = DEANet(CONFIG)
            trained, values = _train(model, data, seed, method)
            measured[name].append(values["psnr"])
            weights = sum(parameter.numel() for parameter in trained.parameters())
            if name == "deanet":
                measured["hazy"].append(values["input_psnr"])
                measured["fold_error"].append(float(method.structure["fold_error"]))  # type: ignore[arg-type]
                measured["folded_weights"].append(weights)
            elif name == "plain_conv":
                measured["plain_weights"].append(weights)
    return measured


def _train(model: Network, data: Data, seed: int, method: DEANet) -> tuple[torch.nn.Module, dict[str, float]]:
    """Train for `STEPS` steps, finish, and return the model with its metrics."""
    assert data.train is not None  # the source has both splits
    steps_per_epoch = len(data.train) // BATCH
    plugins = Plugins([Chosen("restore_deanet", "", "eff-restore-deanet", method)], extensions=())
    recipe = method.training().over(CORE_TRAINING).model_copy(update={"epochs": -(-STEPS // steps_per_epoch)})
    task = Restoration.from_spec(TaskSpec(name="restoration", options={**data.task.options, **model.task_options}))
    run = Run(task, torch.device("cpu"), seed, data, train=recipe, training=True)
    Training(model, run, plugins).run_all()
    trained = method.finish(model, run)
    return trained, {name: metric.value for name, metric in task_metrics(trained, data, run).values.items()}
