"""Rank correlations of the evolved and the known proxies on configurations that the search never saw, and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from eff.schemas import TableRow
from eff_quant_emq.bench import Array, Table, bootstrap, partial_correlation, rank_correlation
from eff_quant_emq.config import EMQConfig


def proxy_rows(scores: dict[str, Tensor], table: Table, numel: Array, config: EMQConfig, seed: int) -> list[TableRow]:
    """Return by proxy Spearman's rho at each share, Kendall's tau, rho at fixed size and a 90 % interval.

    Proxies without a sign of their own are not flipped: what ranks the wrong way round shows as negative.
    """
    from scipy import stats

    size = table.bits @ numel
    ranked = {name: table.bits @ values.numpy() for name, values in scores.items()}
    ranked |= {"bit sum": table.bits.sum(1), "size": size}
    rows: list[TableRow] = []
    for name, values in ranked.items():
        row: TableRow = {"proxy": name}
        for share in config.topk:
            row[f"rho at {round(100 * share)} %"] = rank_correlation(values, table.quality, share)
        row["tau"] = float(stats.kendalltau(values, table.quality).statistic)
        row["rho at fixed size"] = partial_correlation(values, table.quality, size)
        row["from"], row["to"] = bootstrap(values, table.quality, 1.0, seed)
        rows.append(
            {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
        )
    return rows


def draw(score: Array, quality: Array, title: str, history: list[float], path: Path) -> None:
    """Draw the held-out configurations, quality over proxy, and the best fitness over the iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    left.scatter(score, quality, s=14, alpha=0.7)
    left.set_xlabel("proxy S(b)")
    left.set_ylabel("minus the loss of the quantized model")
    left.set_title(title, fontsize=10)
    right.plot(range(1, len(history) + 1), history)
    right.set_xlabel("iteration")
    right.set_ylabel("best rank correlation, search half")
    right.set_title("Evolution", fontsize=10)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)
