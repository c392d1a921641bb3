"""The filter data base: one Parquet file, a row per filter, a row group per layer.

Columns: model, tag, task, layer, conv (number of the convolution), depth, groups (null: not known),
out_channel, in_channel (within the group), f0 ... f8 (the weights, row by row, not scaled). Weights are
stored as they are (float32, or float64 where a layer has that), so a base gives the same results again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

from eff.errors import ModelError
from eff_eval_filter_db.layers import Array, Layer

FILE = "filters.parquet"
_MARK, _KERNEL = b"eff_filter_db", b"kernel"
_VERSION = b"1"


def write_database(path: Path, layers: Sequence[Layer], kernel: int) -> None:
    """Write all filters of `layers`, one layer in memory at a time."""
    wide = any(layer.read().dtype == np.float64 for layer in layers)
    names = [f"f{place}" for place in range(kernel * kernel)]
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("model", "tag", "task", "layer")),
            ("conv", pa.int32()),
            ("depth", pa.float64()),
            *((name, pa.int32()) for name in ("groups", "out_channel", "in_channel")),
            *((name, pa.float64() if wide else pa.float32()) for name in names),
        ],
        {_MARK: _VERSION, _KERNEL: str(kernel).encode()},
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for layer in layers:
            out_channel, in_channel = np.divmod(np.arange(layer.count, dtype=np.int32), layer.shape[1])
            constant = (layer.model, layer.tag, layer.task, layer.name, layer.index, layer.depth, layer.groups)
            columns = [
                pa.repeat(pa.scalar(value, schema.field(i).type), layer.count) for i, value in enumerate(constant)
            ]
            weights = layer.rows("float64" if wide else "float32")
            columns += [pa.array(out_channel), pa.array(in_channel), *(pa.array(column) for column in weights.T)]
            writer.write_table(pa.table(columns, schema), row_group_size=layer.count)


def read_database(path: Path, kernel: int) -> list[Layer]:
    """Return the layers of a filter data base; their weights stay in the file until they are read.

    Raises:
        ModelError: no such file, not Parquet, not written by eval_filter_db, or of other filters.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"eval_filter_db: {path} cannot be read as Parquet ({reason}); write it again") from error
    metadata = file.schema_arrow.metadata or {}
    if metadata.get(_MARK) != _VERSION:
        raise ModelError(
            f"eval_filter_db: {path} is no filter data base; name a {FILE} that eff apply eval_filter_db has written"
        )
    stored = int(metadata[_KERNEL])
    if stored != kernel:
        raise ModelError(f"eval_filter_db: {path} holds {stored}x{stored} filters; add -o kernel={stored}")
    return [_layer(path, file, group, kernel) for group in range(file.num_row_groups)]


def _layer(path: Path, file: pq.ParquetFile, group: int, kernel: int) -> Layer:
    names = ["model", "tag", "task", "layer", "conv", "depth", "groups", "out_channel", "in_channel"]
    table = file.read_row_group(group, columns=names)
    first, last = (table.slice(row, 1).to_pylist()[0] for row in (0, table.num_rows - 1))
    shape = (last["out_channel"] + 1, last["in_channel"] + 1)
    if shape[0] * shape[1] != table.num_rows:
        raise ModelError(
            f"eval_filter_db: {path}: row group {group} is not one whole layer; use the file as it was written"
        )
    return Layer(
        first["model"], first["layer"], first["conv"], first["depth"], shape, first["groups"],
        partial(_read, path, group, shape, kernel), first["tag"], first["task"],
    )  # fmt: skip


def _read(path: Path, group: int, shape: tuple[int, int], kernel: int) -> Array:
    table = pq.ParquetFile(path).read_row_group(group, columns=[f"f{place}" for place in range(kernel * kernel)])
    rows = np.stack([column.to_numpy() for column in table.columns], axis=1)
    return rows.reshape(*shape, kernel, kernel)
