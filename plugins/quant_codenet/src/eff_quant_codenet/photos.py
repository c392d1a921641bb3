"""Source `boxes`: a folder of photos with their boxes in a file.

boxes:PATH?size=256                  PATH is the folder, or the file of boxes in it. PATH/train and PATH/test (or val) with a
                                     file each are splits; otherwise 20 % of the photos, chosen by seed, are for testing
boxes.csv                            a header and a line per object: file,xmin,ymin,xmax,ymax,class; in pixels
annotations.json                     COCO: images (id, file_name), annotations (image_id, bbox, category_id), categories

Photos without a line have no objects. A photo is scaled to fit `size`, its sides' ratio kept, and filled up with grey on the
right or below. Boxes are cut to the photo; what has no area then is dropped and counted.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from eff.data import Data
from eff.data.images import SUFFIXES, native_shape, read_image
from eff.data.options import ImageOptions, Size, read_options
from eff.errors import DataError, did_you_mean
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator
from eff_quant_codenet.split import DetectionSplit, Objects, clean, make_data

COLUMNS = ("file", "xmin", "ymin", "xmax", "ymax", "class")
FILES = ("boxes.csv", "annotations.json")
TEST_SHARE = 0.2
FILLING = 0.5
_TEST_NAMES = ("test", "val", "validation")


class BoxOptions(ImageOptions):
    """Options of `boxes`."""

    size: Size | None = Field((256, 256), description="N or HxW in pixels, each from 1 to 8192")
    channels: Literal["1", "3"] = Field("3", description="1 (grey) or 3 (RGB)")


@dataclass
class Listed:
    """Photos of a folder with (left, top, right, bottom, class name) of their objects."""

    photos: dict[Path, list[tuple[float, float, float, float, str]]] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """Class names, sorted; numbers by their value."""
        names = {item[4] for objects in self.photos.values() for item in objects}
        return sorted(names, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))


def load(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the photos with their boxes.

    Raises:
        DataError: no photos or no file of boxes, a line that cannot be read, a class that the model does not know.
    """
    if not spec.location:
        raise DataError(f"data '{spec}': nothing named; write boxes:PATH")
    root = Path(spec.location)
    options = read_options(spec, BoxOptions, root)
    shape = _shape(options, task)
    parts = _parts(root, options)
    known = task.options.get("classes") if task is not None else None
    classes = [str(name) for name in known] if isinstance(known, (list, tuple)) else sorted_union(parts)
    if not classes:
        raise DataError(f"data '{spec}' has no objects at all; nothing can be learned or measured")
    splits = {name: _split(spec, part, shape, classes, name == "train") for name, part in parts.items() if part.photos}
    return make_data(spec, task, classes, splits, options.seed)


def sorted_union(parts: dict[str, Listed]) -> list[str]:
    """Return the class names of all parts."""
    return Listed({path: objects for part in parts.values() for path, objects in part.photos.items()}).classes


def _shape(options: BoxOptions, task: TaskSpec | None) -> tuple[int, int, int]:
    known = task.options.get("input_shape") if task is not None else None
    if isinstance(known, (list, tuple)):
        channels, height, width = (int(side) for side in known)
        return channels, height, width
    return (int(options.channels), *(options.size or (256, 256)))


def _parts(root: Path, options: BoxOptions) -> dict[str, Listed]:
    """Return the photos of each split that are asked for."""
    test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test is not None:
        found = {"train": read_listed(root / "train"), "test": read_listed(test)}
        for name, part in found.items():
            wanted = getattr(options, name)
            if wanted is not None:
                found[name] = _chosen(root, part, _order(part, options.seed)[:wanted], wanted)
        return found
    whole = read_listed(root)
    order, total = _order(whole, options.seed), len(whole.photos)
    count = (
        options.test
        if options.test is not None
        else min(max(1, round(TEST_SHARE * total)), total - (options.train or 0))
    )
    train = options.train if options.train is not None else total - count
    return {
        "train": _chosen(root, whole, order[count:][:train], train),
        "test": _chosen(root, whole, order[: max(count, 0)], count),
    }


def _order(listed: Listed, seed: int) -> list[int]:
    return torch.randperm(len(listed.photos), generator=named_generator(seed, "boxes")).tolist()


def _chosen(root: Path, listed: Listed, indices: list[int], wanted: int) -> Listed:
    if len(indices) != wanted:
        raise DataError(f"{root}: has {len(listed.photos)} photos, fewer than were asked for")
    paths = list(listed.photos)
    return Listed({paths[index]: listed.photos[paths[index]] for index in sorted(indices)})


def read_listed(root: Path) -> Listed:
    """Return the photos of a folder, or of the folder that a file of boxes lies in.

    Raises:
        DataError: there is no file of boxes, or it cannot be used.
    """
    file = root if root.is_file() else next((root / name for name in FILES if (root / name).exists()), None)
    if file is None:
        raise DataError(f"{root}: has neither {FILES[0]} ({','.join(COLUMNS)}) nor {FILES[1]} (COCO)")
    folder = file.parent
    photos = {path: [] for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}
    if not photos:
        raise DataError(f"{folder}: has no photos")
    listed = Listed(photos)
    for number, (name, *corners, label) in enumerate(_coco(file) if file.suffix == ".json" else _csv(file), 1):
        path = folder / name
        if path not in photos:
            raise DataError(f"{file}: object {number} is in '{name}', which is no photo below {folder}")
        listed.photos[path].append((*corners, label))  # type: ignore[arg-type]
    return listed


def _csv(file: Path) -> list[tuple[Any, ...]]:
    with open(file, encoding="utf-8", newline="") as opened:
        reader = csv.DictReader(opened)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise DataError(f"{file}: has no column '{missing[0]}'; the first line must be {','.join(COLUMNS)}")
        rows = []
        for row in reader:
            try:
                rows.append((row["file"], *(float(row[name]) for name in COLUMNS[1:5]), str(row["class"]).strip()))
            except (TypeError, ValueError) as error:
                raise DataError(f"{file}: line {reader.line_num}: a corner is no number ({error})") from error
    return rows


def _coco(file: Path) -> list[tuple[Any, ...]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {item["id"]: item["file_name"] for item in content["images"]}
        classes = {item["id"]: str(item["name"]) for item in content["categories"]}
        rows = []
        for item in content["annotations"]:
            left, top, width, height = (float(value) for value in item["bbox"])
            rows.append((names[item["image_id"]], left, top, left + width, top + height, classes[item["category_id"]]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: is no COCO file of boxes ({type(error).__name__}: {error})") from error
    return rows


def _split(spec: DataSpec, part: Listed, shape: tuple[int, int, int], classes: list[str], flip: bool) -> DetectionSplit:
    paths, objects, dropped = list(part.photos), [], 0
    for path in paths:
        rows = part.photos[path]
        unknown = next((row[4] for row in rows if row[4] not in classes), None)
        if unknown is not None:
            raise DataError(
                f"data '{spec}' has class '{unknown}' ({path.name}), which is none of the model's {len(classes)}"
                f"{did_you_mean(unknown, classes)}; it knows {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
            )
        height, width = native_shape(path, str(path))[1:]
        boxes, kept = clean(torch.tensor([row[:4] for row in rows]).view(-1, 4), height, width)
        dropped += int((~kept).sum())
        labels = torch.tensor([classes.index(row[4]) for row in rows], dtype=torch.long)
        objects.append(Objects(boxes[kept] * fitted_scale((height, width), shape[1:]), labels[kept]))
    mark = repr([(path.name, path.stat().st_size) for path in paths])
    return DetectionSplit(lambda index: read_fitted(paths[index], shape)[0], objects, shape, mark, flip, dropped)


def fitted_scale(native: tuple[int, int], wanted: tuple[int, int]) -> float:
    """Return the factor by which a photo (height, width) is scaled to fit."""
    return min(wanted[0] / native[0], wanted[1] / native[1])


def read_fitted(path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, float]:
    """Return a photo as (C, H, W) in [0, 1], scaled to fit and filled up with grey, and the scale.

    Raises:
        DataError: the file is no image.
    """
    channels, height, width = shape
    native = native_shape(path, str(path))[1:]
    scale = fitted_scale(native, (height, width))
    inner = min(height, max(1, round(native[0] * scale))), min(width, max(1, round(native[1] * scale)))
    whole = torch.full((channels, height, width), FILLING)
    whole[:, : inner[0], : inner[1]] = read_image(path, (channels, *inner))
    return whole, scale
