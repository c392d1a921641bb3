"""Randomness as a function of the seed and a place in the run, so that a resumed run repeats it."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for one named place of a run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator for one named place of a run."""
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, name))


def seed_everything(seed: int, name: str) -> None:
    """Seed Python, numpy and torch (all devices) for one named place of a run.

    Called before every transform and every training step: the random state is then a function of
    (seed, place), and a checkpoint needs to store none.
    """
    import numpy as np
    import torch

    value = derive_seed(seed, name)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - plugins and libraries may use numpy's global state
    torch.manual_seed(value)


def make_deterministic() -> None:
    """Ask torch for deterministic algorithms; operations that have none warn instead of failing."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
