"""What a run began with: the model's weights, the data and the options; a resumed run must go on with the same.

Where the model and the data lie, on which devices, and what is written along the way may differ from then; what decides
the result may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eff.errors import RequestError
from eff.files import STATE_FILE

if TYPE_CHECKING:
    from eff.models import OpenModel
    from eff.schemas import Recipe, TrainOptions
    from eff.session import Chosen

_LONGEST = 60
"""Characters of a value in a message."""


def state_fingerprint(state: Mapping[str, Any]) -> str:
    """Return a short hash of names, types, shapes and bytes of all tensors, one tensor in memory at a time."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            value = (value if value.layout == torch.strided else value.to_dense()).detach()
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def beginning_of(
    opened: OpenModel, recipe: Recipe, chosen: Sequence[Chosen], train: TrainOptions
) -> dict[str, dict[str, str]]:
    """Return what decides the result of a run, as plain text by name, for the resume file.

    Args:
        opened: the model, not yet changed, and the data.
        recipe: what was asked for.
        chosen: its methods, with their checked options.
        train: the resolved training options.

    Returns:
        Under "model" and "data" hashes and descriptions, under "options" each option with its value.
    """
    options: dict[str, Any] = {
        "methods": [item.name for item in chosen],
        "seed": recipe.seed,
        "precision": recipe.precision,
        "task": opened.task.spec.model_dump(mode="json"),
        **{f"train.{key}": value for key, value in train.model_dump(mode="json").items() if key != "checkpoint_every"},
    }
    for item in chosen:
        options |= {f"{item.name}.{key}": value for key, value in item.method.config.model_dump(mode="json").items()}
    model = {
        "weights": state_fingerprint(opened.model.state_dict()),
        "architecture": opened.spec.model_dump_json(),
        "earlier methods": json.dumps([item.applied().model_dump(mode="json") for item in opened.applied]),
    }
    if opened.spec.scheme == "pickle":  # names the file, which may have been moved
        del model["architecture"]
    data = {}
    if opened.data is not None:
        data = {"samples": opened.data.fingerprint(), "options": json.dumps(opened.data.spec.options, sort_keys=True)}
    return {
        "model": model,
        "data": data,
        "options": {key: json.dumps(value, sort_keys=True) for key, value in options.items()},
    }


def check_same_beginning(
    then: Mapping[str, Mapping[str, str]] | None, now: Mapping[str, Mapping[str, str]], recipe: Recipe, folder: Path
) -> None:
    """Raise where a run would be resumed with something else than it began with; nothing has been written.

    Args:
        then: `beginning_of` when the run began; None where the resume file has none.
        now: `beginning_of` today.
        recipe: of today, for the message.
        folder: the run folder.

    Raises:
        RequestError: it differs; everything that does is named.
    """
    if then is None:
        raise RequestError(f"{folder}: {STATE_FILE} was written by another version of eff; start anew with --force")
    named = {"model": recipe.model, "data": recipe.data or f"of {recipe.model}"}
    faults = [
        f"the {part} {named[part]} has other {' and '.join(different)}"
        for part in named
        if (different := [key for key in now[part] if now[part][key] != then[part].get(key)])
    ]
    before, after = then["options"], now["options"]
    faults += [
        f"{key} was {_short(before.get(key))} and is {_short(after.get(key))}"
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    if faults:
        raise RequestError(
            f"{folder}: cannot be resumed, it began otherwise: {'; '.join(faults)}; restore that, or start anew with --force"
        )


def _short(value: str | None) -> str:
    if value is None:
        return "unset"
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
