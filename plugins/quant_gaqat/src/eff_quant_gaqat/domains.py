"""Data of several domains, one of them held out: what domain generalisation is measured on.

`rotated_digits?target=-30`: scikit-learn's digits turned by -30, 0, 30 and 60 degrees. The affine matrix of angle a maps an output
pixel p (row, column) to c + [[cos a, -sin a], [sin a, cos a]] (p - c), c the centre; bilinear, zeros outside. Every domain
has the images of a quarter of each split of its own, so no image is seen at two angles.
`domains:PATH?target=NAME`: folders PATH/DOMAIN/CLASS/image; the target is held out whole.

A training batch takes as many samples of every source domain as it has indices; 20 % of every source are kept to choose by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from eff.data import Batch, Data, Split, load_data
from eff.errors import DataError, did_you_mean
from eff.schemas import DataSpec, TaskSpec
from eff.seeding import named_generator

ANGLES = (-30, 0, 30, 60)
VALIDATION_SHARE = 0.2


@dataclass(frozen=True)
class DomainData(Data):
    """Data whose train split mixes source domains and whose test split is the target."""

    target: str = ""
    validation: dict[str, Split] = field(default_factory=dict)
    """The held-out part of each source domain."""


class Part:
    """Some samples of a split."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.indices)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch."""
        return self.split.batch([self.indices[index] for index in indices], generator)

    def fingerprint(self) -> str:
        """Return that of the whole split with the number of samples."""
        return f"{self.split.fingerprint()}/{len(self.indices)}"


class Turned(Part):
    """Some images of a split, turned."""

    def __init__(self, split: Split, indices: Sequence[int], degrees: float):
        super().__init__(split, indices)
        self.degrees = degrees

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch."""
        batch = super().batch(indices, generator)
        return {**batch, "image": rotate(batch["image"], self.degrees)}

    def fingerprint(self) -> str:
        """Return that of the images with the angle."""
        return f"{super().fingerprint()}/{self.degrees}"


class Sources:
    """Source domains side by side: each index gives one sample of every domain."""

    def __init__(self, domains: Sequence[Split]):
        self.domains = list(domains)

    def __len__(self) -> int:
        """Return the samples of the smallest domain."""
        return min(len(domain) for domain in self.domains)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return as many samples of every domain as there are indices, one domain after the other."""
        parts = [domain.batch(indices, generator) for domain in self.domains]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    def fingerprint(self) -> str:
        """Return those of the domains."""
        return "+".join(domain.fingerprint() for domain in self.domains)


def rotate(images: Tensor, degrees: float) -> Tensor:
    """Return images (N, C, H, W) turned about their centre, bilinear, zeros outside."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0]])  # affine_grid counts columns before rows
    grid = torch.nn.functional.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=True)
    return torch.nn.functional.grid_sample(images, grid, align_corners=True)


def rotated_digits(spec: DataSpec, task: TaskSpec | None) -> DomainData:
    """Return turned digits with one angle held out.

    Raises:
        DataError: no such angle, or an option that is not target or seed.
    """
    options = dict(spec.options)
    target, seed = options.pop("target", ""), int(options.pop("seed", "0"))
    _only(spec, options)
    names = [str(angle) for angle in ANGLES]
    _check_target(spec, target, names)
    whole = load_data(f"digits?seed={seed}", task)
    train: dict[str, Split] = {}
    test: dict[str, Split] = {}
    for place, (name, angle) in enumerate(zip(names, ANGLES, strict=True)):
        for found, split in ((train, whole.split("train")), (test, whole.split("test"))):
            found[name] = Turned(split, range(place, len(split), len(names)), angle)
    pooled: dict[str, Split] = {name: Joined(train[name], test[name]) for name in names}
    return _leave_one_out(spec, whole.task, pooled, target, seed)


def load_folders(spec: DataSpec, task: TaskSpec | None) -> DomainData:
    """Return folders of images by domain with one domain held out.

    Raises:
        DataError: fewer than three domains, no such target, or domains with different classes.
    """
    options = dict(spec.options)
    target, seed = options.pop("target", ""), int(options.pop("seed", "0"))
    _only(spec, options)
    root = Path(spec.location)
    names = sorted(item.name for item in root.iterdir() if item.is_dir()) if root.is_dir() else []
    _check_target(spec, target, names)
    domains: dict[str, Split] = {}
    for name in names:
        data = load_data(f"folder:{root / name}?train=0", task)
        task = task or data.task
        if data.task.options.get("classes") != task.options.get("classes"):
            raise DataError(f"data '{spec}': domain '{name}' has other classes than '{names[0]}'")
        domains[name] = data.split("test")
    assert task is not None
    return _leave_one_out(spec, task, domains, target, seed)


def _only(spec: DataSpec, rest: dict[str, str]) -> None:
    if rest:
        raise DataError(f"data '{spec}': option '{next(iter(rest))}' is unknown; known are target and seed")


def _check_target(spec: DataSpec, target: str, names: list[str]) -> None:
    if not target:
        raise DataError(f"data '{spec}': name the domain to hold out, ?target=NAME; domains are {', '.join(names)}")
    if target not in names:
        raise DataError(
            f"data '{spec}': no domain '{target}'{did_you_mean(target, names)}; there are {', '.join(names)}"
        )
    if len(names) < 3:
        raise DataError(
            f"data '{spec}': {len(names) - 1} source domain is left beside '{target}'; at least 2 are needed"
        )


class Joined:
    """Two splits one after the other."""

    def __init__(self, first: Split, second: Split):
        self.first, self.second = first, second

    def __len__(self) -> int:
        """Return the samples of both."""
        return len(self.first) + len(self.second)

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> Batch:
        """Return samples as one batch, in the order asked for."""
        border = len(self.first)
        early = [place for place, index in enumerate(indices) if index < border]
        late = [place for place, index in enumerate(indices) if index >= border]
        parts = []
        if early:
            parts.append(self.first.batch([indices[place] for place in early], generator))
        if late:
            parts.append(self.second.batch([indices[place] - border for place in late], generator))
        back = torch.tensor(early + late).argsort()
        return {key: torch.cat([part[key] for part in parts])[back] for key in parts[0]}

    def fingerprint(self) -> str:
        """Return those of both."""
        return f"{self.first.fingerprint()}|{self.second.fingerprint()}"


def _leave_one_out(spec: DataSpec, task: TaskSpec, domains: dict[str, Split], target: str, seed: int) -> DomainData:
    train, validation = [], {}
    for name, split in domains.items():
        if name == target:
            continue
        order = torch.randperm(len(split), generator=named_generator(seed, f"domains/{name}")).tolist()
        kept = max(1, round(VALIDATION_SHARE * len(split)))
        validation[name] = Part(split, order[:kept])
        train.append(Part(split, order[kept:]))
    return DomainData(spec, task, Sources(train), domains[target], target=target, validation=validation)
