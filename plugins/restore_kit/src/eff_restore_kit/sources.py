"""The data sources of restoration.

photos:PATH?degrade=haze         clear photos below PATH, degraded by eff; `photos` alone: samples of
                                 scikit-image and scikit-learn. PATH/train and PATH/test are splits;
                                 otherwise 20 % of the photos, chosen by seed, are for testing
pairs:PATH                       PATH/input and PATH/target (or hazy and clear, LR and HR, ...), with the
                                 same file names; or both below PATH/train and PATH/test; or files in one
                                 folder that end in _LR and _HR
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from eff.data import Data
from eff.data.options import ImageOptions, Size, read_options
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator
from eff_restore_kit.degradations import KINDS, Degradation
from eff_restore_kit.photos import Photo, PhotoStore, photos_below, sample_photos
from eff_restore_kit.splits import PairSplit, PhotoSplit

TEST_SHARE = 0.2
_TEST_NAMES = ("test", "val", "validation")
_INPUTS = ("input", "inputs", "degraded", "hazy", "noisy", "blur", "blurry", "rain", "rainy", "low", "lq", "lr")
_TARGETS = ("target", "targets", "clear", "clean", "gt", "groundtruth", "sharp", "norain", "high", "hq", "hr")


class RestorationDataOptions(ImageOptions):
    """Options that both sources share."""

    size: Size | None = Field((64, 64), description="N or HxW in pixels, each from 1 to 8192")
    test_size: Literal["crop", "whole"] = Field("crop", description="crop or whole")
    channels: Literal["1", "3"] = Field("3", description="1 (grey) or 3 (RGB)")


class PhotoOptions(RestorationDataOptions):
    """Options of `photos`; those of the degradation come on top."""

    degrade: Literal["haze", "noise", "bicubic"] = Field("haze", description="haze, noise or bicubic")


class PairOptions(RestorationDataOptions):
    """Options of `pairs`."""

    test_size: Literal["crop", "whole"] = Field("whole", description="crop or whole")


def load_photos(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return clear photos with a degradation.

    Raises:
        DataError: no photos, one that is too small, or a wrong option.
    """
    degradation, own = degradation_of(spec)
    root = Path(spec.location) if spec.location else None
    options = read_options(spec.model_copy(update={"options": own}), PhotoOptions, root)
    channels = _channels(options, task)
    photos = _photo_splits(root, options)
    splits: dict[str, Any] = {}
    for name, chosen in photos.items():
        size = options.size if name == "train" or options.test_size == "crop" else None
        if chosen:
            splits[name] = PhotoSplit(PhotoStore(chosen, channels), degradation, size, f"{options.seed}/{name}")
    made = task_of(options, channels, spec.options.get("degrade", "haze"), degradation.factor)
    return Data(spec, merged_task(spec, made, task), **splits)


def degradation_of(spec: DataSpec) -> tuple[Degradation, dict[str, str]]:
    """Return the degradation, and the options that are not its own."""
    kind = KINDS.get(spec.options.get("degrade", "haze"), KINDS["haze"])  # a wrong name is refused with the rest
    mine = {key: value for key, value in spec.options.items() if key in kind.model_fields}
    others = {key: value for key, value in spec.options.items() if key not in mine}
    try:
        return kind.model_validate(mine), others
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if not name:
            raise DataError(f"data '{spec}': {first['msg'].removeprefix('Value error, ')}") from error
        field = kind.model_fields[name]
        raise DataError(f"data '{spec}': {name} must be {field.description}, got '{mine[name]}'") from error


def _photo_splits(root: Path | None, options: PhotoOptions) -> dict[str, list[Photo]]:
    if root is None:
        found = {name: sample_photos(name) for name in ("train", "test")}
    else:
        if not root.is_dir():
            raise DataError(f"{root}: is a file; name the folder with the photos")
        train, test = root / "train", next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
        if train.is_dir() and test is not None:
            found = {"train": photos_below(train), "test": photos_below(test)}
        else:
            return _divided(str(root), photos_below(root), options)
    return {
        name: _first(f"{root or 'the sample photos'}", chosen, getattr(options, name), options.seed)
        for name, chosen in found.items()
    }


def _divided(where: str, photos: list[Any], options: ImageOptions) -> dict[str, list[Any]]:
    """Divide by seed: the asked numbers, else 20 % for testing; the test photos do not depend on `train`."""
    order = torch.randperm(len(photos), generator=named_generator(options.seed, "photos")).tolist()
    test = options.test
    if test is None:
        left = len(photos) - options.train if options.train is not None else len(photos)
        test = min(left, max(1, round(TEST_SHARE * len(photos))))
    train = options.train if options.train is not None else len(photos) - test
    if train < 0 or test < 0 or train + test > len(photos):
        wanted = " and ".join(f"{count} for {name}" for name in ("train", "test") if (count := getattr(options, name)))
        raise DataError(f"{where}: has {len(photos)} images, fewer than {wanted}")
    return {
        "train": [photos[index] for index in sorted(order[test : test + train])],
        "test": [photos[index] for index in sorted(order[:test])],
    }


def _first(where: str, photos: list[Any], count: int | None, seed: int) -> list[Any]:
    """Return `count` of the photos, chosen by seed."""
    if count is None:
        return photos
    if count > len(photos):
        raise DataError(f"{where}: has {len(photos)} images, {count} were asked for")
    order = torch.randperm(len(photos), generator=named_generator(seed, "photos")).tolist()
    return [photos[index] for index in sorted(order[:count])]


def load_pairs(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return degraded images with their targets from files.

    Raises:
        DataError: no pairs, an image without its partner, or sizes that do not fit.
    """
    root = Path(spec.location)
    options = read_options(spec, PairOptions, root)
    channels = _channels(options, task)
    train, test = root / "train", next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if train.is_dir() and test is not None:
        found = {
            name: _first(str(folder), _pairs_in(folder), getattr(options, name), options.seed)
            for name, folder in (("train", train), ("test", test))
        }
    else:
        groups: dict[Path, list[tuple[Path, Path]]] = {}  # all images of a target go to the same split
        for pair in _pairs_in(root):
            groups.setdefault(pair[1], []).append(pair)
        divided = _divided(str(root), list(groups.values()), options)
        found = {name: [pair for group in part for pair in group] for name, part in divided.items()}
    splits: dict[str, Any] = {}
    factors = set()
    for name, pairs in found.items():
        if not pairs:
            continue
        images, targets = (PhotoStore([Photo(pair[side]) for pair in pairs], channels) for side in (0, 1))
        factor = _factor(images, targets)
        factors.add(factor)
        size = options.size if name == "train" or options.test_size == "crop" else None
        splits[name] = PairSplit(images, targets, size, factor)
    if len(factors) > 1:
        raise DataError(f"data '{spec}': train and test have different scales, {' and '.join(map(str, factors))}")
    made = task_of(options, channels, "pairs", factors.pop() if factors else 1)
    return Data(spec, merged_task(spec, made, task), **splits)


def _pairs_in(root: Path) -> list[tuple[Path, Path]]:
    """Return (image, target) paths by target name; a target may have several images, such as 0001_0.8_0.2.png."""
    folders = {path.name.lower().replace("-", "").replace("_", ""): path for path in root.iterdir() if path.is_dir()}
    inputs = next((folders[name] for name in _INPUTS if name in folders), None)
    targets = next((folders[name] for name in _TARGETS if name in folders), None)
    if inputs is None or targets is None:
        return _suffixed_pairs(root)
    by_stem = {photo.path.stem: photo.path for photo in photos_below(targets)}
    pairs = []
    for photo in photos_below(inputs):
        stem = photo.path.stem
        while stem not in by_stem and "_" in stem:
            stem = stem.rpartition("_")[0]
        if stem not in by_stem:
            raise DataError(f"{photo.path}: has no target of the name {photo.path.stem} in {targets}")
        pairs.append((photo.path, by_stem[stem]))
    return pairs


def _suffixed_pairs(root: Path) -> list[tuple[Path, Path]]:
    files = {photo.path.stem: photo.path for photo in photos_below(root)} if any(root.iterdir()) else {}
    pairs = []
    for stem, path in files.items():
        if match := re.fullmatch(r"(.*[_-])(lr|lq|input|hazy)", stem, re.IGNORECASE):
            partner = next(
                (files[match[1] + end] for end in ("HR", "hr", "GT", "gt", "target") if match[1] + end in files), None
            )
            if partner is None:
                raise DataError(f"{path}: has no target beside it, such as {match[1]}HR{path.suffix}")
            pairs.append((path, partner))
    if not pairs:
        raise DataError(
            f"{root}: has no pairs; it needs the folders input and target (or hazy and clear, LR and HR, ...) with "
            "images of the same names"
        )
    return pairs


def _factor(images: PhotoStore, targets: PhotoStore) -> int:
    """Return the common ratio of the sides.

    Raises:
        DataError: a pair does not fit, or two pairs have different ratios.
    """
    factors = {}
    for index in range(len(images)):
        (h, w), (height, width) = images.size(index), targets.size(index)
        if height % h or width % w or height // h != width // w:
            raise DataError(
                f"{images.name(index)}: is {h}x{w}, its target {height}x{width}; sides must be equal or whole multiples"
            )
        factors[height // h] = index
    if len(factors) > 1:
        (a, first), (b, second) = list(factors.items())[:2]
        raise DataError(f"{images.name(first)} is for scale {a}, {images.name(second)} for scale {b}; use one scale")
    return next(iter(factors))


def _channels(options: RestorationDataOptions, task: TaskSpec | None) -> int:
    known = task.options.get("channels") if task else None
    return known if isinstance(known, int) else int(options.channels)


def task_of(options: RestorationDataOptions, channels: int, degradation: str, scale: int) -> TaskSpec:
    made: dict[str, Any] = {"channels": channels, "degradation": degradation, "scale": scale}
    if options.size is not None:
        made["size"] = list(options.size)
    return TaskSpec(name="restoration", options=made)


def merged_task(spec: DataSpec, made: TaskSpec, task: TaskSpec | None) -> TaskSpec:
    """Return the task: what the model's file says stands over what the data says.

    Raises:
        DataError: the model is for another task or another scale.
    """
    if task is None:
        return made
    if task.name != made.name:
        raise DataError(f"data '{spec}' is for restoration, the model's task is {task.name}; use other data")
    known = task.options.get("scale", made.options["scale"])
    if known != made.options["scale"]:
        raise DataError(
            f"data '{spec}' has scale {made.options['scale']}, the model {known}; use data of scale {known}"
        )
    return TaskSpec(name=made.name, options={**made.options, **task.options})
