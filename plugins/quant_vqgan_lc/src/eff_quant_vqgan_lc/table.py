"""The table E: cluster centres of pooled patch features, or features drawn at random, or what a file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eff.data import Split, ordered_batches
from eff.errors import ConfigError
from eff.log import Log
from eff.run import Run
from eff_quant_kit.codebooks import kmeans
from eff_quant_vqgan_lc.config import VQGANLCConfig
from eff_quant_vqgan_lc.model import PLUGIN

BATCH = 16
MADE = ("per_class", "kmeans", "random")
SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth")


@torch.no_grad()
def patch_features(
    split: Split, network: Callable[[Tensor], list[Tensor]], pool: int, device: torch.device, log: Log
) -> tuple[Tensor, Tensor]:
    """Return pooled patch features (images, patches, C) of a split and its labels (images,), 0 where it has none.

    Raises:
        ConfigError: `pool` is larger than the map.
    """
    features, labels = [], []
    batches = log.track(ordered_batches(split, BATCH), "features", total=-(-len(split) // BATCH))
    for batch in batches:
        found = network(batch["image"].to(device))[0]
        if pool > min(found.shape[-2:]):
            raise ConfigError(
                f"{PLUGIN}: pool is {pool}, the map of features {found.shape[-2]}x{found.shape[-1]}; use a smaller pool "
                "or a larger feature_size"
            )
        features.append(F.avg_pool2d(found, pool).flatten(2).transpose(1, 2).cpu())
        labels.append(batch.get("label", torch.zeros(len(found), dtype=torch.long)))
    return torch.cat(features), torch.cat(labels)


def make_table(config: VQGANLCConfig, run: Run, network: Callable[[Tensor], list[Tensor]] | None) -> Tensor:
    """Return E (n_codes, width) on the CPU; warns of vectors that are not finite, which are left out, and of equal rows.

    Args:
        network: gives the map of features; None: the table is in a file.

    Raises:
        ConfigError: there are fewer rows than n_codes, or the file cannot be used.
    """
    if network is None:
        rows = read_table(config.table)
        rows, dropped = rows[torch.isfinite(rows).all(1)], int((~torch.isfinite(rows).all(1)).sum())
    else:
        features, labels = patch_features(run.split("train"), network, config.pool, run.device, run.log)
        vectors, labels = features.flatten(0, 1), labels.repeat_interleave(features.shape[1])
        finite = torch.isfinite(vectors).all(1)
        rows, dropped = cluster(vectors[finite], labels[finite], config, run), int((~finite).sum())
    duplicates = len(rows) - len(rows.unique(dim=0)) if len(rows) else 0
    if dropped:
        run.warn(f"{PLUGIN}: {dropped} feature vectors of the table hold NaN or infinity and are left out")
    if duplicates:
        run.warn(f"{PLUGIN}: {duplicates} rows of the table repeat others; only one of equal rows can be used")
    if len(rows) < config.n_codes:
        way = "another file" if network is None else "more images, a smaller pool or more centres_per_class"
        raise ConfigError(
            f"{PLUGIN}: the table has {len(rows)} rows, n_codes asks for {config.n_codes}; lower it, or use {way}"
        )
    if len(rows) > config.n_codes:
        chosen = torch.randperm(len(rows), generator=run.generator(f"{PLUGIN}/rows"))[: config.n_codes]
        rows = rows[chosen.sort().values]
    return rows.contiguous()


def cluster(vectors: Tensor, labels: Tensor, config: VQGANLCConfig, run: Run) -> Tensor:
    """Return table rows of features (M, C) with labels (M,): by class as the paper does, over all, or drawn at random."""
    generator = run.generator(f"{PLUGIN}/table")
    if config.table == "random":
        return vectors[torch.randperm(len(vectors), generator=generator)[: config.n_codes]]
    if config.table == "kmeans":
        return _centres(vectors, config.n_codes, config, generator)
    classes = run.log.track(labels.unique().tolist(), "k-means by class")
    rows = [_centres(vectors[labels == label], config.centres_per_class, config, generator) for label in classes]
    return torch.cat(rows) if rows else vectors


def _centres(vectors: Tensor, count: int, config: VQGANLCConfig, generator: torch.Generator) -> Tensor:
    if len(vectors) <= count:  # each is its own centre
        return vectors
    return kmeans(vectors, count, config.kmeans_iters, generator)[0]


def read_table(text: str) -> Tensor:
    """Return the table (rows, width), float32, in a file.

    Raises:
        ConfigError: it is no such file, or holds no table.
    """
    path = Path(text)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{PLUGIN}: table '{text}' is none of {', '.join(MADE)}, and no file ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise ConfigError(f"{PLUGIN}: table: there is no file {path}")
    try:
        found = _read(path)
    except Exception as error:  # the readers raise many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{PLUGIN}: table {path}: cannot be read ({reason})") from error
    if found.ndim != 2 or not len(found):
        raise ConfigError(f"{PLUGIN}: table {path}: has shape {tuple(found.shape)}; it must be (rows, width)")
    return found.float()


def _read(path: Path) -> Tensor:
    if path.suffix in (".npy", ".npz"):
        import numpy as np

        loaded = np.load(path, allow_pickle=False)
        return torch.from_numpy(loaded[loaded.files[0]] if path.suffix == ".npz" else loaded)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content: Any = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    found: Tensor = next(iter(content.values())) if isinstance(content, dict) else content
    return found
