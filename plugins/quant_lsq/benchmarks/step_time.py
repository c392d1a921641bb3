"""Time of one training step with LSQ at 4 bits over the float step, and over torch's own learnable op.

    python plugins/quant_lsq/benchmarks/step_time.py [--json]

CIFAR ResNet-20, batch 64, random data, interleaved steps, medians. torch's op sits in the same
wrapper; its gradients differ within half a step of the clip borders, so it is a speed peer only.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import torch
from torch import Tensor, nn

from eff.data import Data
from eff.run import Run
from eff.schemas import CORE_TRAINING, DataSpec, ModelSpec, TaskSpec
from eff.session import Plugins
from eff.tasks import Classification, ClassificationOptions
from eff_quant_kit.quantizer import Quantizer
from eff_quant_lsq.config import LSQConfig
from eff_quant_lsq.plugin import LSQ

STEPS = 15


class RandomSplit:
    """CIFAR-shaped noise."""

    def __init__(self, samples: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(samples, 3, 32, 32, generator=generator)
        self.labels = torch.randint(10, (samples,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices, generator=None):  # noqa: ANN001, ANN201
        chosen = torch.as_tensor(list(indices))
        return {"image": self.images[chosen], "label": self.labels[chosen]}

    def fingerprint(self) -> str:
        return "random"


def torch_learnable(self: Quantizer, x: Tensor) -> Tensor:
    """What `Quantizer.forward` would be with torch's op (per tensor, no offset)."""
    zero = torch.zeros(1, device=x.device)
    return torch._fake_quantize_learnable_per_tensor_affine(
        x, self.scale.view(1), zero, self.q_min, self.q_max, self.grad_scale
    )


def main() -> None:
    """Build the three models, time them in turn, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    split = RandomSplit(256)
    options = ClassificationOptions(input_shape=(3, 32, 32), classes=tuple(str(index) for index in range(10)))
    task = Classification(options)
    data = Data(DataSpec(scheme="random"), TaskSpec(name="classification"), split, None)
    run = Run(task, torch.device("cpu"), data=data, train=CORE_TRAINING)
    spec = ModelSpec(source="zoo:cifar_resnet20")
    plain = Plugins().hook.build_model(spec=spec, run=run)
    ours = LSQ(LSQConfig()).transform(model=copy.deepcopy(plain), run=run)
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        if isinstance(module, Quantizer):
            module.forward = torch_learnable.__get__(module)  # type: ignore[method-assign]
    models = {"float": plain, "lsq": ours, "torch_learnable": theirs}
    medians = {
        name: 1000 * statistics.median(times) for name, times in time_steps(models, run, arguments.batch_size).items()
    }
    result = {
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "median_ms": {name: round(value, 1) for name, value in medians.items()},
        "lsq_over_float": round(medians["lsq"] / medians["float"], 2),
        "lsq_over_torch_learnable": round(medians["lsq"] / medians["torch_learnable"], 2),
    }
    print(json.dumps(result) if arguments.json else "\n".join(f"{key}: {value}" for key, value in result.items()))


def time_steps(models: dict[str, nn.Module], run: Run, batch_size: int) -> dict[str, list[float]]:
    """Return the seconds of each training step, models taking turns."""
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.001) for name, model in models.items()}
    batch = run.split("train").batch(range(batch_size))
    times: dict[str, list[float]] = {name: [] for name in models}
    for index in range(STEPS + 3):
        for name, model in models.items():
            model.train()
            start = time.perf_counter()
            optimizers[name].zero_grad(set_to_none=True)
            run.task.loss(run.forward(model, batch), batch).backward()
            optimizers[name].step()
            if index >= 3:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
