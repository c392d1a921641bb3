"""Robust accuracy of CIFAR-10's ResNet-20 under attacks with equal gradients.

    python plugins/adv_pma/benchmarks/cifar.py SHARED [--images 500] [--json]

SHARED is the folder with `data/cifar10` and `models/resnet20-*.th`. The network was trained plainly: at 8/255 nothing
is left of it, so smaller balls are shown too. 20 gradients for each attack; PMA has 2 x 10.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from eff.log import Log, TerminalLog
from eff.models import ModelRequest, open_model
from eff.run import Run
from eff.session import Plugins
from eff_adv_kit.apgd import APGD
from eff_adv_kit.classifier import attacked
from eff_adv_kit.hunt import Attack
from eff_adv_kit.obfuscation import Part
from eff_adv_kit.pgd import PGD
from eff_adv_kit.runner import Plan, run_sequence
from eff_adv_kit.threat import Threat
from eff_adv_pma.attack import PMA

EPSILONS = (0.25, 0.5, 1.0, 8.0)  # of 255


def main() -> None:
    """Attack and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--gradients", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    (weights,) = (arguments.shared / "models").glob("resnet20-*.th")
    data = f"parquet:{arguments.shared / 'data' / 'cifar10'}?train=10&seed=0"
    opened = open_model(ModelRequest(str(weights), "zoo:cifar_resnet20", data), Plugins(), TerminalLog())
    assert opened.data is not None
    run = Run(opened.task, torch.device("cpu"), data=opened.data)
    split = Part(opened.data.split("test"), range(arguments.images))
    count = arguments.gradients
    attacks: list[Attack] = [
        PGD("ce", count), PGD("margin", count), APGD("ce", count), PMA("margin", count // 2), PMA("pm", count // 2),
    ]  # fmt: skip
    rows = []
    for eps in EPSILONS:
        row: dict[str, float] = {"eps_255": eps}
        for attack in attacks:
            with attacked(opened.model, run) as classifier:
                plan = Plan(Threat("linf", eps / 255), [attack], 250)
                outcome = run_sequence(classifier, split, plan, run.device, Log())
            row["clean"] = outcome.clean.robust_accuracy
            row[attack.name] = outcome.last.robust_accuracy
        rows.append(row)
        print(
            json.dumps(row) if arguments.json else "  ".join(f"{key} {value:.2f}" for key, value in row.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
