"""Use of the codebook against its size: the settings of the claim at several N, drawn as a picture.

    python plugins/quant_vqgan_lc/benchmarks/utilisation_by_size.py [--sizes 256,1024,4096] [--steps 300] [-o FILE.png] [--json]

Needs the photos of the claim. One seed, tables by k-means over the same features, the same steps for all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from eff.log import Log
from eff_quant_vqgan_lc.claims import features_of, measure_all, photos

SETTINGS = ("frozen_linear", "random_tuned", "random_tuned_matched", "ema", "factorized")


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,1024,4096")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("-o", "--out", type=Path, default=None)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    data = photos()
    vectors = features_of(data, Log())
    settings = tuple(arguments.settings.split(","))
    rows = []
    for size in map(int, arguments.sizes.split(",")):
        found = measure_all(data, vectors, size, arguments.steps, 0, settings)
        for name in settings:
            rows.append({"entries": size, "setting": name, **{
                key: found[f"{name}_{key}"] for key in ("train_use", "test_use", "test_perplexity", "psnr")
            }})  # fmt: skip
            if not arguments.json:
                print(
                    " ".join(
                        f"{key} {value if isinstance(value, (str, int)) else round(value, 2)}"
                        for key, value in rows[-1].items()
                    ),
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows))
    if arguments.out is not None:
        draw(rows, settings, arguments.out)


def draw(rows: list[dict], settings: tuple[str, ...], path: Path) -> None:  # type: ignore[type-arg]
    """Write utilisation over the last epoch against N, one line per setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in settings:
        own = [row for row in rows if row["setting"] == name]
        axes.plot(
            [row["entries"] for row in own], [row["train_use"] for row in own], "o-", label=name.replace("_", " ")
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["entries"] for row in rows if row["setting"] == settings[0]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylim(0, 102)
    axes.set_xlabel("entries N")
    axes.set_ylabel("used in the last epoch, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=120)


if __name__ == "__main__":
    main()
