"""What an evaluation leaves on disk: one record per sample, and adversarial images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eff.errors import MissingDependencyError
from eff_adv_kit.runner import CLEAN, Outcome


def record_columns(outcome: Outcome) -> dict[str, Any]:
    """Return one column per fact, in the order of the split; `broken_by` in words, "" where it stands."""
    records = outcome.records
    names = np.array([stage.name for stage in outcome.stages] + ["clean", ""])
    code = np.where(records.broken_by == CLEAN, len(names) - 2, records.broken_by)  # STANDING is -1, the last
    return {
        "index": np.arange(len(records.label)),
        "label": records.label,
        "prediction": records.prediction,
        "clean_ok": records.clean_ok,
        "margin": records.margin,
        "robust": records.robust,
        "broken_by": names[code],
        "adversarial_prediction": records.adversarial_prediction,
        "adversarial_margin": records.adversarial_margin,
        "distance": records.distance,
    }


def write_records(outcome: Outcome, path: Path, format: str) -> None:
    """Write the records as "npz" (one array per column) or "parquet".

    Raises:
        MissingDependencyError: Parquet without pyarrow.
    """
    columns = record_columns(outcome)
    if format == "npz":
        with open(path, "wb") as file:  # savez adds a suffix to a name, not to a file
            np.savez_compressed(file, **columns)
        return
    check_parquet()
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({name: pyarrow.array(values) for name, values in columns.items()}), path)


def check_parquet() -> None:
    """Raise where Parquet cannot be written.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "records=parquet needs pyarrow; pip install 'eff-adv-kit[parquet]', or take records=npz"
        ) from error


def write_examples(outcome: Outcome, path: Path, classes: Sequence[str]) -> None:
    """Write the kept adversarial images so that eff reads them as a test split (`--data PATH.npz`)."""
    index = np.array(outcome.examples.index, dtype=np.int64)
    with open(path, "wb") as file:
        np.savez_compressed(
            file, x_test=torch.stack(outcome.examples.images).numpy(), y_test=outcome.records.label[index],
            index=index, classes=np.array(list(classes)),
        )  # fmt: skip
