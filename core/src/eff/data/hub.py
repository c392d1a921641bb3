"""Source `hf:ID`: an image classification dataset through Hugging Face `datasets`.

ID is a dataset of the Hub, a folder that `save_to_disk` wrote, or any local folder that `datasets`
recognises. The data stay memory-mapped. The splits are train and test (or validation), or those that
`train_split` and `test_split` name; the columns are those with an Image and a ClassLabel, or those that
`image` and `label` name. Scripts in a dataset repository are never run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic import Field

from eff.data import Data
from eff.data.classification import make_data
from eff.data.images import Encoded
from eff.data.labelled import Found, Labelled
from eff.data.options import read_options
from eff.data.parquet import IMAGE_NAMES, LABEL_NAMES, ColumnOptions, label_indices
from eff.data.stores import EncodedStore
from eff.errors import DataError, MissingDependencyError, did_you_mean
from eff.schemas import DataSpec, TaskSpec

_TEST_NAMES = ("test", "validation", "valid", "val")
_SAVED_MARKS = ("dataset_dict.json", "state.json")


class HubOptions(ColumnOptions):
    """Options of `hf:ID`."""

    config: str | None = Field(None, description="a configuration of the dataset")
    revision: str | None = Field(None, description="a branch, tag or commit of the dataset")
    train_split: str | None = Field(None, description="the name of a split")
    test_split: str | None = Field(None, description="the name of a split")


def load_hub(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return an image dataset that Hugging Face `datasets` can load.

    Raises:
        DataError: it cannot be loaded, or has no image and label columns.
        MissingDependencyError: `datasets` is not installed.
    """
    options = read_options(spec, HubOptions)
    splits = _load(spec, options)
    train = _named_split(spec, splits, options.train_split, ("train",))
    test = _named_split(spec, splits, options.test_split, _TEST_NAMES)
    if train is None and test is None:
        if len(splits) != 1:
            raise DataError(
                f"data '{spec}' has the splits {', '.join(splits)}; name two with ?train_split= and ?test_split="
            )
        train = next(iter(splits.values()))
    chosen = [part for part in (train, test) if part is not None]
    image, label = _columns(spec, chosen[0].features, options)
    names = getattr(chosen[0].features[label], "names", None)
    classes, labels = label_indices(str(spec), [part[label][:] for part in chosen], names)
    parts = [_samples(spec, part, image, own) for part, own in zip(chosen, labels, strict=True)]
    if train is not None and test is not None:
        return make_data(spec, options, task, Found(classes, train=parts[0], test=parts[1]))
    share = 0.0 if train is None else 0.8
    return make_data(spec, options, task, Found(classes, whole=parts[0], train_share=share))


def _load(spec: DataSpec, options: HubOptions) -> dict[str, Any]:
    """Return the splits by name; a dataset without splits is one called "all"."""
    try:
        import datasets  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependencyError(
            f"data '{spec}' needs datasets, which is not installed; pip install 'eff-core[hub]'"
        ) from error
    where = spec.location
    try:
        if any((Path(where) / mark).exists() for mark in _SAVED_MARKS):
            loaded: Any = datasets.load_from_disk(where)
        else:
            loaded = datasets.load_dataset(where, name=options.config, revision=options.revision)
    except Exception as error:  # network, authorisation, unknown id, broken files: each its own type
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(f"data '{spec}' cannot be loaded: {type(error).__name__}: {reason}; check the id") from error
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _named_split(spec: DataSpec, splits: dict[str, Any], asked: str | None, usual: Sequence[str]) -> Any | None:
    if asked is not None and asked not in splits:
        known = ", ".join(splits)
        raise DataError(f"data '{spec}' has no split '{asked}'{did_you_mean(asked, splits)}; it has {known}")
    names = usual if asked is None else (asked,)
    return next((splits[name] for name in names if name in splits), None)


def _columns(spec: DataSpec, features: Any, options: HubOptions) -> tuple[str, str]:
    """Return the image and the label column: as asked, else by type, else by name."""

    known = ", ".join(features)

    def pick(kind: str, asked: str | None, feature: str, usual: Sequence[str]) -> str:
        fitting: list[str] = [name for name in features if type(features[name]).__name__ == feature]
        if asked is not None:
            if asked in features:
                return asked
            raise DataError(
                f"data '{spec}' has no column '{asked}'{did_you_mean(asked, features)}; columns are {known}"
            )
        if len(fitting) == 1:
            return fitting[0]
        named: str | None = next((name for name in usual if name in (fitting or features)), None)
        if named is None:
            raise DataError(
                f"data '{spec}' has no {kind} column that eff recognises; columns are {known}; "
                f"name it with ?{kind}=NAME"
            )
        return named

    image = pick("image", options.image, "Image", IMAGE_NAMES)
    return image, pick("label", options.label, "ClassLabel", LABEL_NAMES)


def _samples(spec: DataSpec, part: Any, image: str, labels: Any) -> Labelled:
    import datasets

    items = _HubImages(part.select_columns([image]).cast_column(image, datasets.Image(decode=False)), image)
    return Labelled(EncodedStore(items, lambda index: f"data '{spec}', row {index}"), labels)


class _HubImages(Sequence[Encoded]):
    """The image column of a dataset, read when asked for."""

    def __init__(self, rows: Any, column: str):
        self._rows = rows
        self._column = column

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        value = self._rows[index][self._column]
        encoded: bytes | None = value["bytes"]
        return encoded if encoded is not None else Path(value["path"])
