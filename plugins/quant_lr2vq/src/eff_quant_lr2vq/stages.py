"""The two stages of training: low-rank weights first, then clustered ones with a falling temperature."""

from __future__ import annotations

import math

from eff.run import Run, Step
from eff_quant_lr2vq.config import LR2VQConfig
from eff_quant_lr2vq.dkm import temperature
from eff_quant_lr2vq.insert import PLUGIN, blocks


def stage_steps(run: Run, config: LR2VQConfig) -> tuple[int, int]:
    """Return the steps of both stages; a number of epochs given by the user is shared in the same proportion."""
    batch = (run.train.batch_size or 64) * (run.train.accumulate or 1)
    per_epoch = max(1, len(run.split("train")) // batch)
    epochs, planned = run.train.epochs or 0, config.stage1_epochs + config.stage2_epochs
    first = round(epochs * config.stage1_epochs / planned) if planned else 0
    return first * per_epoch, (epochs - first) * per_epoch


def prepare_step(step: Step, config: LR2VQConfig) -> None:
    """Start the clustering when it is time, set temperature and learning rate, keep the projections orthonormal."""
    first, second = stage_steps(step.run, config)
    found = blocks(step.module)
    clustering = step.index >= first
    progress = (step.index - first) / max(1, second) if clustering else step.index / max(1, first)
    if step.last_of_step and not clustering and step.index % max(1, first // max(1, config.stage1_epochs)) == 0:
        for block in found.values():
            block.orthonormalise()
    for name, block in found.items():
        if clustering and not bool(block.unit):
            block.start_clustering(step.run.generator(f"{PLUGIN}/kmeans/{name}"))
        block.tau = temperature(progress, config.tau_start, config.tau_end)
    if step.optimizer is not None and step.run.train.schedule == "constant":
        for group in step.optimizer.param_groups:
            group["lr"] *= 0.5 * (1 + math.cos(math.pi * progress))
