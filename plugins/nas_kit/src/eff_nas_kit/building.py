"""From a model source `nas:NAME` to a module: the macro networks at their largest, or a genotype's network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from eff.errors import ModelError, did_you_mean
from eff.run import Run
from eff.schemas import ModelSpec
from eff.seeding import derive_seed
from eff_nas_kit.layers import Selection
from eff_nas_kit.macro import DigitsMacroOptions, MacroNet, MacroOptions
from eff_nas_kit.space import Genotype, read_genotype
from eff_nas_kit.supernet import discretise, reset_weights

MACRO = {"conv_macro": MacroOptions, "digits_macro": DigitsMacroOptions}
GENOTYPE = "genotype"


def build(spec: ModelSpec, run: Run) -> nn.Module:
    """Return the module of a `nas:` source; initial weights are a function of the run's seed and the source.

    Raises:
        ModelError: unknown name or option, or a genotype that does not fit.
    """
    known = (*MACRO, GENOTYPE)
    if spec.name not in known:
        raise ModelError(
            f"{spec.source}: there is no such model{did_you_mean(spec.name, known)}; known: {', '.join(known)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, f"build_model/{spec.source}"))
        if spec.name == GENOTYPE:
            return reset_weights(build_genotype(_genotype_of(spec), run, _overrides(spec)))
        return MacroNet(_macro_options(spec, run))


def build_genotype(genotype: Genotype, run: Run, overrides: dict[str, Any] | None = None) -> nn.Module:
    """Return the chosen network; `overrides` replace options of the network before the search, e.g. num_classes."""
    from eff.models import build_model
    from eff.session import Plugins

    own = genotype.model.options
    changed = {key: value for key, value in (overrides or {}).items() if key in own}
    base = genotype.model.model_copy(update={"options": {**own, **changed}})
    model = build_model(base, run, Plugins())
    return discretise(model, Selection(genotype.space), genotype.chosen)


def _genotype_of(spec: ModelSpec) -> Genotype:
    """Return the genotype in the options; one read from a file is put there, so that a checkpoint keeps it."""
    if GENOTYPE in spec.options:
        try:
            genotype = Genotype.model_validate(spec.options[GENOTYPE])
        except ValidationError as error:
            first = error.errors()[0]
            raise ModelError(f"{spec.source}: {first['msg']} at {'.'.join(str(p) for p in first['loc'])}") from error
        genotype.check()
        return genotype
    if not isinstance(spec.options.get("file"), str):
        raise ModelError(f"{spec.source}: names no genotype; write nas:genotype?file=genotype.json")
    genotype = read_genotype(Path(str(spec.options.pop("file"))))
    spec.options[GENOTYPE] = genotype.model_dump(mode="json")
    return genotype


def _overrides(spec: ModelSpec) -> dict[str, Any]:
    return {key: value for key, value in spec.options.items() if key not in (GENOTYPE, "file")}


def _macro_options(spec: ModelSpec, run: Run) -> MacroOptions:
    kind = MACRO[spec.name]
    given = dict(spec.options)
    shape = run.task.spec.options.get("input_shape")
    if isinstance(shape, (list, tuple)):
        given.setdefault("image_size", max(shape[1:]))  # type: ignore[type-var]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            fields = list(kind.model_fields)
            raise ModelError(
                f"{spec.source}: option '{option}' is unknown{did_you_mean(option, fields)}; options are {', '.join(fields)}"
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        raise ModelError(f"{spec.source}: {option + ': ' if option else ''}{message}") from error
