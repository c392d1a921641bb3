"""The claim at desk scale: a CNN on digits with 8 convolutions to choose bits for, 120 configurations of 2, 3 and 4 bits.

Quality is minus the loss on 512 training images; 60 configurations for the search, 60 held out. Population 30, 300
iterations. The proxy found is also judged on a second network, trained from another seed, that the search never sees; signs
are those of the search half. Rank correlations are Spearman's over all held-out configurations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import load_data
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Plugins
from eff.training import Training
from eff_quant_emq.bench import Array, rank_correlation
from eff_quant_emq.config import EMQConfig
from eff_quant_emq.expressions import layer_scores
from eff_quant_emq.inputs import HAND_MADE
from eff_quant_emq.search import Search

CONFIG = EMQConfig(population=30, iterations=300, bench_size=120, exhaustive=0)
RANDOM_EXPRESSIONS = 200


class DigitsCNN(nn.Sequential):
    """Nine convolutions of 12 and 16 channels with batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        before = 1
        for index in range(9):
            after, stride = (12 if index < 4 else 16), (2 if index == 4 else 1)
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            before = after
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def trained(seed: int) -> tuple[nn.Module, Run]:
    """Return a trained network and a run on its data."""
    data = load_data(f"digits?seed={seed}")
    recipe = CORE_TRAINING.model_copy(update={"epochs": 12, "augment": False})
    run = Run(
        make_task(data.task, Plugins([], extensions=())), torch.device("cpu"), seed, data, train=recipe, training=True
    )
    seed_everything(seed, "model")
    model = DigitsCNN()
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

    def rho(scores: Array) -> float:
        value = rank_correlation(scores, held.quality)
        return 0.0 if np.isnan(value) else value

    found = {name: rho(held.bits @ search.known[name].numpy()) for name in HAND_MADE}
    found["best_hand_made"] = max(found.values())
    numel = np.array([weight.numel() for weight in search.inputs["weight"]], dtype=float)
    found |= {"bit_sum": rho(held.bits.sum(1)), "size": rho(held.bits @ numel)}
    found["evolved"] = rho(held.bits @ search.scores().numpy())
    found["evolved_on_search_half"] = search.evolution.population[0][0]
    found["random_best"] = rho(held.bits @ _best_of_random(search).numpy())
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
