"""Time of one optimizer step: AdamP over AdamW, SGDP over SGD (foreach and fused), and over the reference code.

    python plugins/train_adamp/benchmarks/step_time.py [--model zoo:vit_tiny] [--compile] [--json]

Random gradients, interleaved steps, medians; only `optimizer.step()` is timed. The reference is the package
`adamp` (clovaai/AdamP), left out where it is not installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from eff.models import build_model, make_task, parse_source
from eff.run import Run
from eff.schemas import TaskSpec
from eff.session import Plugins
from eff_train_adamp.optimizers import SGDP, AdamP

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_ADAM = {"lr": 1e-3, "weight_decay": 1e-2}
_SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def makers() -> dict[str, Maker]:
    """Return the optimizers to time."""
    made: dict[str, Maker] = {
        "adamp": lambda p: AdamP(p, **_ADAM),
        "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True, **_ADAM),
        "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True, **_ADAM),
        "sgdp": lambda p: SGDP(p, **_SGD),
        "sgd_foreach": lambda p: torch.optim.SGD(p, foreach=True, **_SGD),
        "sgd_fused": lambda p: torch.optim.SGD(p, fused=True, **_SGD),
    }
    try:
        import adamp
    except ImportError:
        return made
    return made | {
        "adamp_reference": lambda p: adamp.AdamP(p, **_ADAM),
        "sgdp_reference": lambda p: adamp.SGDP(p, **_SGD),
    }


def main() -> None:
    """Build one copy of the model per optimizer, time them in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:vit_tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="Time the compiled steps of AdamP and SGDP too.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    plugins = Plugins()
    run = Run(make_task(TaskSpec(name="none"), plugins), torch.device("cpu"))
    model = build_model(parse_source(arguments.model), run, plugins).to(arguments.device)
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers().items():
        optimizer = make(_parameters(model))
        steps[name] = optimizer.step
        if arguments.compile and name in ("adamp", "sgdp"):
            steps[f"{name}_compiled"] = torch.compile(make(_parameters(model)).step)
    medians = time_steps(steps, arguments.steps, torch.device(arguments.device))
    pairs = [(a, b) for a in medians for b in medians if a[:4] in ("adam", "sgdp") and _compares(a, b)]
    result = {
        "model": arguments.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": len(list(model.parameters())),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "ratio": {f"{a} / {b}": round(medians[a] / medians[b], 2) for a, b in pairs},
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def _compares(left: str, right: str) -> bool:
    ours = ("adamp", "adamp_compiled") if left.startswith("adam") else ("sgdp", "sgdp_compiled")
    peers = ("adamw", "adamp_reference") if left.startswith("adam") else ("sgd_", "sgdp_reference")
    return left in ours and right.startswith(peers)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    parameters = list(copy.deepcopy(model).parameters())
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return parameters


def time_steps(steps: dict[str, Callable[[], object]], count: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each step, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(count + 3):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 3:  # the first steps make states, and compile
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
