"""A codebook of 100,000 entries: its table, the search in it, and its use after a short training.

    python plugins/quant_vqgan_lc/benchmarks/large_table.py [--steps 100] [--settings frozen_linear,ema,factorized] [--json]

Needs the photos of the claim. The table is the paper's: k-means by class with 100 centres, here over the 196 patch features
(EfficientNet-Lite0, stride 16 at 224 pixels, no pooling) of the one photo of each of 1000 classes. The search takes 65,536
latents of width 8, in a process of its own whose largest memory is measured above what it holds before. Training: 64 x 64
pixels, 4 x 4 per token, so that an epoch of 800 photos, 100 steps, has 204,800 tokens and the 200 test photos 51,200; use is
counted over the last epoch and the test photos, beside what as many tokens drawn evenly would use. Each part runs in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ENTRIES, CLASSES_ROWS, LATENTS, WIDTH, ROUNDS, BATCH = 100_000, 100, 65_536, 8, 10, 8
PARTS = ("table", "search", "train")


def main() -> None:
    """Run the parts one after another and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--settings", default="frozen_linear,ema,factorized")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part = {"table": make, "search": search, "train": train}[arguments.part]
        print(json.dumps(part(arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.pt"
        result = run_part("table", table) | run_part("search", table)
        show(result, arguments.json)
        for setting in arguments.settings.split(","):
            result |= (new := run_part("train", table, "--setting", setting, "--steps", str(arguments.steps)))
            show(new, arguments.json)
    if arguments.json:
        print(json.dumps(result))


def show(result: dict[str, float], as_json: bool) -> None:
    """Print figures as they come."""
    if not as_json:
        print("\n".join(f"{key}: {value}" for key, value in result.items()), flush=True)


def run_part(part: str, table: Path, *more: str) -> dict[str, float]:
    """Return what a part of this script prints in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--table", str(table), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(arguments: argparse.Namespace) -> dict[str, float]:
    """Make the table by the method's own code and keep it."""
    from eff.data import Data
    from eff.run import Run
    from eff_quant_vqgan_lc.claims import photos
    from eff_quant_vqgan_lc.config import FEATURES, VQGANLCConfig
    from eff_quant_vqgan_lc.features import FrozenFeatures
    from eff_quant_vqgan_lc.table import make_table
    from eff_quant_vqgan_lc.task import Tokenization, TokenizationOptions

    started = time.monotonic()
    data = photos(train=1000, test=0, size=224)
    config = VQGANLCConfig(n_codes=ENTRIES, centres_per_class=CLASSES_ROWS, pool=1, kmeans_iters=ROUNDS)
    run = Run(
        Tokenization(TokenizationOptions(**data.task.options)),
        torch.device("cpu"),
        data=Data(data.spec, data.task, data.train),
    )
    table = make_table(config, run, FrozenFeatures(FEATURES, (config.feature_layer,), None))
    torch.save(table, arguments.table)
    return {"rows": len(table), "width": table.shape[1], "table_seconds": round(time.monotonic() - started, 1)}


def search(arguments: argparse.Namespace) -> dict[str, float]:
    """Time the search for latents spread like the entries, and measure the memory it adds."""
    from eff_quant_vqgan_lc.codebook import Codebook, make_projector

    torch.manual_seed(0)
    table = torch.load(arguments.table, weights_only=True)
    book = Codebook(table, False, make_projector("linear", table.shape[1], WIDTH)).eval()
    z = torch.randn(LATENTS, WIDTH)
    with torch.no_grad():
        book.match(z)
        book(z[:64])  # whatever is loaded on first use
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        codes = book(z).codes
        seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        entries = book.entries()
        some = torch.arange(0, LATENTS, LATENTS // 64)
        exact = torch.cdist(z[some].double(), entries.double()).min(1).values
        worst = float(((z[some] - entries[codes[some]]).double().norm(dim=1) - exact).max())
    return {
        "search_seconds": round(seconds, 2), "latents_per_second": round(LATENTS / seconds), "search_added_mib": round((peak - before) / 1024),
        "process_peak_mib": round(peak / 1024), "all_distances_would_take_mib": LATENTS * len(table) * 4 // 2**20, "worst_distance_error": worst,
    }  # fmt: skip


def train(arguments: argparse.Namespace) -> dict[str, float]:
    """Train for a while and count which entries the last epoch used."""
    from eff_quant_vqgan_lc import claims

    table = torch.load(arguments.table, weights_only=True)
    data = claims.photos()
    started = time.monotonic()
    _, found = claims.trained(
        data,
        table,
        {**claims.SETTINGS[arguments.setting], "batch": BATCH},
        arguments.steps,
        0,
        {"stem": 4, "multipliers": (1,)},
    )
    name, area = arguments.setting, (64 // 4) ** 2
    even = {split: 100 * (1 - math.exp(-len(data.split(split)) * area / len(table))) for split in ("train", "test")}
    return {
        f"{name}_train_use_%": round(found["train_use"], 2), f"{name}_test_use_%": round(found["test_use"], 2),
        f"{name}_psnr_db": round(found["psnr"], 2), f"{name}_minutes": round((time.monotonic() - started) / 60, 1),
        f"{name}_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "even_train_use_%": round(even["train"], 1), "even_test_use_%": round(even["test"], 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
