"""Robust accuracy of a trained CIFAR-10 network under single attacks at equal budgets, and under the ensembles.

    python plugins/adv_pma/benchmarks/cifar.py [--images 500] [--ensembles]

Needs ../shared/models/resnet20-12fca82f.th and ../shared/data/cifar10/test.parquet.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from eff.log import TerminalLog
from eff.models import ModelRequest, open_model
from eff.run import Run
from eff.session import Plugins
from eff_adv_kit.apgd import APGD
from eff_adv_kit.checks import Subset
from eff_adv_kit.classifier import attacked
from eff_adv_kit.hunt import Attack
from eff_adv_kit.pgd import PGD
from eff_adv_kit.runner import Plan, run_sequence
from eff_adv_kit.threat import Threat
from eff_adv_pma.attack import MarginAttack
from eff_adv_pma.config import PMAConfig
from eff_adv_pma.sequence import make_sequence

SHARED = Path(__file__).parents[3] / ".." / "shared"
EPS = {"0.25/255": 0.25 / 255, "0.5/255": 0.5 / 255, "1/255": 1 / 255, "8/255": 8 / 255}
ROWS: dict[str, Attack] = {
    "PGD-CE, 20 steps": PGD("ce", 20),
    "PGD margin, 20 steps": PGD("margin", 20),
    "PMA, 2 x 10 steps": MarginAttack("pm", 10),
    "PGD-CE, 100 steps": PGD("ce", 100),
    "PGD margin, 100 steps": PGD("margin", 100),
    "PGD PM, 100 steps": PGD("pm", 100),
    "APGD-CE, 100 steps": APGD("ce", 100),
    "MD, 2 x 50 steps": MarginAttack("margin", 50, name="md"),
    "PMA, 2 x 50 steps": MarginAttack("pm", 50),
    "PGD margin, 200 steps": PGD("margin", 200),
    "PMA, 2 x 100 steps (the default)": MarginAttack("pm", 100),
}


def main() -> None:
    """Print one row per attack: robust accuracy by eps, gradients per image, seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--ensembles", action="store_true", help="PMA+ and the AA-style sequence instead")
    arguments = parser.parse_args()
    log = TerminalLog()
    opened = open_model(
        ModelRequest(
            str(SHARED / "models" / "resnet20-12fca82f.th"), "zoo:cifar_resnet20",
            str(SHARED / "data" / "cifar10" / "test.parquet"),
        ),
        Plugins(), log,
    )  # fmt: skip
    run = Run(opened.task, torch.device("cpu"), data=opened.data, log=log)
    split = Subset(run.split("test"), range(arguments.images))
    rows: dict[str, list[Attack]] = {name: [attack] for name, attack in ROWS.items()}
    if arguments.ensembles:
        presets = {name: PMAConfig(preset=name, queries=1000) for name in ("pma", "pma_plus", "aa_style")}
        rows = {name: make_sequence(config, 10) for name, config in presets.items()}
    print(f"| attack | {' | '.join(EPS)} | gradients per image | s |")
    print(f"| --- |{' --- |' * (len(EPS) + 2)}")
    for name, attacks in rows.items():
        started, gradients, cells = time.monotonic(), 0, []
        for eps in EPS.values():
            with attacked(opened.model, run) as classifier:
                outcome = run_sequence(classifier, split, Plan(Threat("linf", eps), attacks), run.device, log)
                gradients += classifier.gradients
            cells.append(f"{outcome.last.robust_accuracy:.1f}")
        seconds = time.monotonic() - started
        print(f"| {name} | {' | '.join(cells)} | {gradients / arguments.images:.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
