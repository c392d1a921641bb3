"""From `deanet:NAME?option=value` to a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from eff.errors import ModelError, did_you_mean, raise_problems
from eff.seeding import derive_seed
from eff_restore_deanet.network import SIZES, DEANet, DEANetOptions

if TYPE_CHECKING:
    from eff.run import Run
    from eff.schemas import ModelSpec


def build(spec: ModelSpec, run: Run) -> DEANet:
    """Return the network of a spec.

    Raises:
        ModelError: unknown size or option, or another task. Problems: several of them.
    """
    if run.task.name not in ("restoration", "none"):
        raise ModelError(f"{spec.source} restores images, the data is for {run.task.name}; use e.g. photos:PATH")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        return make_deanet(spec.name, **spec.options)


def make_deanet(size: str = "base", **options: Any) -> DEANet:
    """Return a DEA-Net, e.g. `make_deanet("tiny", branches="none")`.

    Raises:
        ModelError: unknown size or option, or a value out of range. Problems: several of them.
    """
    if size not in SIZES:
        raise ModelError(f"deanet:{size}: there is no such size{did_you_mean(size, SIZES)}; known: {', '.join(SIZES)}")
    try:
        return DEANet(DEANetOptions.model_validate({**SIZES[size], **options}))
    except ValidationError as error:
        raise_problems([_fault(size, item) for item in error.errors()])
        raise  # not reached: there is at least one error


def _fault(size: str, item: Any) -> ModelError:
    message = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return ModelError(f"deanet:{size}: {message}")
    option = str(item["loc"][0])
    known = list(DEANetOptions.model_fields)
    if item["type"] == "extra_forbidden":
        return ModelError(
            f"deanet:{size}: option '{option}' is unknown{did_you_mean(option, known)}; options are {', '.join(known)}"
        )
    return ModelError(f"deanet:{size}: {option}: {message[0].lower() + message[1:]}, got {item['input']!r}")
