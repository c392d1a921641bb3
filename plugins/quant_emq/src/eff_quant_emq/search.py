"""One search: layers, inputs, table, evolution, and what comes out."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from eff.errors import RunError
from eff.run import Run
from eff.schemas import Metric, Metrics
from eff.seeding import derive_seed
from eff_quant_emq.assign import assign
from eff_quant_emq.bench import build
from eff_quant_emq.config import EMQConfig
from eff_quant_emq.evolve import Evolution
from eff_quant_emq.expressions import RELEASED, Genes, layer_scores
from eff_quant_emq.inputs import PLUGIN, choose_layers, collect, hand_made
from eff_quant_emq.report import draw, proxy_rows
from eff_quant_kit.layers import quant_layers
from eff_quant_kit.packed import size_metrics


class Search:
    """What the steps of a search share."""

    def __init__(self, model: nn.Module, config: EMQConfig, run: Run):
        self.config, self.run, self.model = config, run, model
        self.names, self.fixed = choose_layers(model, run)
        self.inputs = collect(model, self.names, config, run)
        self.known = hand_made(model, self.names, self.inputs, config, run)
        self.table = build(model, self.names, self.fixed, config, run)
        self.evolution = Evolution(self.inputs, self.table.half(search=True), config)
        if config.preset == "none" and not run.restoring:
            self.evolution.fill(self._random("fill"))
            if len(self.evolution.population) < 2:
                raise RunError(
                    f"{PLUGIN}: hardly an expression is valid on this model; use more data or another structure"
                )

    def _random(self, name: str) -> random.Random:
        return random.Random(derive_seed(self.run.seed, f"{PLUGIN}/{name}"))

    def step(self, index: int) -> float:
        """Breed one child."""
        return self.evolution.step(self._random(f"step/{index}"))

    @property
    def genes(self) -> Genes | None:
        """The expression in use; None for a hand-made proxy."""
        if self.config.preset == "none":
            return self.evolution.best
        return RELEASED if self.config.preset == "released" else None

    def scores(self) -> Tensor:
        """Return the layer scores of the proxy in use."""
        genes = self.genes
        return self.known[self.config.preset] if genes is None else layer_scores(genes, self.inputs)

    def results(self) -> dict[str, Any]:
        """Return the proxy, the bits, and how all proxies do on the configurations kept from the search."""
        numel = np.array([weight.numel() for weight in self.inputs["weight"]], dtype=float)
        scores = {"in use": self.scores(), **self.known}
        return {
            "genes": self.genes or {"hand_made": self.config.preset},
            "bits": assign(self.model, self.names, self.fixed, self.scores(), self.config),
            "proxies": proxy_rows(scores, self.table.half(search=False), numel, self.config, self.run.seed),
            "full_evaluations": self.evolution.full,
            "drawn": self.evolution.seen,
            "configurations": len(self.table.quality),
        }

    def draw(self, path: Path) -> None:
        """Draw proxy against quality on the held-out half, and the evolution."""
        held = self.table.half(search=False)
        draw(
            held.bits @ self.scores().numpy(),
            held.quality,
            "Configurations kept from the search",
            self.evolution.history,
            path,
        )


def describe(model: nn.Module, structure: Mapping[str, Any]) -> Metrics:
    """Return the metrics of a model whose bits have been assigned; empty before."""
    if not quant_layers(model) or "proxies" not in structure:
        return Metrics()
    used = structure["proxies"][0]
    values = {
        **size_metrics(model),
        "full_evaluations": Metric(value=structure["full_evaluations"]),
    }
    if used.get("rho at 100 %") is not None:
        values["held_out_rho"] = Metric(value=used["rho at 100 %"], better="higher")
    tables = {
        "proxies": structure["proxies"],
        "bits": [{"layer": name, "bits": b} for name, b in structure["bits"].items()],
    }
    return Metrics(values=values, tables=tables)
