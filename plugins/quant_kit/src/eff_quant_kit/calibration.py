"""Calibration data on disk: batches, and rows that were recorded over them.

Everything that grows with the number of samples lies in files, so what stays in memory is one batch; the rest is the
operating system's to keep or to drop. Rows have the same order in every recording, so inputs
from one model and outputs from another belong together (`walk.py` records).

Texts come in batches of different lengths; where there is an attention mask, all tokens are brought to the longest length,
masked: models do not see the padding, and errors of linear layers leave it out (`mask_of`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Batch, batch_size_of, move_batch
from eff.errors import DataError, UnsupportedModelError
from eff.run import Run

FEW = 32
"""Fewer samples than this draw a warning."""
MASK = "attention_mask"
"""The column that says which tokens are there (1) and which are padding (0)."""


class Rows:
    """A tensor (N, ...) in a file, written batch by batch and read by index."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / name
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self.count = 0
        self._mapped: Tensor | None = None

    def append(self, rows: Tensor) -> None:
        """Write further rows (n, ...).

        Raises:
            UnsupportedModelError: their shape differs from that of the rows before.
        """
        rows = rows.detach().to("cpu").contiguous()
        if self.count and rows.shape[1:] != self.shape:
            raise UnsupportedModelError(
                f"{self.path.stem}: is called with inputs of shapes {tuple(self.shape)} and {tuple(rows.shape[1:])}; "
                "calibrate on data of one size, or exclude it"
            )
        self.shape, self.dtype = tuple(rows.shape[1:]), rows.dtype
        with self.path.open("ab") as file:
            file.write(rows.view(-1).view(torch.uint8).numpy().data if rows.numel() else b"")
        self.count += len(rows)
        self._mapped = None

    def __len__(self) -> int:
        return self.count

    def read(self, index: Tensor | slice) -> Tensor:
        """Return a copy of the rows of `index`, numbers or a slice without steps; changing it does not touch the file."""
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.count)
            return self._read_run(start, max(0, stop - start))
        if self._mapped is None:
            size = self.count * int(torch.Size(self.shape).numel())
            flat = torch.from_file(str(self.path), shared=False, size=size, dtype=self.dtype)
            self._mapped = flat.view(self.count, *self.shape)
        return self._mapped[index].clone()

    def _read_run(self, start: int, count: int) -> Tensor:
        """Return rows that lie together: read, not mapped, so that what was read does not stay the process's memory."""
        rows = torch.empty(count, *self.shape, dtype=self.dtype)
        if rows.numel():
            with self.path.open("rb") as file:
                file.seek(start * rows[0].nbytes)
                file.readinto(rows.view(-1).view(torch.uint8).numpy())
        return rows

    def drop(self) -> None:
        """Delete the file."""
        self._mapped = None
        self.path.unlink(missing_ok=True)
        self.count = 0


class CalibrationSet:
    """Batches of a split, read and decoded once; and the files of what is recorded over them."""

    def __init__(self, run: Run, samples: int, batch_size: int = 32, split: str = "train", plugin: str = "calibration"):
        self.run = run
        self.batch_size = batch_size
        self._folder = tempfile.TemporaryDirectory(prefix="eff-calibration-")
        self.folder = Path(self._folder.name)
        self.columns: dict[str, Rows] = {}
        self.plain: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self._recordings = 0
        for batch in run.batches(split, samples, batch_size):
            self.sizes.append(batch_size_of(batch))
            self.plain.append({key: value for key, value in batch.items() if not isinstance(value, Tensor)})
            self._append({key: value for key, value in batch.items() if isinstance(value, Tensor)})
        if not self.sizes:
            raise DataError(f"{plugin}: the {split} split is empty; it is calibrated on data, use ?{split}=N above 0")
        if len(self) < FEW:
            run.warn(f"{plugin}: calibrates on {len(self)} samples; below {FEW} the result depends on which they are")

    def _append(self, batch: dict[str, Tensor]) -> None:
        """Write a batch; columns of tokens, those as long as the mask, to the longest length so far."""
        if MASK in batch and self.columns:
            have, new = self.columns[MASK].shape[0], batch[MASK].shape[1]
            length = max(have, new)
            batch = {
                key: _lengthened(value, length) if value.ndim > 1 and value.shape[1] == new else value
                for key, value in batch.items()
            }
            if have < length:
                for key in [key for key, rows in self.columns.items() if rows.shape[:1] == (have,)]:
                    self._rewrite(key, lambda value: _lengthened(value, length))
        for key, value in batch.items():
            if key not in self.columns:
                self.columns[key] = Rows(self.folder, f"batch-{key}")
            self.columns[key].append(value)

    def _rewrite(self, key: str, change: Callable[[Tensor], Tensor]) -> None:
        """Change a column, some rows at a time."""
        rows = self.columns[key]
        changed = Rows(self.folder, f"{rows.path.name}.")
        for start in range(0, len(rows), self.batch_size):
            changed.append(change(rows.read(slice(start, start + self.batch_size))))
        rows.drop()
        self.columns[key] = changed

    def mask_of(self, module: nn.Module, inputs: Rows) -> Rows | None:
        """Return which of a linear layer's recorded inputs are tokens (N, L), 0 where padding; None: all are, or unknown.

        Other layers mix tokens, so that their padding cannot be left out.
        """
        mask = self.columns.get(MASK)
        weight = getattr(module, "weight", None)
        if mask is None or weight is None or weight.ndim != 2 or len(inputs) != len(mask):
            return None
        return mask if len(inputs.shape) == 2 and inputs.shape[:1] == mask.shape else None

    def __enter__(self) -> CalibrationSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete all files."""
        self._folder.cleanup()

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, on the run's device, always in the same order."""
        start = 0
        for size, plain in zip(self.sizes, self.plain, strict=True):
            batch = {key: rows.read(slice(start, start + size)) for key, rows in self.columns.items()}
            yield move_batch({**batch, **plain}, self.run.device)
            start += size

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the floating-point inputs (two dimensions or more), batch by batch."""
        for key, rows in list(self.columns.items()):
            if rows.dtype.is_floating_point and len(rows.shape):
                self._rewrite(key, change)

    def draw(self, index: Tensor) -> Batch:
        """Return the samples of `index` as one batch."""
        batch: Batch = {key: rows.read(index) for key, rows in self.columns.items()}
        return move_batch(batch, self.run.device)

    def new_rows(self, name: str) -> Rows:
        """Return rows for recordings, deleted with the rest; `name` is what errors call them."""
        self._recordings += 1
        return Rows(self.folder, f"{self._recordings}-{name}")


def _lengthened(value: Tensor, length: int) -> Tensor:
    """Return (N, L, ...) with zeros up to `length`; as a token's number any would do, the mask is 0 there."""
    missing = value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])
    return torch.cat([value, missing], 1)


def over_padding(x: Tensor, batch: Batch) -> Tensor:
    """Return `x` (N, L, features) with each sample's first token in place of its padding, for extremes; else `x`."""
    mask = batch.get(MASK)
    if mask is None or x.ndim != 3 or x.shape[:2] != mask.shape:
        return x
    return torch.where(mask[..., None].bool(), x, x[:, :1])
