"""The table that expressions are judged by: bit configurations and the measured quality of the quantized model.

Weights round to nearest on a min-max grid per output channel. All configurations of a small space, else random ones; every
second one is kept from the search.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import nn

from eff.errors import RequestError
from eff.modes import eval_mode
from eff.run import Run
from eff_quant_emq.config import EMQConfig
from eff_quant_kit.sensitivity import rounded

Array = NDArray[np.float64]
PLUGIN = "quant_emq"


@dataclass(frozen=True)
class Table:
    """Configurations (N, L) and their quality (N,), higher is better."""

    bits: Array
    quality: Array

    def half(self, search: bool) -> Table:
        """Return the even rows, which the search sees, or the odd ones."""
        chosen = slice(0, None, 2) if search else slice(1, None, 2)
        return Table(self.bits[chosen], self.quality[chosen])


def configurations(layers: int, config: EMQConfig, run: Run) -> Array:
    """Return different configurations in random order: all of them where they are few."""
    generator = run.generator(f"{PLUGIN}/bench")
    if len(config.bits) ** layers <= config.exhaustive:
        every = np.array(list(itertools.product(config.bits, repeat=layers)), dtype=float)
        order: Array = every[torch.randperm(len(every), generator=generator).numpy()]
        return order
    rows: dict[tuple[int, ...], None] = {}
    while len(rows) < config.bench_size:
        draw = torch.randint(len(config.bits), (layers,), generator=generator).tolist()
        rows[tuple(config.bits[index] for index in draw)] = None
    return np.array(list(rows), dtype=float)


def build(model: nn.Module, names: list[str], fixed: list[str], config: EMQConfig, run: Run) -> Table:
    """Measure every configuration: minus the loss on samples; the model is left as it was.

    Raises:
        RequestError: all configurations are equally good, so that nothing can be ranked.
    """
    rows = configurations(len(names), config, run)
    kept = {name: model.get_submodule(name).weight.detach().clone() for name in (*names, *fixed)}  # type: ignore[operator]
    versions = {(name, b): rounded(kept[name], b) for name in names for b in config.bits}
    batches = list(run.batches("train", config.bench_samples, 256))
    quality = []
    try:
        with eval_mode(model), torch.no_grad():
            for name in fixed:
                model.get_submodule(name).weight.copy_(rounded(kept[name], 8))  # type: ignore[operator, union-attr]
            for row in run.log.track(rows, "benchmark", total=len(rows)):
                for name, b in zip(names, row, strict=True):
                    model.get_submodule(name).weight.copy_(versions[name, int(b)])  # type: ignore[operator, union-attr]
                sizes = [len(next(iter(batch.values()))) for batch in batches]
                losses = [float(run.task.loss(run.forward(model, batch), batch)) for batch in batches]
                quality.append(-sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes))
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)  # type: ignore[operator, union-attr]
    table = Table(rows, np.array(quality))
    check(table, len(names))
    return table


def check(table: Table, layers: int) -> None:
    """Raise where a rank correlation is undefined.

    Raises:
        RequestError: no rows, one quality, or rows of another length than the layers.
    """
    if not len(table.quality) or float(np.ptp(table.quality)) == 0:
        raise RequestError(f"{PLUGIN}: all configurations of the table are equally good; nothing can be ranked")
    if table.bits.shape[1] != layers:
        raise RequestError(f"{PLUGIN}: configurations name {table.bits.shape[1]} layers, the model has {layers}")


def rank_correlation(score: Array, quality: Array, share: float = 1.0) -> float:
    """Return Spearman's rho over the best `share` of the configurations; NaN where a side is constant."""
    count = max(3, round(share * len(quality)))
    best = np.argsort(-quality, kind="stable")[:count]
    if np.ptp(score[best]) == 0 or np.ptp(quality[best]) == 0:
        return float("nan")
    return float(stats.spearmanr(score[best], quality[best]).statistic)


def partial_correlation(score: Array, quality: Array, size: Array) -> float:
    """Return Spearman's rho with the ranks' dependence on the size taken out; NaN where nothing is left."""
    ranks = [stats.rankdata(values) for values in (score, quality, size)]
    design = np.stack([ranks[2], np.ones_like(ranks[2])], 1)
    left = [r - design @ np.linalg.lstsq(design, r, rcond=None)[0] for r in ranks[:2]]
    norms = [np.linalg.norm(value) for value in left]
    return float(left[0] @ left[1] / (norms[0] * norms[1])) if min(norms) > 1e-6 else float("nan")


def bootstrap(score: Array, quality: Array, share: float, seed: int, draws: int = 200) -> tuple[float, float]:
    """Return the 5 and 95 % points of rho over resampled configurations."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        chosen = generator.integers(0, len(quality), len(quality))
        found.append(rank_correlation(score[chosen], quality[chosen], share))
    low, high = np.nanpercentile(found, [5, 95])
    return float(low), float(high)
