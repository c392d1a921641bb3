"""Time of one optimizer step: AdamP over AdamW, SGDP over SGD (foreach and fused), over a plain loop and the reference.

    python plugins/train_adamp/benchmarks/step_time.py [--model zoo:vit_tiny] [--compile] [--json]

Random gradients, interleaved steps, medians; only `optimizer.step()` is timed. The plain loop takes one tensor after
another and decides on the host. The reference is the package `adamp` (clovaai/AdamP), left out where it is not
installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eff.models import build_model, make_task, parse_source
from eff.run import Run
from eff.schemas import TaskSpec
from eff.session import Plugins
from eff_train_adamp.optimizers import SGDP, AdamP

Maker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_ADAM = {"lr": 1e-3, "weight_decay": 1e-2}
_SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


class Loop(torch.optim.Optimizer):
    """What the equations say, tensor by tensor."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__(params, {})
        self.count = 0
        self.first = [torch.zeros_like(parameter) for parameter in params]
        self.second = [torch.zeros_like(parameter) for parameter in params]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do one step."""
        self.count += 1
        for parameter, first, second in zip(self.param_groups[0]["params"], self.first, self.second, strict=True):
            update, rate, decay = self.update(parameter.grad, first, second)
            ratio = 1.0
            for rows in (len(parameter), 1) if parameter.ndim > 1 else ():
                w, g = parameter.reshape(rows, -1), parameter.grad.reshape(rows, -1)
                if torch.cosine_similarity(g, w).abs().max() < 0.1 / w.shape[1] ** 0.5:
                    n = w / (w.norm(dim=1, keepdim=True) + 1e-8)
                    flat = update.view(rows, -1)
                    flat -= n * (n * flat).sum(1, keepdim=True)
                    ratio = 0.1
                    break
            parameter.mul_(1 - decay * ratio).sub_(update, alpha=rate)

    def update(self, g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, float, float]:
        """Return the update, the step size and the decay."""
        raise NotImplementedError


class LoopAdamP(Loop):
    """AdamP."""

    def update(self, g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, float, float]:
        """Return the update, the step size and the decay."""
        lr, decay, (b1, b2) = _ADAM["lr"], _ADAM["weight_decay"], (0.9, 0.999)
        first.mul_(b1).add_(g, alpha=1 - b1)
        second.mul_(b2).addcmul_(g, g, value=1 - b2)
        denominator = second.sqrt().div_((1 - b2**self.count) ** 0.5).add_(1e-8)
        return first / denominator, lr / (1 - b1**self.count), lr * decay


class LoopSGDP(Loop):
    """SGDP."""

    def update(self, g: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, float, float]:
        """Return the update, the step size and the decay."""
        lr, decay, momentum = _SGD["lr"], _SGD["weight_decay"], _SGD["momentum"]
        return first.mul_(momentum).add_(g), lr, lr * decay / (1 - momentum)


def makers() -> dict[str, Maker]:
    """Return the optimizers to time."""
    made: dict[str, Maker] = {
        "adamp": lambda p: AdamP(p, **_ADAM),
        "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True, **_ADAM),
        "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True, **_ADAM),
        "sgdp": lambda p: SGDP(p, **_SGD),
        "sgd_foreach": lambda p: torch.optim.SGD(p, foreach=True, **_SGD),
        "sgd_fused": lambda p: torch.optim.SGD(p, fused=True, **_SGD),
        "adamp_loop": LoopAdamP,
        "sgdp_loop": LoopSGDP,
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
    peers = ("adamw", "adamp_loop", "adamp_ref") if left.startswith("adam") else ("sgd_", "sgdp_loop", "sgdp_ref")
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
