"""Source `parquet:PATH`: images in Parquet files, in the schema of Hugging Face datasets.

PATH is a folder with train*.parquet and test*.parquet (or validation*.parquet), also below data/, or one
file. A single file whose name starts with test or validation is all test; another is split 80/20 by seed.
The image column is a struct with `bytes`, or binary; the label column holds class indices or names, and the
class names stand in the files' "huggingface" metadata. The encoded images are kept in memory: for data
larger than that, use `hf:` with the same folder, which maps it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from eff.data import Data
from eff.data.classification import make_data
from eff.data.labelled import Found, Labelled
from eff.data.labels import from_indices, from_names
from eff.data.options import ImageOptions, read_options
from eff.data.stores import EncodedStore
from eff.errors import DataError, MissingDependencyError
from eff.schemas import DataSpec, TaskSpec

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

IMAGE_NAMES = ("image", "img", "images")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_index")
_TEST_PREFIXES = ("test", "validation", "val")


class ColumnOptions(ImageOptions):
    """Options of sources with columns."""

    image: str | None = Field(None, description="the name of the image column")
    label: str | None = Field(None, description="the name of the label column")


@dataclass(frozen=True)
class _Table:
    """What one split's files hold."""

    images: list[bytes]
    origin: list[str]
    labels: list[int] | list[str]
    names: tuple[str, ...] | None


def load_parquet(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the images of Parquet files.

    Raises:
        DataError: no such files, or no image and label columns in them.
        MissingDependencyError: pyarrow is not installed.
    """
    path = Path(spec.location)
    options = read_options(spec, ColumnOptions, path)
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"data '{spec}' needs pyarrow, which is not installed; pip install 'eff-core[hub]'"
        ) from error
    train, test, whole = _files(path)
    is_test_file = path.is_file() and path.name.startswith(_TEST_PREFIXES)
    tables = {
        name: _read(files, options) for name, files in (("train", train), ("test", test), ("whole", whole)) if files
    }
    names = next((table.names for table in tables.values() if table.names), None)
    classes, labels = label_indices(str(path), [table.labels for table in tables.values()], names)
    parts = {name: _samples(table, own) for (name, table), own in zip(tables.items(), labels, strict=True)}
    share = 0.0 if is_test_file else 0.8
    found = Found(classes, parts.get("train"), parts.get("test"), parts.get("whole"), train_share=share)
    return make_data(spec, options, task, found)


def _files(path: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return the files of train, test, and of data without splits."""
    if path.is_file():
        return [], [], [path]
    found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
    if not found:
        raise DataError(f"{path}: has no *.parquet files, neither there nor in data/")
    train = [file for file in found if file.name.startswith("train")]
    test: list[Path] = []
    for prefix in _TEST_PREFIXES:
        test = test or [file for file in found if file.name.startswith(prefix)]
    if not train and not test:
        return [], [], found
    return train, test, []


def _read(files: Sequence[Path], options: ColumnOptions) -> _Table:
    import pyarrow.parquet as pq  # type: ignore[import-untyped,unused-ignore]

    images: list[bytes] = []
    origin: list[str] = []
    labels: list[Any] = []
    names: tuple[str, ...] | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                image, label = find_columns(str(path), schema, options)
                table = file.read(columns=[image, label])
        except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
            raise DataError(f"{path}: is not a Parquet file that pyarrow can read ({_first_line(error)})") from error
        images += _encoded(path, image, table.column(image))
        origin += [f"{path}, row {row}" for row in range(table.num_rows)]
        labels += _labels(path, label, table.column(label))
        names = names or _names_in(schema, label)
    return _Table(images, origin, labels, names)


def find_columns(where: str, schema: pa.Schema, options: ColumnOptions) -> tuple[str, str]:
    """Return the names of the image and the label column.

    Raises:
        DataError: there is none, or not the one the options name.
    """
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    def has_bytes(field: pa.Field) -> bool:
        kind = field.type
        if pa.types.is_struct(kind):
            return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    images = [field.name for field in schema if has_bytes(field)]
    rest = [field.name for field in schema if field.name not in images]
    image = _pick(where, "image", options.image, images, IMAGE_NAMES, schema.names)
    return image, _pick(where, "label", options.label, rest, LABEL_NAMES, schema.names)


def _pick(
    where: str, kind: str, asked: str | None, fitting: Sequence[str], usual: Sequence[str], columns: Sequence[str]
) -> str:
    found = ", ".join(columns) or "no columns"
    if asked is not None:
        if asked in fitting:
            return asked
        raise DataError(f"{where}: column '{asked}' cannot be the {kind} column; columns are {found}")
    for name in usual:
        if name in fitting:
            return name
    if kind == "image" and len(fitting) == 1:
        return fitting[0]
    raise DataError(
        f"{where}: has no {kind} column that eff recognises; columns are {found}; name it with ?{kind}=NAME"
    )


def _encoded(path: Path, name: str, column: pa.ChunkedArray) -> list[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]
    import pyarrow.compute as pc  # type: ignore[import-untyped,unused-ignore]

    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DataError(f"{path}, row {row}: column '{name}' has no image bytes")
    images: list[bytes] = column.to_pylist()
    return images


def _labels(path: Path, name: str, column: pa.ChunkedArray) -> list[Any]:
    import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not (is_text or pa.types.is_integer(column.type)):
        raise DataError(f"{path}: column '{name}' is of type {column.type}; labels are whole numbers or names")
    if column.null_count:
        raise DataError(f"{path}, row {column.is_null().to_pylist().index(True)}: column '{name}' has no label")
    labels: list[Any] = column.to_pylist()
    return labels


def _names_in(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """Return the class names in the metadata that Hugging Face datasets writes, where they are there."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        return tuple(str(name) for name in feature["names"]) if feature["names"] else None
    except (KeyError, TypeError, ValueError):
        return None


def label_indices(
    where: str, labels: Sequence[Sequence[int] | Sequence[str]], names: Sequence[str] | None
) -> tuple[tuple[str, ...], list[Tensor]]:
    """Return the classes and each split's labels as indices, from class indices or class names."""
    together: list[Any] = [label for part in labels for label in part]
    sizes = [len(part) for part in labels]
    if together and isinstance(together[0], str):
        classes, indices = from_names(together)
    else:
        indices = torch.tensor(together, dtype=torch.long)
        classes = from_indices(where, indices, names)
    return classes, list(torch.split(indices, sizes))


def _samples(table: _Table, labels: Tensor) -> Labelled:
    return Labelled(EncodedStore(table.images, table.origin.__getitem__), labels)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
