"""Data `pictures:SOURCE`: the images of any source of labelled images under the task `tokenization`."""

from __future__ import annotations

from eff.data import Data, load_data
from eff.errors import DataError
from eff.schemas import DataSpec, TaskSpec


def load(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the images of e.g. `pictures:folder:PATH?size=64`, split as that source splits them.

    Raises:
        DataError: no source is named, or it has no images.
    """
    if not spec.location:
        raise DataError(f"data '{spec}': names no images; write e.g. pictures:PATH?size=64 or pictures:digits")
    inner = DataSpec.parse(spec.location).model_copy(update={"options": spec.options})
    known = {"input_shape": task.options["input_shape"]} if task is not None and "input_shape" in task.options else {}
    found = load_data(inner, TaskSpec(name="classification", options=known) if known else None)
    if found.task.name != "classification" or "input_shape" not in found.task.options:
        raise DataError(f"data '{spec}': {inner} has no images, it is for {found.task.name}")
    options = {"input_shape": found.task.options["input_shape"]}
    return Data(spec, TaskSpec(name="tokenization", options=options), found.train, found.test)
