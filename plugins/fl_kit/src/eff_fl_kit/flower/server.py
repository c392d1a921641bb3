"""The server on Flower: a ServerApp that runs a recipe with `eff.runner.apply`, its clients on SuperNodes.

Client i is hosted by the SuperNode whose `partition-id` is i modulo `num-partitions`. A node gets one
message per round for all of its drawn clients, and the whole model (frozen weights included) once. Who
has not answered when the round's time is up is left out of the round, and asked again after a pause that
doubles each time; a node that Flower reports as gone is not asked until it is back.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from eff.errors import EffError, RunError
from eff.exporting import make_header
from eff.log import Log
from eff.run import Run, Step
from eff.runner import apply
from eff.schemas import Recipe
from eff_fl_kit import rounds
from eff_fl_kit.flower.records import from_record, to_record
from eff_fl_kit.method import FederatedMethod
from eff_fl_kit.protocol import State, Update

_POLL = 0.2
_GREETING_TIMEOUT = 60.0


class FlowerBackend:
    """Sends rounds to SuperNodes over a grid.

    Args:
        grid: of the ServerApp.
        recipe: what the run does; its methods and its seed go to the nodes.
        n_clients: clients of the federation.
        round_timeout: seconds after which a round goes on without those who have not answered.
        start_timeout: seconds to wait for all nodes at the start, and for any node later.
    """

    def __init__(
        self, grid: Grid, recipe: Recipe, run: Run, n_clients: int, round_timeout: float, start_timeout: float
    ):
        self.grid = grid
        self.recipe = recipe
        self.run = run
        self.n_clients = n_clients
        self.round_timeout = round_timeout
        self.start_timeout = start_timeout
        self.hosts: dict[int, int] = {}
        """partition-id -> node id."""
        self.partitions: int | None = None
        self.has_model: set[int] = set()
        self.failures: dict[int, int] = {}
        self.paused_until: dict[int, int] = {}
        self.round = 0

    def reachable(self) -> Tensor:
        """Return which clients' nodes are connected and not paused; waits for a node where there is none."""
        deadline = time.monotonic() + self.start_timeout
        first = self.partitions is None
        while True:
            self._greet()
            complete = self.partitions is not None and len(self.hosts) >= self.partitions
            if complete or (self.hosts and not first) or time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        if first and self.hosts and self.partitions is not None and len(self.hosts) < self.partitions:
            self.run.warn(f"started with {len(self.hosts)} of {self.partitions} SuperNodes")
        awake = [part for part, node in self.hosts.items() if self.paused_until.get(node, 0) <= self.round]
        chosen = set(awake or self.hosts)
        return torch.tensor([self._host(index) in chosen for index in range(self.n_clients)])

    def _host(self, index: int) -> int:
        return index % (self.partitions or 1)

    def _greet(self) -> None:
        """Forget the nodes that are gone and ask the new ones which partition they hold."""
        connected = set(self.grid.get_node_ids())
        for part, node in list(self.hosts.items()):
            if node not in connected:
                del self.hosts[part]
                self.run.warn(f"SuperNode {part} is gone; its clients take no part until it is back")
        known = set(self.hosts.values())
        new = {node for node in connected - known if self.paused_until.get(node, 0) <= self.round}
        if not new:
            return
        answered = set()
        for reply in self._ask({node: RecordDict() for node in new}, "query", _GREETING_TIMEOUT):
            told = reply.content.config_records["node"]
            partitions = int(told["num-partitions"])  # type: ignore[arg-type]
            if self.partitions not in (None, partitions):
                raise RunError(
                    f"one SuperNode says num-partitions={self.partitions}, another {partitions}; start all with the same"
                )
            self.partitions = partitions
            self.hosts[int(told["partition-id"])] = reply.metadata.src_node_id  # type: ignore[arg-type]
            answered.add(reply.metadata.src_node_id)
        self._judge(new, answered)

    def _judge(self, asked: Iterable[int], answered: set[int]) -> None:
        """Pause who has not answered, twice as long each time."""
        for node in asked:
            if node in answered:
                self.failures.pop(node, None)
            else:
                self.has_model.discard(node)
                self.failures[node] = self.failures.get(node, 0) + 1
                self.paused_until[node] = self.round + 2 ** min(self.failures[node], 10)

    def train(self, clients: list[int], step: Step, lr: float, message: State) -> list[Update]:
        """Send the round to the clients' nodes and return what is back in time."""
        self.round = step.index + 1
        contents: dict[int, RecordDict] = {}
        for part, node in self.hosts.items():
            if mine := [index for index in clients if self._host(index) == part]:
                contents[node] = self._job(node, mine, step, lr, message)
        updates: list[Update] = []
        answered = set()
        for reply in self._ask(contents, "train", self.round_timeout):
            answered.add(reply.metadata.src_node_id)
            updates += _updates(reply.content, step.run.device)
        self.has_model |= answered
        self._judge(contents, answered)
        return updates

    def _job(self, node: int, clients: list[int], step: Step, lr: float, message: State) -> RecordDict:
        run = step.run
        recipe = self.recipe.model_copy(
            update={"train": run.train, "data": str(run.data.spec) if run.data else None, "model": "server"}
        )
        job = {"round": step.index, "clients": clients, "lr": lr, "recipe": recipe.model_dump_json()}
        content = RecordDict({"job": ConfigRecord(job), "message": to_record(message)})  # type: ignore[arg-type]
        if node not in self.has_model:
            content["header"] = ConfigRecord({"json": make_header(run).model_dump_json()})
            content["model"] = to_record(step.module.state_dict())
        return content

    def _ask(self, contents: dict[int, RecordDict], kind: str, timeout: float) -> list[Message]:
        """Send one message to each node; return the good replies that are back in `timeout` seconds."""
        messages = [Message(content, node, kind, ttl=timeout) for node, content in contents.items()]
        waiting = set(self.grid.push_messages(messages))
        deadline = time.monotonic() + timeout
        good: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self.grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    self.run.warn(
                        f"a SuperNode failed: {(reply.error.reason or str(reply.error.code)).splitlines()[-1]}"
                    )
                else:
                    good.append(reply)
            if waiting:
                time.sleep(_POLL)
        return good


def _updates(content: RecordDict, device: torch.device) -> list[Update]:
    told = content.config_records["updates"]
    columns = zip(*(told[name] for name in ("client", "samples", "steps", "gradients", "loss")), strict=True)
    return [
        Update(int(index), int(samples), int(steps), int(gradients), float(loss), sent)
        for index, samples, steps, gradients, loss in columns
        for sent in [from_record(content.array_records[f"sent/{index}"], device)]
    ]


class NotesLog(Log):
    """Writes warnings and rounds as JSON lines, for whoever watches the run from outside."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    def note(self, **values: Any) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def warn(self, message: str) -> None:
        """Note a warning the first time."""
        if message not in self.warnings:
            self.note(event="warning", message=message)
        super().warn(message)

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Note each training step."""
        done = 0

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            if description == "train" and steps:
                self.note(event="round", done=done, total=total, note=note)

        yield advance


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe of the app's configuration; see `eff flower-app`."""
    options = context.run_config
    recipe = Recipe.model_validate_json(str(options["recipe"]))
    out = Path(str(options["out"]))
    log = NotesLog(Path(str(options["notes"])))

    def make_backend(method: FederatedMethod[Any], run: Run, parts: list[Tensor]) -> FlowerBackend:
        return FlowerBackend(
            grid, recipe, run, len(parts), float(options["round-timeout"]), float(options["start-timeout"])
        )

    def work() -> None:
        rounds.make_backend = make_backend
        try:
            report = apply(recipe, out, force=True, log=log)
            log.note(event="done", seconds=report.seconds)
        except EffError as error:
            log.note(event="error", message=str(error))
            failures.append(error)
        except Exception as error:
            log.note(event="error", message=f"{type(error).__name__}: {error}")
            failures.append(error)
        finally:
            rounds.make_backend = None

    # In a thread, so that a signal ends this process at once: a round may be waiting for a SuperLink that is
    # no longer there, and a run on Flower has nothing to finish for a resume.
    failures: list[Exception] = []
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
    if failures:
        raise failures[0]
