"""Dividing one data set among clients.

    dirichlet   for each class, shares p ~ Dir(alpha 1) of the clients (Hsu, Qi, Brown, arXiv:1909.06335; the
                per-class form of Yurochkin et al., ICML 2019): clients differ in labels and in size
    shards      sorted by label, cut into n_clients * shards pieces, dealt at random (McMahan et al., AISTATS 2017)
    iid         a random order, cut into parts of equal size

Each returns one index tensor per client; together they hold every sample once. A client may get none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from eff.errors import DataError
from eff.seeding import derive_seed

if TYPE_CHECKING:
    from eff.data import Split
    from eff_fl_kit.config import FederatedConfig

_LABEL_BATCH = 512


def dirichlet_parts(labels: Tensor, n_clients: int, concentration: float, random: np.random.Generator) -> list[Tensor]:
    """Divide each class by shares drawn from a symmetric Dirichlet law.

    Args:
        labels: (N,) integers.
        n_clients: number of parts.
        concentration: above 0; towards 0 a class lies with one client, towards infinity all get equal shares.
        random: source of randomness.
    """
    owner = np.empty(len(labels), dtype=np.int64)
    values = labels.numpy()
    for label in np.unique(values):
        members = random.permutation(np.flatnonzero(values == label))
        shares = random.dirichlet(np.full(n_clients, concentration))
        # Cut where the cumulated shares fall, so that rounding neither loses nor doubles a sample.
        ends = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        owner[members] = np.searchsorted(ends, np.arange(len(members)), side="right")
    return _parts_of(owner, n_clients)


def shard_parts(labels: Tensor, n_clients: int, shards: int, random: np.random.Generator) -> list[Tensor]:
    """Sort by label, cut into `n_clients * shards` nearly equal pieces and deal `shards` to each client."""
    order = random.permutation(len(labels))
    order = order[np.argsort(labels.numpy()[order], kind="stable")]
    pieces = np.array_split(order, n_clients * shards)
    owner = np.empty(len(labels), dtype=np.int64)
    for position, piece in enumerate(random.permutation(n_clients * shards)):
        owner[pieces[piece]] = position // shards
    return _parts_of(owner, n_clients)


def iid_parts(samples: int, n_clients: int, random: np.random.Generator) -> list[Tensor]:
    """Cut a random order into parts whose sizes differ by at most one."""
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(random.permutation(samples), n_clients)]


def _parts_of(owner: np.ndarray, n_clients: int) -> list[Tensor]:
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner, minlength=n_clients))[:-1]
    return [torch.from_numpy(part) for part in np.split(order, ends)]


def divide(split: Split, config: FederatedConfig, seed: int) -> list[Tensor]:
    """Return each client's sample indices as the options say; a function of data, options and seed alone.

    Raises:
        DataError: there are more clients (or shards) than samples, or the partition needs labels and there are none.
    """
    pieces = config.n_clients * (config.shards if config.partition == "shards" else 1)
    if pieces > len(split):
        what = f"{pieces} shards" if config.partition == "shards" else f"{pieces} clients"
        raise DataError(
            f"{len(split)} training samples cannot be divided into {what}; use a smaller n_clients or more data"
        )
    random = np.random.default_rng(derive_seed(seed, "fl/partition"))
    if config.partition == "iid":
        return iid_parts(len(split), config.n_clients, random)
    labels = labels_of(split, config.partition)
    if config.partition == "shards":
        return shard_parts(labels, config.n_clients, config.shards, random)
    return dirichlet_parts(labels, config.n_clients, config.dirichlet, random)


def labels_of(split: Split, partition: str) -> Tensor:
    """Return the label of every sample, (N,) int64.

    Raises:
        DataError: the samples have no labels.
    """
    known = getattr(split, "labels", None)
    if isinstance(known, Tensor) and known.shape == (len(split),):
        return known.cpu()
    found = []
    for start in range(0, len(split), _LABEL_BATCH):
        batch = split.batch(range(start, min(start + _LABEL_BATCH, len(split))))
        label = batch.get("label")
        if not isinstance(label, Tensor) or label.ndim != 1 or label.is_floating_point():
            raise DataError(
                f"partition={partition} needs one class label per sample, this data has none; use partition=iid"
            )
        found.append(label)
    return torch.cat(found).cpu()
