"""The claims at desk scale: bits in all three products on digits, and the arithmetic itself.

`digits`: an MLP 64-128-64-10 with batch norm, SGD with momentum, 15 epochs of core's recipe; seed and order of the batches
are the same for all widths. `products`: shares of partial sums that leave 32 bits, in %, and errors.
"""

from __future__ import annotations

import torch
from torch import nn

from eff.claims import ClaimRun
from eff.data import Data, load_data
from eff.measure import task_metrics
from eff.models import make_task
from eff.run import Run
from eff.schemas import CORE_TRAINING
from eff.seeding import seed_everything
from eff.session import Chosen, Plugins
from eff.training import Training
from eff_quant_dfp.config import DFPConfig
from eff_quant_dfp.fixed import Fixed, quantize
from eff_quant_dfp.plugin import DFPTraining
from eff_quant_dfp.product import product

WIDTHS = (16, 12, 8, 6, 4)
EPOCHS = 15


def make_model() -> nn.Sequential:
    """Return the MLP."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in ((64, 128), (128, 64)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def digits(run: ClaimRun) -> dict[str, list[float]]:
    """Return the accuracy of each width for each seed."""
    measured: dict[str, list[float]] = {"float32": [], **{f"p{bits}": [] for bits in WIDTHS}}
    for seed in run.log.track(run.seeds, "digits"):
        data = load_data(f"digits?seed={seed}")
        measured["float32"].append(train(data, seed, None))
        for bits in WIDTHS:
            measured[f"p{bits}"].append(train(data, seed, DFPTraining(DFPConfig(bits=bits))))
    return measured


def train(data: Data, seed: int, method: DFPTraining | None) -> float:
    """Return the test accuracy of an MLP trained with the method, or in float32."""
    plugins = Plugins([Chosen("quant_dfp", "", "eff-quant-dfp", method)] if method else [], extensions=())
    recipe = CORE_TRAINING.model_copy(update={"epochs": EPOCHS, "augment": False})
    run = Run(make_task(data.task, plugins), torch.device("cpu"), seed, data, train=recipe, training=True)
    seed_everything(seed, "model")
    model: nn.Module = make_model()
    if method is not None:
        model = method.transform(model=model, run=run)
    Training(model, run, plugins).run_all()
    return task_metrics(model, data, run).values["accuracy"].value


def products(run: ClaimRun) -> dict[str, list[float]]:
    """Return shares of wrapped partial sums and errors for each seed."""
    found: dict[str, list[float]] = {}
    size, largest = 256, 32767
    for seed in run.seeds:
        generator = torch.Generator().manual_seed(seed)
        full = torch.full((1, size, size), largest, dtype=torch.int16)
        signs = (torch.randint(0, 2, full.shape, generator=generator) * 2 - 1).to(torch.int16)
        uniform = torch.randint(-largest, largest + 1, full.shape, generator=generator).to(torch.int16)
        other = torch.randint(-largest, largest + 1, full.shape, generator=generator).to(torch.int16)
        wrapped = difference = 0.0
        for a, b in ((full, full), (full * signs, full), (uniform, other)):
            _, count = product(Fixed(a, 0), Fixed(b, 0), 2, "wrap")
            safe, _ = product(Fixed(a, 0), Fixed(b, 0), 2, "guaranteed")
            exact = _in_chains(a, b, 2)
            wrapped = max(wrapped, 100 * count / (size * size * size // 2))
            difference = max(difference, float((safe - exact).abs().max()))
        sums = size * size * size // 4
        _, full_count = product(Fixed(full, 0), Fixed(full, 0), 4, "wrap")
        random, random_count = product(Fixed(uniform, 0), Fixed(other, 0), 4, "wrap")
        wide = uniform.double() @ other.double()
        x, w = torch.randn(2, 1, size, size, generator=generator)
        y, _ = product(quantize(x), quantize(w), 2)
        reference = x.double() @ w.double()
        values = {
            "guaranteed_wrapped": wrapped,
            "guaranteed_difference": difference,
            "full_scale_chain_4_wrapped": 100 * full_count / sums,
            "random_chain_4_wrapped": 100 * random_count / sums,
            "random_chain_4_error": float(100 * (random - wide).norm() / wide.norm()),
            "gaussian_error": float((y - reference).abs().max() / reference.abs().max()),
        }
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _in_chains(a: torch.Tensor, b: torch.Tensor, chain: int) -> torch.Tensor:
    """Return the product with exact int64 chains whose sums go to float32 in order."""
    out = torch.zeros(a.shape[0], a.shape[1], b.shape[2])
    for start in range(0, a.shape[2], chain):
        out += (a[..., start : start + chain].long() @ b[:, start : start + chain].long()).float()
    return out
