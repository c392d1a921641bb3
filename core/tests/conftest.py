"""Fixtures for core's tests: the tiny model and data, and made-up installed plugins."""

import os
import signal
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch

from eff import registry
from eff.log import Log
from eff.schemas import Recipe, TrainOptions
from eff.testing.samples import DATA, MODEL


@pytest.fixture
def recipe():
    """Two epochs of the tiny model: 8 steps."""
    return Recipe(model=MODEL, data=DATA, train=TrainOptions(epochs=2, batch_size=64), device="cpu")


class StopAt(Log):
    """Sends this process a Ctrl-C after some training steps."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    @contextmanager
    def progress(self, description, total):
        count = 0

        def advance(steps=1, note=""):
            nonlocal count
            count += steps
            if description == "train" and count == self.step:
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


@pytest.fixture
def stop_at():
    """Return a log that interrupts the run after so many training steps."""
    return StopAt


@pytest.fixture
def weights():
    """Return a function that reads the tensors of a run folder's model."""
    return lambda folder: torch.load(folder / "model.pt", weights_only=True)["state_dict"]


@pytest.fixture
def same():
    """Return a function that compares two state dicts bit for bit."""
    return lambda left, right: left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that puts a distribution with one plugin on the path."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    made = []

    def make(
        name,
        code,
        *,
        distribution=None,
        keywords="eff,eff-api-1",
        requires=("eff-core>=0.1,<1",),
        group="eff.plugins",
        target=None,
    ):
        distribution = distribution or "dummy-" + name.replace("_", "-")
        module = "made_" + distribution.replace("-", "_")
        made.append(module)
        (site / f"{module}.py").write_text(textwrap.dedent(code))
        info = site / f"{distribution.replace('-', '_')}-0.3.dist-info"
        info.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {distribution}",
            "Version: 0.3",
            f"Summary: about {name}",
            f"Keywords: {keywords}",
        ]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target or module + ':Made'}\n")
        registry.forget_discovered()
        return module

    yield make
    for module in made:
        sys.modules.pop(module, None)
    registry.forget_discovered()


@pytest.fixture
def method_code():
    """Return the source of a small method; hooks are put in as text."""

    def code(hooks="", config="strength: int = Field(3, ge=1, le=9, description='How much.')"):
        head = """
from eff.method import Card, Field, Method, MethodConfig, hookimpl

class MadeConfig(MethodConfig):
    {config}

class Made(Method[MadeConfig]):
    card = Card(title="T", authors=("A",), venue="V", year=2020, paper="none", url="none", needs=("train_data",))
"""
        return head.format(config=config) + textwrap.indent(textwrap.dedent(hooks), "    ")

    return code
