"""The training loop: steps through the hooks, on Hugging Face accelerate, resumable to the bit.

Every step is seeded by (seed, step index) and every epoch's order and augmentation by (seed, epoch),
so a resumed run repeats exactly what an uninterrupted one does, without storing random states.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.checkpoint import save_dictionary
from eff.data import Batch, Split, move_batch
from eff.errors import InterruptedRunError, NonFiniteLossError, RequestError, RunError
from eff.run import Run, Step, StepResult
from eff.schemas import TrainingSummary, TrainOptions
from eff.seeding import named_generator, seed_everything
from eff.session import Plugins

if TYPE_CHECKING:
    from accelerate import Accelerator

STATE_FILE = "resume.pt"
OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def supervised_step(step: Step) -> StepResult:
    """Do one step on `step.loss`: core's `train_step`."""
    step.optimizer.zero_grad(set_to_none=True)
    loss, _ = step.loss(step.model, step.batch)
    step.backward(loss)
    clip = step.run.train.clip_norm
    if clip:
        nn.utils.clip_grad_norm_(step.model.parameters(), clip)
    step.optimizer.step()
    return StepResult(loss.detach())


def make_optimizer(model: nn.Module, options: TrainOptions, plugins: Plugins) -> torch.optim.Optimizer:
    """Return the optimiser with one group per set of options that methods want for a parameter.

    Raises:
        RequestError: nobody provides `options.optimizer`, or nothing in the model can be trained.
    """
    optimizer_type = plugins.look_up("optimizers", options.optimizer or "sgd", OPTIMIZERS)
    groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted: dict[str, Any] = {}
            for chosen in plugins.chosen:
                wanted |= chosen.method.parameter_options(name, parameter)
            groups.setdefault(tuple(sorted(wanted.items())), []).append(parameter)
    if not groups:
        raise RequestError("nothing in the model requires a gradient, so it cannot be trained; use --epochs 0")
    arguments: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if optimizer_type is torch.optim.SGD:
        arguments["momentum"] = options.momentum
    optimizer: torch.optim.Optimizer = optimizer_type(
        [{"params": parameters, **dict(key)} for key, parameters in groups.items()], **arguments
    )
    return optimizer


def learning_rate_factor(index: int, total: int, options: TrainOptions) -> float:
    """Return the factor on the learning rate at step `index` of `total`: linear warm-up, then cosine to 0 or constant."""
    warmup = int((options.warmup or 0.0) * total)
    if index < warmup:
        return (index + 1) / warmup
    if options.schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (index - warmup) / max(1, total - warmup)))


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the samples in one epoch."""
    order: list[int] = torch.randperm(samples, generator=named_generator(seed, f"order/{epoch}")).tolist()
    return order


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C (or SIGTERM) into an event; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_accelerator(run: Run) -> Accelerator:
    """Return an accelerator for the run's device and precision."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a process may make several runs
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    mixed = "no" if run.precision == "fp32" else run.precision
    return Accelerator(cpu=run.device.type == "cpu", mixed_precision=mixed)


class Training:
    """One training run: model, optimiser and position, which `save` and `load` carry over."""

    def __init__(self, model: nn.Module, run: Run, plugins: Plugins):
        self.run = run
        self.plugins = plugins
        self.options = run.train
        self.split: Split = run.split("train")
        if len(self.split) == 0:
            raise RequestError(
                f"data '{run.data.spec if run.data else ''}' has no training samples; use ?train=N above 0 or --epochs 0"
            )
        self.accelerator = make_accelerator(run)
        self.raw_model = model
        optimizer = make_optimizer(model, self.options, plugins)
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        size = self.options.batch_size or 64
        self.batch_size = min(size, len(self.split))
        # A last batch of one sample would break batch statistics; incomplete batches are left to the next order.
        self.steps_per_epoch = len(self.split) // self.batch_size
        self.total = self.steps_per_epoch * (self.options.epochs or 0)
        self.done = 0
        self.losses: list[float] = []
        self.epoch_loss = 0.0
        self.resumed_at: int | None = None

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {
            "done": self.done,
            "losses": self.losses,
            "epoch_loss": self.epoch_loss,
            "model": self.raw_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "methods": {chosen.name: chosen.method.state_dict() for chosen in self.plugins.chosen},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.raw_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for chosen in self.plugins.chosen:
            chosen.method.load_state_dict(state["methods"].get(chosen.name, {}))
        self.done = self.resumed_at = state["done"]
        self.losses = list(state["losses"])
        self.epoch_loss = state["epoch_loss"]

    def save(self) -> None:
        """Write the resume file into the run folder."""
        if self.run.folder is not None and self.accelerator.is_main_process:
            structure = {chosen.name: chosen.method.structure for chosen in self.plugins.chosen}
            save_dictionary(self.run.folder / STATE_FILE, {**self.state(), "structure": structure})

    def run_all(self) -> TrainingSummary:
        """Train to the end.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite; the last checkpoint stays.
            InterruptedRunError: Ctrl-C; a checkpoint was written.
        """
        started = time.monotonic()
        if self.done == 0:
            self.save()
        self.model.train()
        with stop_requests() as stop, self.run.log.progress("train", self.total) as advance:
            advance(self.done)
            for epoch in range(self.done // max(1, self.steps_per_epoch), self.options.epochs or 0):
                self._run_epoch(epoch, stop, advance)
        return TrainingSummary(
            steps=self.done,
            epochs=self.options.epochs or 0,
            seconds=time.monotonic() - started,
            resumed_at=self.resumed_at,
            loss=self.losses,
        )

    def _run_epoch(self, epoch: int, stop: threading.Event, advance: Any) -> None:
        order = epoch_order(len(self.split), self.run.seed, epoch)
        every = self.options.checkpoint_every
        for position in range(self.done - epoch * self.steps_per_epoch, self.steps_per_epoch):
            result = self._step(epoch, order, position)
            self.done += 1
            loss = float(result.loss)
            if not math.isfinite(loss):
                kept = f"; {self.run.folder / STATE_FILE} keeps the last good state" if self.run.folder else ""
                raise NonFiniteLossError(
                    f"the loss is {loss} at step {self.done} of {self.total}; try a smaller --lr{kept}"
                )
            self.epoch_loss += loss
            last = position + 1 == self.steps_per_epoch
            if last:
                self.losses.append(self.epoch_loss / self.steps_per_epoch)
                self.epoch_loss = 0.0
            notes = "".join(f" {name} {metric.value:.4g}" for name, metric in result.metrics.items())
            advance(1, f"loss {loss:.4f}{notes}")
            if stop.is_set():
                self.save()
                where = f"; go on with --resume {self.run.folder}" if self.run.folder else ""
                raise InterruptedRunError(f"stopped at step {self.done} of {self.total}{where}")
            if (every and self.done % every == 0) or (last and not every):
                self.save()

    def _step(self, epoch: int, order: list[int], position: int) -> StepResult:
        indices = order[position * self.batch_size : (position + 1) * self.batch_size]
        augment = named_generator(self.run.seed, f"augment/{self.done}") if self.options.augment else None
        batch = move_batch(self.split.batch(indices, augment), self.run.device)
        factor = learning_rate_factor(self.done, self.total, self.options)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        seed_everything(self.run.seed, f"step/{self.done}")
        step = Step(
            model=self.model,
            batch=batch,
            optimizer=self.optimizer,
            run=self.run,
            index=self.done,
            epoch=epoch,
            loss=self._loss,
            backward=self.accelerator.backward,
        )
        result = self.plugins.hook.train_step(step=step)
        if not isinstance(result, StepResult):
            raise RunError(f"train_step returned {type(result).__name__}; it must return eff.run.StepResult")
        return result

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        output = self.run.forward(model, batch)
        return self.run.task.loss(output, batch), output


def read_resume_file(folder: Path) -> dict[str, Any]:
    """Return what an interrupted run left in its folder.

    Raises:
        RequestError: there is nothing to resume, or the file is damaged.
    """
    path = folder / STATE_FILE
    if not path.exists():
        raise RequestError(f"{folder}: nothing to resume ({STATE_FILE} is missing); start the run without --resume")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file
        raise RequestError(
            f"{path}: damaged ({str(error).splitlines()[0]}); start the run anew with --force"
        ) from error
    return state
