"""One communication round: draw clients, send, train, receive, aggregate. The same for all methods and backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from eff.errors import RequestError, RunError
from eff.run import Run, Step, StepResult
from eff.schemas import Metric
from eff.seeding import named_generator, seed_everything
from eff.training import learning_rate_factor
from eff_fl_kit.flat import (
    FlatModel,
    flat_statistics,
    flat_weights,
    flattened,
    load_flat_statistics,
    load_flat_weights,
    normalisation_layers,
)
from eff_fl_kit.partitions import divide
from eff_fl_kit.protocol import STATISTICS, Client, Server, State, Update, bytes_of, is_finite
from eff_fl_kit.sampling import draw_clients

if TYPE_CHECKING:
    from eff.run import Loss
    from eff_fl_kit.config import FederatedConfig
    from eff_fl_kit.method import FederatedMethod


_PATIENCE = 3


class Backend(Protocol):
    """Where the clients are. `InProcess` is here, Flower's in `eff_fl_kit.flower`."""

    def reachable(self) -> Tensor:
        """Return (n_clients,) bool: which clients can be asked now."""
        ...

    def train(self, clients: list[int], step: Step, lr: float, message: State) -> list[Update]:
        """Return what came back from `clients`, in any order; who did not answer is missing."""
        ...


make_backend: Callable[[FederatedMethod[Any], Run, list[Tensor]], Backend] | None = None
"""Set where a run is to use another backend than this process; `eff_fl_kit.flower.server` does so."""


def check_request(config: FederatedConfig, run: Run) -> None:
    """Refuse what a federated run cannot do, before anything is written.

    Raises:
        RequestError, DataError: one line with the way out.
    """
    train = run.train
    if train.optimizer != "sgd" or train.momentum:
        raise RequestError(
            "federated clients take plain SGD steps without momentum; leave out --optimizer, and name the federated "
            "method last so that its recipe counts"
        )
    if (train.accumulate or 1) > 1:
        raise RequestError("federated clients do not accumulate gradients; leave out --accumulate and use --batch-size")
    if run.precision == "fp16":
        raise RequestError("federated training has no loss scaling, which fp16 needs; use --precision bf16 or fp32")
    if train.epochs:
        divide(run.split("train"), config, run.seed)


def local_rate(run: Run, config: FederatedConfig, index: int) -> float:
    """Return the learning rate of the local steps in round `index`."""
    base: float = run.train.lr or 0.0
    return base * config.lr_decay**index * learning_rate_factor(index, run.train.epochs or 1, run.train)


def train_client(
    index: int, round: int, flat: FlatModel, hook: Any, received: State, state: State, samples: Tensor, lr: float,
    config: FederatedConfig, run: Run, loss: Loss, backward: Callable[[Tensor], None],
) -> tuple[Update, State] | None:  # fmt: skip
    """Train one client and return its update and its new memory.

    None where something it would send or remember is not finite: such a client drops out of the round
    and its memory stays as it was.
    """
    flat.weights.copy_(received["weights"])
    if STATISTICS in received:
        load_flat_statistics(flat.module, received[STATISTICS])
    place = f"fl/{round}/{index}"
    seed_everything(run.seed, place)
    client = Client(
        index, round, flat, received, dict(state), samples, lr, config, run, loss, backward,
        named_generator(run.seed, f"{place}/order"),
    )  # fmt: skip
    update: Update = hook.fl_client_update(client=client)
    statistics = flat_statistics(flat.module)
    if statistics is not None:
        update.sent[STATISTICS] = statistics
    if not (math.isfinite(update.loss) and is_finite(update.sent) and is_finite(client.state)):
        return None
    return update, client.state


class InProcess:
    """All clients in this process, one after the other, on the run's device and in the server's own module."""

    def __init__(self, method: FederatedMethod[Any], parts: list[Tensor]):
        self.method = method
        self.parts = parts

    def reachable(self) -> Tensor:
        """Return that everybody can be asked."""
        return torch.ones(len(self.parts), dtype=torch.bool)

    def train(self, clients: list[int], step: Step, lr: float, message: State) -> list[Update]:
        """Train the clients one by one; the module is left with the last one's weights."""
        updates = []
        states = self.method.client_states
        with flattened(step.module) as flat:
            for index in clients:
                done = train_client(
                    index, step.index, flat, step.run.hook, message, states.get(index, {}), self.parts[index], lr,
                    self.method.config, step.run, step.loss, step.backward,
                )  # fmt: skip
                if done is not None:
                    update, states[index] = done
                    updates.append(update)
        return updates


class Federation:
    """The server of one run: the division of the data, the backend, and the rounds."""

    def __init__(self, method: FederatedMethod[Any], run: Run):
        self.method = method
        self.parts = divide(run.split("train"), method.config, run.seed)
        method.elsewhere = make_backend is not None
        self.silent = 0
        """Rounds in a row that brought nothing."""
        self.has_data = torch.tensor([len(part) > 0 for part in self.parts])
        self.backend: Backend = (make_backend or _in_process)(method, run, self.parts)
        if empty := int((~self.has_data).sum()):
            run.warn(
                f"{empty} of {len(self.parts)} clients have no data and are never drawn; a larger dirichlet evens out"
            )

    def run_round(self, step: Step) -> StepResult:
        """Do round `step.index` and leave the new weights in the model.

        Raises:
            RunError: no client can be reached, or none of the round sent anything finite.
        """
        run, method, config = step.run, self.method, self.method.config
        if step.index == 0 and normalisation_layers(step.module):
            run.warn("the model has batch normalisation: clients train on their own statistics and the server averages "
                     "them by samples; group normalisation suits unlike clients better")  # fmt: skip
        lr = local_rate(run, config, step.index)
        server = Server(step.index, flat_weights(step.module), method.server_state, config.n_clients, lr)
        message: State = dict(run.hook.fl_broadcast(server=server))
        statistics = flat_statistics(step.module)
        if statistics is not None:
            message[STATISTICS] = statistics
        able = self.has_data & self.backend.reachable()
        if not bool(able.any()):
            raise RunError("no client can be reached; see that the clients run and are connected, then --resume")
        drawn = draw_clients(
            able, config.active_ratio, config.sampling == "fixed", named_generator(run.seed, f"fl/draw/{step.index}")
        )
        updates = sorted(self.backend.train(drawn, step, lr, message), key=lambda update: update.index)
        updates = [update for update in updates if is_finite(update.sent)]
        self.silent = 0 if updates else self.silent + 1
        if self.silent == _PATIENCE:
            raise RunError(
                "three rounds in a row brought nothing usable from any client; where the loss is not finite try a "
                "smaller --lr, on Flower see the nodes' logs"
            )
        if updates:
            run.hook.fl_aggregate(server=server, updates=updates)
        if updates and statistics is not None:
            statistics = server.mean(updates, STATISTICS, by_samples=True)
        load_flat_weights(step.module, server.weights)
        if statistics is not None:
            load_flat_statistics(step.module, statistics)
        return self._record(step, server, message, drawn, updates)

    def _record(
        self, step: Step, server: Server, message: State, drawn: list[int], updates: list[Update]
    ) -> StepResult:
        down, up = len(drawn) * bytes_of(message), sum(bytes_of(update.sent) for update in updates)
        if len(updates) < len(drawn):
            missing = sorted(set(drawn) - {update.index for update in updates})
            step.run.warn(f"round {step.index + 1}: nothing usable from client {', '.join(map(str, missing))}")
        steps = sum(update.steps for update in updates)
        # Mean over the local steps; a round without an answer has none of its own.
        last = self.method.history[-1]["loss"] if self.method.history else 0.0
        loss = sum(update.loss * update.steps for update in updates) / steps if steps else last
        row: dict[str, Any] = {
            "round": step.index + 1, "drawn": len(drawn), "answered": len(updates), "loss": loss,
            "spread": _spread(server, updates), "up": up, "down": down, "steps": steps,
            "gradients": sum(update.gradients for update in updates),
        }  # fmt: skip
        every = self.method.config.eval_every
        if every and (step.index + 1) % every == 0 and step.run.data is not None and step.run.data.test is not None:
            from eff.measure import task_metrics

            name = step.run.task.headline
            row[name] = task_metrics(step.module, step.run.data, step.run).values[name].value
        self.method.history.append(row)
        metrics = {"clients": Metric(value=len(updates)), "MB": Metric(value=(up + down) / 1e6)}
        return StepResult(torch.tensor(loss), metrics)


def _in_process(method: FederatedMethod[Any], run: Run, parts: list[Tensor]) -> Backend:
    return InProcess(method, parts)


def _spread(server: Server, updates: list[Update]) -> float:
    """Return the mean squared distance of what clients sent to its mean: client divergence."""
    if not updates:
        return 0.0
    mean = server.mean(updates)
    return sum(float((update.sent["weights"] - mean).square().sum()) for update in updates) / len(updates)
