"""Optimising one unit of a network after the other, as train steps: so core's progress, checkpoints and resume apply.

A method with `n` units (layers, blocks, a layer at one of several bits) and `iterations` steps for each has
n * iterations steps. What a unit trains lies in the model, so a checkpoint holds it; what a unit reads is recorded
when it is opened, and recorded again when a run is resumed in its middle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from eff_quant_kit.calibration import Rows


class Unit(ABC):
    """What is optimised at a time."""

    optimizer: torch.optim.Optimizer

    @abstractmethod
    def loss(self, iteration: int) -> Tensor:
        """Return the loss on a batch drawn from the global generator (core seeds it per step)."""

    @abstractmethod
    def close(self) -> None:
        """Called after the last iteration: keep what was found, drop the rows."""


HELD_OUT = 10
"""One recorded row in so many is not trained on; errors are measured there."""


class RowUnit(Unit):
    """A unit that is fed recorded inputs and compared with recorded outputs.

    Args:
        inputs, targets: the rows.
        batch: rows per step.
        device: where the unit computes.
        mask: for rows of tokens (L, features) those that are no padding (L); None: all.
    """

    def __init__(self, inputs: Rows, targets: Rows, batch: int, device: torch.device, mask: Rows | None = None):
        self.inputs, self.targets, self.mask = inputs, targets, mask
        self.batch = batch
        self.device = device
        self.rows = max(1, len(inputs) - len(inputs) // HELD_OUT)
        """Rows to train on."""

    @abstractmethod
    def error(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the error of the outputs for inputs `x` and float outputs `y`."""

    def read(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return inputs and float outputs of some rows."""
        return self.select(self.inputs, index), self.select(self.targets, index)

    def select(self, rows: Rows, index: Tensor | slice) -> Tensor:
        """Return some rows, on the device; with a mask their tokens (n, features) without the padding."""
        values = rows.read(index)
        return (values if self.mask is None else values[self.mask.read(index).bool()]).to(self.device)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return a random batch of the rows to train on."""
        return self.read(draw(self.rows, self.batch))

    def held_out_error(self) -> float:
        """Return the error on the rows that are not trained on; with fewer than ten rows, on all."""
        start = self.rows if self.rows < len(self.inputs) else 0
        pieces = in_pieces(self.inputs, start, len(self.inputs), self.batch)
        with torch.no_grad():
            read = (self.read(piece) for piece in pieces)
            errors = [(float(self.error(x, y)), len(x)) for x, y in read]
        return sum(error * count for error, count in errors) / sum(count for _, count in errors)

    def drop(self) -> None:
        """Delete the rows."""
        self.inputs.drop()
        self.targets.drop()


class UnitByUnit:
    """Steps through units; where a step falls into a unit's middle after a resume, the unit is opened again."""

    def __init__(self, iterations: int, open_unit: Callable[[int, bool], Unit]):
        """Take the iterations per unit and what opens unit number n; False: it was begun before, keep what it trained."""
        self.iterations = iterations
        self.open_unit = open_unit
        self.number = -1
        self.unit: Unit | None = None
        self._resumed: dict[str, Any] | None = None

    def step(self, index: int) -> Tensor:
        """Do one step; returns the loss, detached."""
        number, iteration = divmod(index, self.iterations)
        if self.unit is None or self.number != number:
            self.unit = self.open_unit(number, iteration == 0)
            self.number = number
            if iteration and self._resumed:
                self.unit.optimizer.load_state_dict(self._resumed)
            self._resumed = None
        unit = self.unit
        unit.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = unit.loss(iteration)
            loss.backward()  # type: ignore[no-untyped-call]
        unit.optimizer.step()
        if iteration + 1 == self.iterations:
            unit.close()
            self.unit = None
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the open unit's optimiser."""
        return {"optimizer": self.unit.optimizer.state_dict() if self.unit is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back; it is loaded when the unit is opened again."""
        self._resumed = dict(state.get("optimizer") or {}) or None


def draw(rows: int, batch: int) -> Tensor:
    """Return `batch` row numbers below `rows` from the global generator: without repetition where there are enough."""
    return torch.randperm(rows)[:batch] if batch <= rows else torch.randint(rows, (batch,))


def in_pieces(rows: Rows, start: int, stop: int, size: int) -> list[slice]:
    """Return slices of at most `size` rows that cover [start, stop)."""
    return [slice(place, min(place + size, stop)) for place in range(start, min(stop, len(rows)), size)]
