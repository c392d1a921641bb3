"""What hooks are handed: the run and the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eff.errors import DataError, PluginError
from eff.files import CORE_FILES, atomic_path, describe_artifact
from eff.log import Log
from eff.schemas import AppliedMethod, Artifact, Metric, ModelSpec, Precision, TrainOptions

if TYPE_CHECKING:
    import torch
    from pydantic import JsonValue
    from torch import Tensor, nn

    from eff.data import Batch, Data
    from eff.tasks import Task

Loss = Callable[["nn.Module", "Batch"], "tuple[Tensor, Any]"]
"""(model, batch) -> (loss, output)."""


@dataclass(eq=False)
class Run:
    """One run: what every hook may know and use."""

    task: Task[Any]
    device: torch.device
    seed: int = 0
    data: Data | None = None
    model_spec: ModelSpec | None = None
    train: TrainOptions = field(default_factory=TrainOptions)
    """The resolved training recipe (nothing unset) where the run trains."""
    precision: Precision = "fp32"
    folder: Path | None = None
    log: Log = field(default_factory=Log)
    restoring: bool = False
    """A checkpoint is being rebuilt: make the structure, use no data."""
    training: bool = False
    """`train_step` will be called after `transform`: keep a teacher now if one is wanted."""
    keeps_files: bool = False
    """`output` may be used: there is a run folder, and this is not the measurement before the change."""
    hook: Any = None
    """Calls the hooks of this run's plugins, those of families included; set where the run trains."""
    outputs: list[Artifact] = field(default_factory=list)
    """What `output` has written, for the report."""
    applied: Callable[[], tuple[AppliedMethod, ...]] = tuple
    """Returns the methods applied so far, for the header of files that a method writes."""

    def generator(self, name: str) -> torch.Generator:
        """Return a CPU generator that depends on the seed and `name` alone."""
        from eff.seeding import named_generator

        return named_generator(self.seed, name)

    def batches(
        self, split: str = "train", samples: int | None = None, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Yield batches of a split on `device`, in a seeded random order, without augmentation.

        For calibration, initialisation and diagnostics; the training loop has its own loader.

        Args:
            split: "train" or "test".
            samples: at most this many samples; None for all.
            batch_size: samples per batch; None for the recipe's.

        Raises:
            DataError: the run has no data, or not this split.
        """
        from eff.data import move_batch, shuffled_batches

        chosen = self.split(split)
        size = batch_size or self.train.batch_size or 64
        for batch in shuffled_batches(chosen, size, self.generator(f"batches/{split}"), samples):
            yield move_batch(batch, self.device)

    def split(self, name: str) -> Any:
        """Return the split `name` of the data.

        Raises:
            DataError: the run has no data, or not this split.
        """
        if self.data is None:
            raise DataError("this needs data; add --data, e.g. --data digits")
        return self.data.split(name)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Return the model's output on `batch` as the task feeds it (normalised)."""
        return self.task.forward(model, batch)

    @contextmanager
    def output(self, name: str, format: str, **details: JsonValue) -> Iterator[Path]:
        """Give a temporary path for a file of the run folder; moved into place when the block ends.

        For what a method leaves beside the model: per-sample results, figures, tables. The file is
        listed in the report. Ask `keeps_files` first.

        Args:
            name: plain file name with its suffix, e.g. "robustness.parquet"; written again, it is replaced.
            format: what the report calls it, e.g. "parquet".
            **details: for the report.

        Raises:
            PluginError: the run keeps no files now, or the name is a path or core's own.
            RunError: the disk is full.
        """
        if self.folder is None or not self.keeps_files:
            raise PluginError(f"'{name}' cannot be written now; ask run.keeps_files before run.output")
        if name != Path(name).name or name in CORE_FILES:
            raise PluginError(f"'{name}' is no name for a method's file; use a plain name that core does not write")
        path = self.folder / name
        with atomic_path(path) as temporary:
            yield temporary
        self.outputs[:] = [item for item in self.outputs if item.path != path]
        self.outputs.append(describe_artifact(path, format, details))

    def warn(self, message: str) -> None:
        """Show a warning and put it into the report."""
        self.log.warn(message)


@dataclass(eq=False)
class Step:
    """One optimisation step; mutable, so that wrappers can act through it."""

    model: nn.Module
    """What to call; on several devices a wrapper, see `module`."""
    module: nn.Module
    """The model itself, for its attributes and parameters."""
    batch: Batch
    """Empty where the method counts its own steps."""
    optimizer: torch.optim.Optimizer | None
    """None where the method counts its own steps."""
    run: Run
    index: int
    """Steps done before this one, over the whole run."""
    epoch: int
    loss: Loss
    """(model, batch) -> (loss, output); replace it to change the objective."""
    backward: Callable[[Tensor], None]
    """Use instead of `loss.backward()`: handles precision, accumulation and several devices."""
    last_of_step: bool = True
    """False while gradients are being accumulated; `optimizer.step()` then waits by itself."""


@dataclass(frozen=True)
class StepResult:
    """What a step reports."""

    loss: Tensor
    """0-dim, detached."""
    metrics: dict[str, Metric] = field(default_factory=dict)
