"""One DEConv in its three forms, and the whole network before and after folding: milliseconds a pass.

    python plugins/restore_deanet/benchmarks/fold_time.py [--json] [--device cuda] [--seconds 2]

The forms take turns, so that a change of the machine's speed meets all of them; medians. "parallel" are the
five convolutions that DEConv stands for, "training" builds their sum and runs one, "folded" is that one.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable

import torch

from eff.measure import time_calls
from eff_restore_deanet.building import make_deanet
from eff_restore_deanet.deconv import DEConv
from eff_restore_deanet.insert import folded_copy

SHAPES = ((32, 256), (64, 128), (128, 64))  # channels and side of DEA-Net's levels for a 256 x 256 image
ROUNDS = 5


def medians(calls: dict[str, Callable[[], object]], device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median time of each call in ms, over rounds that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name].append(time_calls(call, device, seconds / ROUNDS).median)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    rows = []
    with torch.inference_mode():
        for channels, side in SHAPES:
            layer = DEConv(channels).to(device)
            conv = layer.folded()
            x = torch.rand(1, channels, side, side, device=device)
            forms = {"parallel": layer.parallel, "training": layer, "folded": conv}
            calls = {name: functools.partial(form, x) for name, form in forms.items()}
            error = float((layer.parallel(x) - conv(x)).abs().max())
            found = medians(calls, device, arguments.seconds)
            rows.append({"what": f"DEConv {channels} x {side} x {side}", **found, "difference": error})
        network = make_deanet("base").to(device).eval()
        folded = folded_copy(network)
        image = torch.rand(1, 3, 256, 256, device=device)
        calls = {"training": functools.partial(network, image), "folded": functools.partial(folded, image)}
        found = medians(calls, device, arguments.seconds)
        error = float((network(image) - folded(image)).abs().max())
        rows.append({"what": "deanet:base 256 x 256", **found, "difference": error})
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'ms':26}{'parallel':>10}{'training':>10}{'folded':>10}{'ratio':>8}  largest difference")
    for row in rows:
        slowest = row.get("parallel", row["training"])
        parallel = f"{row['parallel']:.2f}" if "parallel" in row else ""
        print(
            f"{row['what']:26}{parallel:>10}{row['training']:>10.2f}{row['folded']:>10.2f}"
            f"{slowest / row['folded']:>7.1f}x  {row['difference']:.1e}"
        )


if __name__ == "__main__":
    main()
