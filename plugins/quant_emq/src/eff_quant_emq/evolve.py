"""Evolution of expressions: prioritised drawing, screening, a diverse second parent, the worst replaced."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eff_quant_emq.bench import Table, rank_correlation
from eff_quant_emq.config import EMQConfig
from eff_quant_emq.expressions import Genes, crossed, layer_scores, mutated, random_genes, simplified

INVALID = -1.0
PROBES, PRECHECK, WEAK = 4, 10, 0.1
MOST_DRAWS = 20_000


class Evolution:
    """The population and what is known of expressions; `table` is the half that the search may see."""

    def __init__(self, inputs: Mapping[str, Sequence[Tensor]], table: Table, config: EMQConfig):
        self.inputs, self.table, self.config = inputs, table, config
        self.known: dict[str, float] = {}
        self.vectors: dict[str, float] = {}
        self.population: list[tuple[float, float, Genes]] = []
        """(fitness, rho of the best half, genes), best first."""
        self.full = self.seen = 0
        """Full evaluations, and expressions drawn."""
        self.history: list[float] = []

    def fill(self, rng: random.Random) -> None:
        """Draw valid expressions until the population is full."""
        sources = sorted(self.inputs)
        for _ in range(MOST_DRAWS):
            if len(self.population) == self.config.population:
                break
            self._add(random_genes(sources, self.config, rng))
        self.population.sort(key=lambda item: item[:2], reverse=True)

    def step(self, rng: random.Random) -> float:
        """Breed one child and put it in the place of the worst; return the best fitness."""
        config = self.config
        top = self.population[: max(2, len(self.population) // 2)]
        drawn = sorted(
            rng.sample(top, max(2, round(config.tournament * len(top)))), key=lambda item: item[:2], reverse=True
        )
        one = drawn[0][2]
        other = (rng.choice(drawn[1:]) if config.diversity else drawn[1])[2]
        child = crossed(one, other, rng) if rng.random() < config.p_cross else dict(one)
        if rng.random() < 0.5 or child == one:
            child = mutated(child, sorted(self.inputs), config, rng)
        if self._add(child):
            self.population.sort(key=lambda item: item[:2], reverse=True)
            self.population = self.population[: config.population]
        self.history.append(self.population[0][0])
        return self.population[0][0]

    def _add(self, genes: Genes) -> bool:
        self.seen += 1
        fitness, half, signed = self.fitness(genes)
        if fitness == INVALID or any(item[2] == signed for item in self.population):
            return False
        self.population.append((fitness, half, signed))
        return True

    def fitness(self, genes: Genes) -> tuple[float, float, Genes]:
        """Return rho over all and over the best half, and the genes with the sign that makes rho positive."""
        key = simplified(genes)
        if self.config.screening and key in self.known:
            return self.known[key], 0.0, {**genes, "sign": 1}
        scores = layer_scores({**genes, "sign": 1}, self.inputs)
        if not self._plausible(scores):
            self.known[key] = INVALID
            return INVALID, INVALID, genes
        ranked = self.table.bits @ scores.numpy()
        if self.config.screening:
            few = self.table.quality[:PRECHECK]
            rho = rank_correlation(ranked[:PRECHECK], few)
            vector = ",".join(f"{value:.6g}" for value in ranked[:PROBES])
            if vector in self.vectors or (len(few) == PRECHECK and not abs(rho) >= WEAK):
                self.known[key] = INVALID
                return INVALID, INVALID, genes
            self.vectors[vector] = rho
        self.full += 1
        rho, half = (rank_correlation(ranked, self.table.quality, share) for share in (1.0, 0.5))
        if math.isnan(rho):
            self.known[key] = INVALID
            return INVALID, INVALID, genes
        sign = -1 if rho < 0 else 1
        self.known[key] = abs(rho)
        return abs(rho), sign * (0.0 if math.isnan(half) else half), {**genes, "sign": sign}

    def _plausible(self, scores: Tensor) -> bool:
        """Whether scores are finite and rank configurations at all: constant ones rank by the sum of bits alone."""
        if not bool(torch.isfinite(scores).all()) or not bool((scores != 0).any()) or bool((scores == -1).all()):
            return False
        return float(scores.std()) > 1e-9 * float(scores.abs().max())

    @property
    def best(self) -> Genes:
        """The fittest expression."""
        return self.population[0][2]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but inputs and table."""
        return {key: getattr(self, key) for key in ("known", "vectors", "population", "full", "seen", "history")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        for key, value in state.items():
            setattr(self, key, value)
        self.population = [(item[0], item[1], item[2]) for item in state["population"]]
