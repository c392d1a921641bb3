"""Source `folder:PATH`: images in folders.

    PATH/train/CLASS/*.jpg, PATH/test/CLASS/*.jpg     with splits; "val" or "validation" stands in for "test"
    PATH/CLASS/*.jpg                                  without; 80 % train, 20 % test by seed, stratified
    PATH/labels.csv and the files it names            without; also inside train/ and test/

`labels.csv` has a column `file` and one of `class_index` (the model's output index, with an optional
`class_name` beside it), `label`, `class` or `class_name`. Class folders count in alphabetic order. Files
are decoded when a batch needs them.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eff.data import Data
from eff.data.classification import make_data
from eff.data.images import SUFFIXES
from eff.data.labelled import Found, Labelled
from eff.data.labels import from_indices, from_names
from eff.data.options import ImageOptions, read_options
from eff.data.stores import EncodedStore
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec

_TEST_NAMES = ("test", "val", "validation")
_FILE_COLUMNS = ("file", "filename", "file_name", "path", "image")
_NAME_COLUMNS = ("label", "class", "class_name")


@dataclass(frozen=True)
class _Listing:
    """Files with the names, and where given the output indices, of their classes."""

    files: list[Path]
    names: list[str]
    indices: list[int] | None = None
    is_csv: bool = False


def load_folder(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the images of a folder.

    Raises:
        DataError: no images, no classes, or a list that does not fit the files.
    """
    root = Path(spec.location)
    options = read_options(spec, ImageOptions, root)
    if not root.is_dir():
        raise DataError(f"data '{spec}': {root} is a file; name the folder with the images")
    train_folder, test_folder = _split_folders(root)
    if train_folder is None and test_folder is None:
        classes, by_index, [whole] = _labelled([_list_images(root)], root)
        found = Found(classes, whole=whole, by_index=by_index)
    elif train_folder is not None and test_folder is not None:
        train_list, test_list = _list_images(train_folder), _list_images(test_folder)
        _check_same_classes(test_folder, train_list, test_list)
        classes, by_index, [train, test] = _labelled([train_list, test_list], root)
        found = Found(classes, train, test, by_index=by_index)
    else:  # one of them alone: 80/20 of train, or all of test
        classes, by_index, [whole] = _labelled([_list_images(train_folder or test_folder or root)], root)
        found = Found(classes, whole=whole, train_share=0.8 if train_folder else 0.0, by_index=by_index)
    return make_data(spec, options, task, found)


def _split_folders(root: Path) -> tuple[Path | None, Path | None]:
    """Return train/ and test/; a single folder of these names beside others is a class, such as trains."""
    folders = _visible_folders(root)
    names = [folder.name for folder in folders]
    train = root / "train" if "train" in names else None
    test = next((root / name for name in _TEST_NAMES if name in names), None)
    if (root / "labels.csv").exists() or ((train is None or test is None) and len(folders) > 1):
        return None, None
    return train, test


def _visible_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images_below(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def _list_images(root: Path) -> _Listing:
    if (root / "labels.csv").exists():
        return _read_list(root / "labels.csv")
    folders = _visible_folders(root)
    files: list[Path] = []
    names: list[str] = []
    for folder in folders:
        below = _images_below(folder)
        if not below:
            raise DataError(f"{folder}: the class folder has no images (JPEG, PNG, ...); remove or fill it")
        files += below
        names += [folder.name] * len(below)
    if not folders:
        if _images_below(root):
            raise DataError(
                f"{root}: has images, but no classes; put them into one folder per class, or add labels.csv with the "
                "columns file and label"
            )
        raise DataError(f"{root}: the folder is empty; it needs one folder of images per class")
    return _Listing(files, names)


def _read_list(path: Path) -> _Listing:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
            columns = list(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({error})") from error
    file_column = next((name for name in _FILE_COLUMNS if name in columns), None)
    name_column = next((name for name in _NAME_COLUMNS if name in columns), None)
    has_index = "class_index" in columns
    if file_column is None or (name_column is None and not has_index):
        raise DataError(
            f"{path}: needs a column 'file' and a column 'class_index' or 'label'; found {', '.join(columns) or 'none'}"
        )
    if not rows:
        raise DataError(f"{path}: names no images")
    files = [path.parent / row[file_column] for row in rows]
    missing = [position for position, file in enumerate(files) if not file.is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{path}, line {missing[0] + 2}: there is no file '{rows[missing[0]][file_column]}' in {path.parent}{more}"
        )
    if not has_index:
        return _Listing(files, [row[name_column or ""] for row in rows], is_csv=True)
    indices = [_class_index(path, line, row["class_index"]) for line, row in enumerate(rows, start=2)]
    name_column = "class_name" if "class_name" in columns else name_column
    names = [row[name_column] if name_column else row["class_index"] for row in rows]
    return _Listing(files, names, indices, is_csv=True)


def _class_index(path: Path, line: int, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise DataError(f"{path}, line {line}: class_index must be a whole number of at least 0, got '{text}'")
    return int(text)


def _check_same_classes(folder: Path, train: _Listing, test: _Listing) -> None:
    if train.indices is not None and test.indices is not None:
        return
    unknown = sorted(set(test.names) - set(train.names))
    if unknown:
        raise DataError(f"{folder}: class '{unknown[0]}' has no images to train on; the train folder lacks it")


def _labelled(listings: Sequence[_Listing], root: Path) -> tuple[tuple[str, ...], bool, list[Labelled]]:
    """Return the classes, whether labels are output indices, and the samples of each listing."""
    by_index = all(listing.indices is not None for listing in listings)
    if by_index:
        labels = torch.tensor([index for listing in listings for index in listing.indices or ()], dtype=torch.long)
        numbers = from_indices(str(root / "labels.csv"), labels)
        given = {i: name for part in listings for i, name in zip(part.indices or (), part.names, strict=True)}
        classes = tuple(given.get(index, number) for index, number in enumerate(numbers))
    else:
        names = [name for listing in listings for name in listing.names]
        # Class folders count alphabetically, also with numbers for names, as other loaders of them do.
        classes, labels = from_names(names, numeric=all(listing.is_csv for listing in listings))
    parts = torch.split(labels, [len(listing.files) for listing in listings])
    return classes, by_index, [_samples(part, own) for part, own in zip(listings, parts, strict=True)]


def _samples(listing: _Listing, labels: Tensor) -> Labelled:
    files = listing.files
    return Labelled(EncodedStore(files, lambda index: str(files[index])), labels)
