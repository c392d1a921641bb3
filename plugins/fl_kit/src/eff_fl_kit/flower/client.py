"""A SuperNode's side: a ClientApp that trains the clients it hosts.

Flower starts it anew for each message; what lives longer (the model without its weights of the round,
the clients' memories) is in `Context.state`, which stays on the node.

Node configuration: `partition-id`, `num-partitions`, and optionally `data`, the node's own data source,
of which each of its clients then takes everything; without it the node loads the run's data and its
clients take their parts of the run's division.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from eff.checkpoint import ModelFile
from eff.data import Batch, load_data
from eff.models import build_model, make_task, restore
from eff.run import Run, Step, StepResult
from eff.schemas import CheckpointHeader, Recipe
from eff.session import Chosen, Plugins, choose, choose_applied
from eff_fl_kit.flat import flattened
from eff_fl_kit.flower.records import from_record, to_record
from eff_fl_kit.method import FederatedMethod
from eff_fl_kit.partitions import divide
from eff_fl_kit.protocol import State, Update
from eff_fl_kit.rounds import train_client

_SERVER = Path("the server's model")

app = ClientApp()


@app.query()
def greet(message: Message, context: Context) -> Message:
    """Tell which partition this node holds.

    Raises:
        ValueError: the node's configuration does not say.
    """
    names = ("partition-id", "num-partitions")
    if any(name not in context.node_config for name in names):
        raise ValueError("start the SuperNode with --node-config 'partition-id=0 num-partitions=3' (its own numbers)")
    node = {name: int(context.node_config[name]) for name in names}
    return Message(RecordDict({"node": ConfigRecord(node)}), reply_to=message)  # type: ignore[arg-type]


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the clients that the job names, one by one, and return their updates."""
    content, state = message.content, context.state
    for name in ("header", "model"):
        if name in content:
            state[name] = content[name]
    job = content.config_records["job"]
    recipe = Recipe.model_validate_json(str(job["recipe"]))
    header = CheckpointHeader.model_validate_json(str(state.config_records["header"]["json"]))
    own_data = context.node_config.get("data")
    node = Node(recipe, header, from_record(state.array_records["model"], torch.device("cpu")), own_data)
    states = {int(name.removeprefix("client/")): name for name in state if name.startswith("client/")}
    work = NodeWork(
        node.federated, list(job["clients"]), float(job["lr"]), from_record(content.array_records["message"], node.run.device),  # type: ignore[arg-type]
        {index: from_record(state.array_records[name], torch.device("cpu")) for index, name in states.items()},
        node.parts,
    )  # fmt: skip
    node.run_step(work, int(job["round"]))  # type: ignore[arg-type]
    for index, memory in work.states.items():
        if memory:
            state[f"client/{index}"] = to_record(memory)
    return Message(_reply(work.updates), reply_to=message)


def _reply(updates: list[Update]) -> RecordDict:
    columns = {
        "client": [update.index for update in updates],
        "samples": [update.samples for update in updates],
        "steps": [update.steps for update in updates],
        "gradients": [update.gradients for update in updates],
        "loss": [update.loss for update in updates],
    }
    records: dict[str, Any] = {f"sent/{update.index}": to_record(update.sent) for update in updates}
    return RecordDict({"updates": ConfigRecord(columns), **records})  # type: ignore[arg-type]


class Node:
    """The run as one node sees it: the rebuilt model, the data, and the plugins."""

    def __init__(self, recipe: Recipe, header: CheckpointHeader, state: State, own_data: object):
        chosen = choose(recipe.methods)
        self.plugins = Plugins(chosen)
        methods = [item.method for item in chosen if isinstance(item.method, FederatedMethod)]
        if len(methods) != 1:
            raise ValueError("the recipe must name one federated method")
        self.federated: FederatedMethod[Any] = methods[0]
        device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
        task = make_task(header.task, self.plugins)
        data = load_data(str(own_data or recipe.data), header.task, self.plugins.added("data_sources"))
        self.run = Run(
            task, device, recipe.seed, data, header.model, recipe.train, recipe.precision, hook=self.plugins.hook,
            restoring=True, training=True,
        )  # fmt: skip
        file = ModelFile(_SERVER, header, state)
        applied = [_instance(item, chosen) for item in choose_applied(header.methods)]
        model = build_model(header.model, self.run, self.plugins).to(device)
        self.model = restore(model, applied, self.run, file, header.model, self.plugins)
        self.run.restoring = False
        config = self.federated.config
        split = self.run.split("train")
        self.parts = [torch.arange(len(split))] * config.n_clients if own_data else divide(split, config, recipe.seed)

    def run_step(self, work: NodeWork, index: int) -> None:
        """Train through the `train_step` hook, so that other methods' wrappers act as they do in process."""
        self.federated.federation = work  # type: ignore[assignment]
        self.model.train()
        step = Step(
            model=self.model, module=self.model, batch={}, optimizer=None, run=self.run, index=index, epoch=index,
            loss=self._loss, backward=torch.Tensor.backward,
        )  # fmt: skip
        self.plugins.hook.train_step(step=step)

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        output = self.run.forward(model, batch)
        return self.run.task.loss(output, batch), output


def _instance(applied: Chosen, chosen: list[Chosen]) -> Chosen:
    """Return the chosen instance of an applied method, with its structure, where there is one."""
    for item in chosen:
        if item.name == applied.name:
            item.method.structure = applied.method.structure
            return item
    return applied


class NodeWork:
    """Stands in for the federation on a node: one round's work for the clients it hosts."""

    def __init__(
        self, method: FederatedMethod[Any], clients: list[int], lr: float, message: State, states: dict[int, State],
        parts: list[Tensor],
    ):  # fmt: skip
        self.method, self.clients, self.lr, self.message = method, clients, lr, message
        self.states, self.parts = states, parts
        self.updates: list[Update] = []

    def run_round(self, step: Step) -> StepResult:
        """Train the clients; what is not finite is left out and forgotten."""
        with flattened(step.module) as flat:
            for index in self.clients:
                done = train_client(
                    index, step.index, flat, step.run.hook, self.message, self.states.get(index, {}), self.parts[index],
                    self.lr, self.method.config, step.run, step.loss, step.backward,
                )  # fmt: skip
                if done is not None:
                    update, self.states[index] = done
                    self.updates.append(update)
        return StepResult(torch.tensor(0.0))
