"""The claims at desk scale: CNNs on digits, quality is minus the loss on 512 training images, population 30, 300 iterations.

`digits`: 8 convolutions to choose 2, 3 or 4 bits for; 120 configurations, 60 for the search and 60 held out. The proxy found is
also judged on a second network, trained from another seed, that the search never sees; signs are those of the search half.
`exhaustive`: 6 convolutions and all 729 configurations, half of them held out. Since every quality is known, so is the place of
what a proxy picks: `pick` is the share of the configurations of at most 3 bits a weight that are better than its choice among
them. Rank correlations are Spearman's, those called `tau` Kendall's, over all held-out configurations.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import stats
from torch import nn

from eff.claims import ClaimRun
from eff.data import load_data
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Plugins
from eff.training import Training
from eff_quant_emq.bench import Array, Table, rank_correlation
from eff_quant_emq.config import EMQConfig
from eff_quant_emq.expressions import layer_scores
from eff_quant_emq.inputs import HAND_MADE
from eff_quant_emq.search import Search

CONFIG = EMQConfig(population=30, iterations=300, bench_size=120, exhaustive=0)
RANDOM_EXPRESSIONS, EPOCHS = 200, 12
PICK_BITS = 3.0


class DigitsCNN(nn.Sequential):
    """Convolutions of 12, then 16 channels with batch norm and ReLU, then a linear layer; the first has no bits to choose."""

    def __init__(self, convolutions: int = 9) -> None:
        layers: list[nn.Module] = []
        before = 1
        for index in range(convolutions):
            after, stride = (12 if index < 4 else 16), (2 if index == 4 else 1)
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def trained(seed: int, convolutions: int = 9) -> tuple[nn.Module, Run]:
    """Return a trained network and a run on its data."""
    data = load_data(f"digits?seed={seed}")
    recipe = CORE_TRAINING.model_copy(update={"epochs": EPOCHS, "augment": False})
    run = Run(
        make_task(data.task, Plugins([], extensions=())), torch.device("cpu"), seed, data, train=recipe, training=True
    )
    seed_everything(seed, "model")
    model = DigitsCNN(convolutions)
    Training(model, run, Plugins([], extensions=())).run_all()
    return model.eval(), run


def digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return rank correlations by proxy and seed."""
    return run.by_seed("digits", _one_seed)


def _one_seed(seed: int) -> dict[str, float]:
    model, run = trained(seed)
    search = Search(model, CONFIG, run)
    for index in range(CONFIG.iterations):
        search.step(index)
    held = search.table.half(search=False)
    proxies = {**_proxies(search), "random_best": _best_of_random(search).numpy()}
    found = {name: _rho(held.bits @ scores, held.quality) for name, scores in proxies.items()}
    found["best_hand_made"] = max(found[name] for name in HAND_MADE)
    found["evolved_on_search_half"] = search.evolution.population[0][0]
    other, other_run = trained(seed + 100)
    second = Search(other, CONFIG.model_copy(update={"preset": "plain"}), other_run)
    ranked = second.table.bits @ layer_scores(search.evolution.best, second.inputs).numpy()
    found["evolved_on_second_network"] = rank_correlation(ranked, second.table.quality)
    unscreened = Search(model, CONFIG.model_copy(update={"screening": False}), run)
    plain = Search(model, CONFIG.model_copy(update={"diversity": False}), run)
    for index in range(CONFIG.iterations):
        unscreened.step(index)
        plain.step(index)
    found["full_without_screening_over_with"] = unscreened.evolution.full / search.evolution.full
    found["plateau_diverse"] = _plateau(search.evolution.history)
    found["plateau_not_diverse"] = _plateau(plain.evolution.history)
    return found


def exhaustive(run: ClaimRun) -> dict[str, list[float]]:
    """Return rank correlations and places of the picks by proxy and seed, over all configurations of a small space."""
    return run.by_seed("exhaustive", _exhaustive)


def _exhaustive(seed: int) -> dict[str, float]:
    model, run = trained(seed, convolutions=7)
    search = Search(model, CONFIG.model_copy(update={"exhaustive": len(CONFIG.bits) ** 6}), run)
    for index in range(CONFIG.iterations):
        search.step(index)
    held, proxies = search.table.half(search=False), _proxies(search)
    found: dict[str, float] = {"configurations": len(search.table.quality)}
    for name, scores in proxies.items():
        ranked = held.bits @ scores
        found[name] = _rho(ranked, held.quality)
        found[f"{name}_tau"] = float(stats.kendalltau(ranked, held.quality).statistic)
        found[f"{name}_pick"] = pick(search.table, scores, proxies["size"])
    for suffix in ("", "_tau"):
        found[f"best_hand_made{suffix}"] = max(found[f"{name}{suffix}"] for name in HAND_MADE)
    found["evolved_on_search_half"] = search.evolution.population[0][0]
    return found


def pick(table: Table, scores: Array, numel: Array) -> float:
    """Return how many percent of the configurations within `PICK_BITS` are better than the one that scores highest."""
    fits = table.bits @ numel <= PICK_BITS * numel.sum()
    quality = table.quality[fits]
    return 100 * float((quality > quality[np.argmax((table.bits @ scores)[fits])]).mean())


def _proxies(search: Search) -> dict[str, Array]:
    """Return the layer scores of the evolved proxy, the hand-made ones, the sum of bits and the size."""
    numel = np.array([weight.numel() for weight in search.inputs["weight"]], dtype=float)
    known = {name: search.known[name].numpy() for name in HAND_MADE}
    return {"evolved": search.scores().numpy(), **known, "bit_sum": np.ones_like(numel), "size": numel}


def _rho(scores: Array, quality: Array) -> float:
    value = rank_correlation(scores, quality)
    return 0.0 if np.isnan(value) else value


def _best_of_random(search: Search) -> torch.Tensor:
    """Return the layer scores of the best, on the search half, of 200 valid random expressions."""
    from eff_quant_emq.evolve import Evolution

    many = Evolution(
        search.inputs, search.table.half(search=True), CONFIG.model_copy(update={"population": RANDOM_EXPRESSIONS})
    )
    many.fill(search._random("random expressions"))
    return layer_scores(many.best, search.inputs)


def _plateau(history: list[float]) -> float:
    """Return the iteration after which the best fitness no longer rises."""
    return float(next(index for index, value in enumerate(history) if value == history[-1]))
