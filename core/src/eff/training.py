"""The training loop: steps through the hooks, on Hugging Face accelerate, resumable to the bit.

Every step is seeded by (seed, step index) and every epoch's order and augmentation by (seed, epoch),
so a resumed run repeats exactly what an uninterrupted one does, without storing random states.
"""

from __future__ import annotations

import datetime
import inspect
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.checkpoint import save_dictionary
from eff.data import Batch, Split, move_batch
from eff.distributed import processes, synced_batch_norm
from eff.errors import InterruptedRunError, NonFiniteLossError, PluginError, RequestError, RunError, did_you_mean
from eff.files import STATE_FILE
from eff.run import Run, Step, StepResult
from eff.schemas import Metric, TrainingSummary, TrainOptions
from eff.seeding import named_generator, seed_everything
from eff.session import Plugins

if TYPE_CHECKING:
    from accelerate import Accelerator

OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_OWN_OPTIONS = ("lr", "weight_decay", "momentum")


def supervised_step(step: Step) -> StepResult:
    """Do one step on `step.loss`: core's `train_step`."""
    optimizer = step.optimizer
    assert optimizer is not None  # core calls this only where it made one
    loss, _ = step.loss(step.model, step.batch)
    step.backward(loss)
    clip = step.run.train.clip_norm
    if clip and step.last_of_step:
        nn.utils.clip_grad_norm_(step.model.parameters(), clip)
    optimizer.step()
    return StepResult(loss.detach())


def make_optimizer(model: nn.Module, options: TrainOptions, plugins: Plugins) -> torch.optim.Optimizer:
    """Return the optimiser with one group per set of options that methods want for a parameter.

    Raises:
        RequestError: nobody provides `options.optimizer`, it refuses an option, or nothing in the model can be trained.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            wanted: dict[str, Any] = {}
            for chosen in plugins.chosen:
                wanted |= chosen.method.parameter_options(name, parameter)
            groups.setdefault(tuple(sorted(wanted.items())), []).append(parameter)
    if not groups:
        raise RequestError("nothing in the model requires a gradient, so it cannot be trained; use --epochs 0")
    return optimizer_of([{"params": parameters, **dict(key)} for key, parameters in groups.items()], options, plugins)


def optimizer_of(groups: list[dict[str, Any]], options: TrainOptions, plugins: Plugins) -> torch.optim.Optimizer:
    """Return the optimiser that `options` name, over parameter groups.

    Learning rate, weight decay and momentum are passed as far as the constructor takes them.

    Raises:
        RequestError: nobody provides it, or its constructor refuses an option.
    """
    name = options.optimizer or "sgd"
    optimizer_type = plugins.look_up("optimizers", name, OPTIMIZERS)
    takes = list(inspect.signature(optimizer_type).parameters)[1:]
    further = options.optimizer_options or {}
    for key in further:
        if key not in takes or key in _OWN_OPTIONS:
            known = ", ".join(key for key in takes if key not in _OWN_OPTIONS)
            way = f"use --{key.replace('_', '-')}" if key in _OWN_OPTIONS else f"known: {known}"
            raise RequestError(f"optimizer '{name}' takes no option '{key}'{did_you_mean(key, takes)}; {way}")
    arguments = {key: getattr(options, key) for key in _OWN_OPTIONS if key in takes}
    arguments |= {key: tuple(value) if isinstance(value, list) else value for key, value in further.items()}
    try:
        made: torch.optim.Optimizer = optimizer_type(groups, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"optimizer '{name}' refuses its options: {str(error).splitlines()[0]}") from error
    return made


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
    impatient = processes() == 1  # a launcher passes on the Ctrl-C that its processes have seen already

    def note(number: int, frame: Any) -> None:
        if event.is_set() and impatient:
            raise KeyboardInterrupt
        event.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_accelerator(run: Run) -> Accelerator:
    """Return an accelerator for the run's device, precision and processes."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # a process may make several runs
    if run.device.type == "cuda":
        torch.cuda.set_device(run.device)
    return Accelerator(
        cpu=run.device.type == "cpu",
        mixed_precision="no" if run.precision == "fp32" else run.precision,
        gradient_accumulation_steps=run.train.accumulate or 1,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),  # a supernet uses one path at a time
            InitProcessGroupKwargs(timeout=datetime.timedelta(days=1)),  # the others wait while the first measures
        ],
    )


class Training:
    """One training run: model, optimiser and position, which `save` and `load` carry over."""

    def __init__(self, model: nn.Module, run: Run, plugins: Plugins, began: Mapping[str, Any] | None = None):
        self.run = run
        self.began = began
        """What the run began with, for the resume file."""
        run.hook = plugins.hook
        self.plugins = plugins
        self.options = run.train
        self.raw_model = model
        self.model: nn.Module = model
        self.optimizer: torch.optim.Optimizer | None = None
        self.base_lrs: list[float] = []
        self.split: Split | None = None
        self.micro_batches = 1
        rounds = _own_step_count(run, plugins)
        self.accelerator = make_accelerator(run)
        if rounds is None:
            self._plan_batches(run.split("train"))
            optimizer = make_optimizer(model, self.options, plugins)
            self.base_lrs = [group["lr"] for group in optimizer.param_groups]
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        else:  # each step stands for itself, like an epoch of one step
            self.epochs, self.steps_per_epoch = rounds, 1
        self.total = self.steps_per_epoch * self.epochs
        self.every = self.options.checkpoint_every or (max(1, rounds // 20) if rounds else self.steps_per_epoch)
        self.done = 0
        self.losses: list[float] = []
        self.epoch_loss = 0.0
        self.resumed_at: int | None = None

    def _plan_batches(self, split: Split) -> None:
        """Decide batch size and steps; a batch is divided among the processes."""
        self.split = split
        processes = self.accelerator.num_processes
        self.micro_batches = self.options.accumulate or 1
        size = min(self.options.batch_size or 64, len(split) // self.micro_batches)
        self.batch_size = size // processes * processes
        if self.batch_size == 0:
            spec = self.run.data.spec if self.run.data else ""
            raise RequestError(
                f"data '{spec}' has {len(split)} training samples, too few for {self.micro_batches * processes} batches "
                "at once; use ?train=N, a smaller --accumulate, or --epochs 0"
                if len(split)
                else f"data '{spec}' has no training samples; use ?train=N above 0 or --epochs 0"
            )
        # A last batch of one sample would break batch statistics; incomplete batches are left to the next order.
        self.steps_per_epoch = len(split) // (self.batch_size * self.micro_batches)
        self.epochs = self.options.epochs or 0

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        return {
            "done": self.done,
            "losses": self.losses,
            "epoch_loss": self.epoch_loss,
            "model": self.raw_model.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else {},
            "methods": {chosen.name: chosen.method.state_dict() for chosen in self.plugins.chosen},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self.raw_model.load_state_dict(state["model"])
        if self.optimizer:
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
            save_dictionary(self.run.folder / STATE_FILE, {**self.state(), "structure": structure, "began": self.began})

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
        with (
            stop_requests() as stop,
            synced_batch_norm(self.raw_model, self.accelerator.num_processes),
            self.run.log.progress("train", self.total) as advance,
        ):
            advance(self.done)
            for epoch in range(self.done // max(1, self.steps_per_epoch), self.epochs):
                self._run_epoch(epoch, stop, advance)
        return TrainingSummary(
            steps=self.done,
            epochs=self.epochs,
            seconds=time.monotonic() - started,
            resumed_at=self.resumed_at,
            loss=self.losses,
        )

    def _diverged(self, what: str, step: int) -> NonFiniteLossError:
        kept = f"; {self.run.folder / STATE_FILE} keeps the last good state" if self.run.folder else ""
        return NonFiniteLossError(f"{what} at step {step} of {self.total}; start again with a smaller --lr{kept}")

    def _run_epoch(self, epoch: int, stop: threading.Event, advance: Any) -> None:
        order = epoch_order(len(self.split), self.run.seed, epoch) if self.split is not None else []
        for position in range(self.done - epoch * self.steps_per_epoch, self.steps_per_epoch):
            try:
                loss, metrics = self._step(epoch, order, position)
            except (ValueError, RuntimeError) as error:  # an op may refuse what is not finite before there is a loss
                if all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
                    raise
                what = f"the weights are not finite ({str(error).splitlines()[0]})"
                raise self._diverged(what, self.done + 1) from error
            loss, stopped = self._agree(loss, stop.is_set())
            self.done += 1
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", self.done)
            self.epoch_loss += loss
            if position + 1 == self.steps_per_epoch:
                self.losses.append(self.epoch_loss / self.steps_per_epoch)
                self.epoch_loss = 0.0
            notes = "".join(f" {name} {metric.value:.4g}" for name, metric in metrics.items())
            advance(1, f"loss {loss:.4f}{notes}")
            if stopped:
                self.save()
                where = f"; go on with --resume {self.run.folder}" if self.run.folder else ""
                raise InterruptedRunError(f"stopped at step {self.done} of {self.total}{where}")
            if self.done % self.every == 0:
                self.save()

    def _agree(self, loss: float, stop: bool) -> tuple[float, bool]:
        """Return the mean loss of all processes and whether any of them was asked to stop."""
        if self.accelerator.num_processes == 1:
            return loss, stop
        both = self.accelerator.reduce(torch.tensor([loss, float(stop)], device=self.accelerator.device), "mean")
        return float(both[0]), bool(both[1] > 0)

    def _step(self, epoch: int, order: list[int], position: int) -> tuple[float, dict[str, Metric]]:
        """Do one step, in as many batches as are accumulated; returns the mean loss and the last metrics."""
        factor = learning_rate_factor(self.done, self.total, self.options)
        if self.optimizer is not None:
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * factor
            for parameter in self.raw_model.parameters():  # accelerate's zero_grad waits for the last part
                parameter.grad = None
        losses = []
        metrics: dict[str, Metric] = {}
        for part in range(self.micro_batches):
            place = f"{self.done}/{part}" if part else f"{self.done}"
            batch = self._batch(order, position * self.micro_batches + part, place)
            seed_everything(self.run.seed, f"step/{place}")
            step = Step(
                model=self.model,
                module=self.raw_model,
                batch=batch,
                optimizer=self.optimizer,
                run=self.run,
                index=self.done,
                epoch=epoch,
                loss=self._loss,
                backward=self.accelerator.backward,
                last_of_step=part + 1 == self.micro_batches,
            )
            with self.accelerator.accumulate(self.model):
                result = self.plugins.hook.train_step(step=step)
            if not isinstance(result, StepResult):
                raise RunError(f"train_step returned {type(result).__name__}; it must return eff.run.StepResult")
            losses.append(float(result.loss))
            metrics = result.metrics
        return sum(losses) / len(losses), metrics

    def _batch(self, order: list[int], position: int, place: str) -> Batch:
        """Return this process's share of a batch.

        Augmentation draws its random numbers for the whole batch, so that the number of processes does
        not change it; each process then makes the whole batch and keeps its share.
        """
        if self.split is None:
            return {}
        indices = order[position * self.batch_size : (position + 1) * self.batch_size]
        size = self.batch_size // self.accelerator.num_processes
        share = slice(self.accelerator.process_index * size, (self.accelerator.process_index + 1) * size)
        if not self.options.augment:
            return move_batch(self.split.batch(indices[share]), self.run.device)
        batch = self.split.batch(indices, named_generator(self.run.seed, f"augment/{place}"))
        return move_batch({key: value[share] for key, value in batch.items()}, self.run.device)

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        output = self.run.forward(model, batch)
        return self.run.task.loss(output, batch), output


def _own_step_count(run: Run, plugins: Plugins) -> int | None:
    """Return the number of steps where a method counts its own.

    Raises:
        PluginError: two methods do. RequestError: on several devices.
    """
    counts = {item.name: count for item in plugins.chosen if (count := item.method.step_count(run)) is not None}
    if len(counts) > 1:
        raise PluginError(f"{' and '.join(counts)} both count the steps of the training; use one of them")
    if not counts:
        return None
    name, count = counts.popitem()
    if processes() > 1:
        raise RequestError(f"{name} does its own rounds in one process; leave out --devices")
    return count


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
