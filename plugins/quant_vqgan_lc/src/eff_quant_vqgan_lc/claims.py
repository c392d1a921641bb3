"""The claim at desk scale: photographs of 64 x 64 pixels, five codebooks of 2048 entries of width 8.

vqgan:small (width 32, 64 tokens an image) on 800 photos, 200 for testing; L1 and the quantizer's terms alone (no GAN, no
perceptual loss: it would take most of a step on a CPU). 300 updates of 16 images, the same for every codebook, as are split,
order and initial weights of encoder and decoder. Every codebook starts with the latents' mean and spread, but for factorized
codes, which are on the unit sphere, and `random_tuned`, which is uniform in +-1/N as published; `random_tuned_matched` is the
same with the common start. Table: k-means over EfficientNet-Lite0's features of the training photos, stride 16 at 256 pixels,
averaged 4x4 (16 vectors a photo), no labels. Each photo gives 64 tokens: 51,200 in an epoch, 12,800 in the test set.

The photos: the folder that EFF_PHOTOS names, else ../shared/data/imagenet1k_samples (seen from the project or the current
folder).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eff.claims import ClaimRun
from eff.data import Data
from eff.errors import DataError
from eff.log import Log
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING, DataSpec
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_kit.codebooks import kmeans
from eff_quant_vqgan_lc.autoencoder import make_autoencoder
from eff_quant_vqgan_lc.config import FEATURES, VQGANLCConfig
from eff_quant_vqgan_lc.features import FrozenFeatures
from eff_quant_vqgan_lc.insert import insert
from eff_quant_vqgan_lc.model import PLUGIN, Tokenizer
from eff_quant_vqgan_lc.objective import Objective
from eff_quant_vqgan_lc.pictures import load
from eff_quant_vqgan_lc.plugin import VQGANLC
from eff_quant_vqgan_lc.report import coded
from eff_quant_vqgan_lc.table import patch_features
from eff_quant_vqgan_lc.usage import Usage

ENTRIES, STEPS, BATCH = 2048, 300, 16
KMEANS_ROUNDS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "frozen_linear": {},
    "tuned_features": {"codebook": "tuned_features", "projector": "none"},
    "random_tuned": {"codebook": "random_tuned", "start": "drawn"},
    "random_tuned_matched": {"codebook": "random_tuned"},
    "ema": {"codebook": "ema"},
    "factorized": {"codebook": "factorized"},
}
DRAWN = {"frozen_linear_drawn": {"start": "drawn"}}
"""The projector as the paper draws it; for the benchmark of sizes."""


def photos(train: int = 800, test: int = 200, size: int = 64) -> Data:
    """Return the photos.

    Raises:
        DataError: they are not here.
    """
    project = Path(__file__).resolve().parents[4]
    places = [os.environ.get("EFF_PHOTOS", "")]
    places += [str(root / ".." / "shared" / "data" / "imagenet1k_samples") for root in (project, Path.cwd())]
    for place in places:
        if place and Path(place).is_dir():
            return load(DataSpec.parse(f"pictures:folder:{place}?size={size}&train={train}&test={test}&seed=0"), None)
    raise DataError(
        f"{PLUGIN}: the claim needs 1000 photos in ../shared/data/imagenet1k_samples, or in a folder that EFF_PHOTOS names"
    )


def photos_2048(run: ClaimRun) -> dict[str, list[float]]:
    """Return utilisation and perplexity in % of the entries, and PSNR, for each codebook and seed."""
    data = photos()
    vectors = features_of(data, run.log)
    return run.by_seed("photos_2048", lambda seed: measure_all(data, vectors, ENTRIES, STEPS, seed, tuple(SETTINGS)))


def features_of(data: Data, log: Log, pool: int = 4) -> Tensor:
    """Return pooled patch features (M, C) of the training photos."""
    config = VQGANLCConfig()
    network = FrozenFeatures(FEATURES, (config.feature_layer,), config.feature_size)
    return patch_features(data.split("train"), network, pool, torch.device("cpu"), log)[0].flatten(0, 1)


def measure_all(
    data: Data, vectors: Tensor, entries: int, steps: int, seed: int, settings: tuple[str, ...]
) -> dict[str, float]:
    """Return the figures of some settings for one seed, with a table of their own."""
    generator = torch.Generator().manual_seed(seed)
    table, _ = kmeans(vectors, entries, KMEANS_ROUNDS, generator)
    found: dict[str, float] = {}
    for name in settings:
        values = trained(data, table, (SETTINGS | DRAWN)[name], steps, seed)[1]
        found |= {f"{name}_{key}": value for key, value in values.items()}
    if "random_tuned" in settings and "frozen_linear" in settings:
        found["frozen_over_random_tuned"] = found["frozen_linear_train_use"] / found["random_tuned_train_use"]
    return found


def trained(
    data: Data, table: Tensor, options: dict[str, Any], steps: int, seed: int, size: dict[str, Any] | None = None
) -> tuple[Tokenizer, dict[str, float]]:
    """Train one tokenizer; return it finished, with its figures.

    Args:
        data: the photos.
        table: E (N, C).
        options: of the method, what makes the setting.
        steps: updates.
        seed: of weights and order.
        size: options of the autoencoder that differ from vqgan:small's.
    """
    chosen = {"batch": BATCH, **options}
    epochs = max(1, steps // (len(data.split("train")) // chosen["batch"]))
    config = VQGANLCConfig(n_codes=len(table), rate_p=0, rate_d=0, epochs=epochs, **chosen)
    method = VQGANLC(config)
    plugins = Plugins([Chosen(PLUGIN, "", "eff-quant-vqgan-lc", method)], extensions=())
    recipe = method.training().over(CORE_TRAINING).model_copy(update={"augment": False})
    task = make_task(data.task, Plugins([]))
    run = Run(task, torch.device("cpu"), seed, data, train=recipe, training=True)
    seed_everything(seed, "model")
    model = insert(make_autoencoder("small", **(size or {})), config, method.structure, run, table)
    method.objective = Objective(model, config, run)
    Training(model, run, plugins).run_all()
    method.finish(model, run)
    usage = Usage(len(table))
    for _, codes in coded(model, data.split("test"), run.device):
        usage.update(codes)
    return model, {
        "train_use": 100.0 * float(str(method.structure["train_utilisation"])),
        "test_use": 100.0 * usage.utilisation,
        "test_perplexity": 100.0 * usage.perplexity / usage.entries,
        "psnr": task_metrics(model, data, run).values["psnr"].value,
    }
