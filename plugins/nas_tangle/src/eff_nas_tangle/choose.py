"""The end of a search: choose the network, and ask how much the supernet's ranking can be trusted."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.log import Log
from eff.measure import task_metrics
from eff.modes import eval_mode
from eff.run import Run
from eff.schemas import TrainOptions
from eff.seeding import seed_everything
from eff.session import Plugins
from eff.training import Training
from eff_nas_kit.quality import kendall_tau, linear_cka, saved_bytes
from eff_nas_kit.samplers import random_network
from eff_nas_kit.space import Chosen
from eff_nas_kit.supernet import recalibrate, reset_weights, subnet
from eff_nas_tangle.search import Search

if TYPE_CHECKING:
    from pydantic import JsonValue

CALIBRATION_SAMPLES = 2048
CKA_SAMPLES = 256


def choose(search: Search, supernet: nn.Module, run: Run) -> Chosen:
    """Return the network with the largest alphas; for SPOS the most accurate of random ones on validation data."""
    if search.architecture.learns:
        return search.architecture.argmax()
    generator = run.generator("nas_tangle/random_search")
    networks = [random_network(search.selection.space, generator) for _ in range(search.config.search_samples)]
    scores = [search.score(supernet, run, chosen) for chosen in run.log.track(networks, "random search")]
    return networks[max(range(len(scores)), key=scores.__getitem__)]


def make_fresh(model: nn.Module, run: Run) -> nn.Module:
    """Give the chosen network new weights, seeded."""
    seed_everything(run.seed, "nas_tangle/fresh")
    return reset_weights(model)


def calibrate(model: nn.Module, run: Run) -> None:
    """Measure the batch norms' statistics of the chosen network on training data."""
    recalibrate(model, run.batches("train", CALIBRATION_SAMPLES), lambda module, batch: run.forward(module, batch))  # type: ignore[arg-type]


def summary(search: Search, supernet: nn.Module, run: Run, chosen: Chosen) -> dict[str, JsonValue]:
    """Return what the report says of the search: entropy, memory of a step, history, and the ranking if asked for."""
    architecture = search.architecture
    found: dict[str, Any] = {
        "entropy": architecture.entropy(),
        "valid_score": search.score(supernet, run, chosen),
        "coefficients": {name: [round(float(a), 4) for a in mean] for name, mean in architecture.mean().items()},
        "step_bytes": step_bytes(search, supernet, run),
        "history": search.history,
    }
    if search.config.rank_samples > 1:
        found["ranking"] = ranking(search, supernet, run)
    return found


def step_bytes(search: Search, supernet: nn.Module, run: Run) -> int:
    """Return the bytes that one forward pass of the search keeps for its backward pass."""
    batch = next(run.batches("train", run.train.batch_size, run.train.batch_size))
    search.selection.use(search.architecture.sample(search.config.tau_min), search.architecture.single_path)
    with eval_mode(supernet):
        return saved_bytes(lambda: run.task.loss(run.forward(supernet, batch), batch))


def ranking(search: Search, supernet: nn.Module, run: Run) -> dict[str, JsonValue]:
    """Compare inherited with stand-alone scores of random networks.

    Returns:
        Kendall's tau between the two, and the mean alignment (CKA) of the networks' outputs.
    """
    generator = run.generator("nas_tangle/ranking")
    batch = next(run.batches("test", CKA_SAMPLES, CKA_SAMPLES))
    inherited, alone, alignment = [], [], []
    names = range(search.config.rank_samples)
    for index in run.log.track(names, "train random networks"):
        chosen = random_network(search.selection.space, generator)
        inherited.append(search.score(supernet, run, chosen))
        network = subnet(supernet, search.selection, chosen)
        calibrate(network, run)
        outputs = [_outputs(network, run, batch)]
        seed_everything(run.seed, f"nas_tangle/ranking/{index}")
        alone.append(train_alone(reset_weights(network), run, search.config.rank_epochs))
        outputs.append(_outputs(network, run, batch))
        alignment.append(linear_cka(*outputs))
    return {"kendall_tau": kendall_tau(inherited, alone), "cka": sum(alignment) / len(alignment)}


def train_alone(network: nn.Module, run: Run, epochs: int) -> float:
    """Train a network as the search trains its weights and return its headline metric on the test split."""
    options = run.train.model_copy(update={"epochs": epochs, "checkpoint_every": None})
    own = dataclasses.replace(run, train=TrainOptions().over(options), folder=None, log=Log(), keeps_files=False)
    Training(network, own, Plugins((), extensions=())).run_all()
    return task_metrics(network, own.data, own).values[run.task.headline].value  # type: ignore[arg-type]


@torch.no_grad()
def _outputs(network: nn.Module, run: Run, batch: dict[str, Any]) -> Tensor:
    model = copy.deepcopy(network).eval()
    return run.forward(model, batch).flatten(1).cpu()
