"""Data `diffusion_digits`: the digits of scikit-learn under the task `diffusion`."""

from __future__ import annotations

from eff.data import Data, load_data
from eff.schemas import DataSpec, TaskSpec


def load(spec: DataSpec, task: TaskSpec | None) -> Data:
    """Return the digits as `digits` splits them; options of the schedule come from the model where there is one."""
    digits = load_data(DataSpec(scheme="digits", options=spec.options))
    options = {"input_shape": [1, 8, 8], "classes": [str(digit) for digit in range(10)]}
    known = task.options if task is not None and task.name == "diffusion" else {}
    return Data(spec, TaskSpec(name="diffusion", options={**options, **known}), digits.train, digits.test)
