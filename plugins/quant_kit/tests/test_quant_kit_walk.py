"""A walk gives what a pass through the whole network gives, bit for bit, and computes each layer a few times at most."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from eff.data import load_data
from eff.models import make_task
from eff.run import Run
from eff.session import Plugins
from eff_quant_kit.calibration import CalibrationSet
from eff_quant_kit.layers import execution_order
from eff_quant_kit.walk import Walk

SAMPLES, BATCH = 40, 16  # the last batch is smaller


@pytest.fixture(scope="module")
def run() -> Run:
    data = load_data("digits?seed=0")
    return Run(make_task(data.task, Plugins((), extensions=())), torch.device("cpu"), 0, data)


class InPlace(nn.Module):
    """A block whose activation changes its own input, which is read again."""

    def __init__(self, width: int):
        super().__init__()
        self.act, self.conv = nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(self.act(x)) + x


class Changing(nn.Module):
    """A block that changes what it is given; the caller reads that again."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.conv(x.mul_(0.5))


class Several(nn.Module):
    """Everything that cannot simply be replayed, and what can, in one network for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(inplace=True)
        )
        self.body = nn.Sequential(InPlace(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), InPlace(4))
        self.changing = Changing(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.left, self.right = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 6, 1)
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.place = nn.Embedding(8, 8)
        self.pair = Pair()
        self.head = nn.Linear(8, 10)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.body(self.stem(x))
        x = self.changing(x) + x
        x = self.shared(F.relu(self.shared(x)))
        x = torch.cat([self.left(x), self.right(x)], 1).flatten(2)  # (N, 8, 64)
        x = F.avg_pool1d(x, 8)
        x = self.second(torch.tanh(self.first(x))) + self.place(torch.arange(8))[None]
        x, rest = self.pair(x)
        return self.head(x.mean(1) + rest)


class Pair(nn.Module):
    """Returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x)
        return x, x.amax(1)


def walked(run: Run, model: nn.Module, order: list[str]) -> None:
    """Change layer after layer; compare each recording with one that keeps nothing."""
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        for name in order:
            rows, whole = walk.record(name), Walk(calibration, model).record(name)
            everything = slice(0, len(whole.inputs))
            assert torch.equal(rows.inputs.read(everything), whole.inputs.read(everything)), name
            assert torch.equal(rows.outputs.read(everything), whole.outputs.read(everything)), name
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(1.25)


def order_of(run: Run, model: nn.Module) -> list[str]:
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        batch = next(iter(calibration))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and n != "unused"}
        return list(execution_order(model, layers, lambda: run.forward(model.eval(), batch)))


def test_recordings_are_those_of_whole_passes(run):
    torch.manual_seed(0)
    model = Several()
    order = order_of(run, model)
    assert len(order) == 12
    walked(run, model, order)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]  # left as it was
    assert not [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]


BLOCKS = {
    "conv": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)),
    "bare": lambda: nn.Conv2d(4, 4, 1),
    "in place": lambda: InPlace(4),
    "changing": lambda: Changing(4),
    "norm": lambda: nn.BatchNorm2d(4),
    "identity": lambda: nn.Identity(),
    "relu": lambda: nn.ReLU(inplace=True),
}


@settings(deadline=None, max_examples=15)
@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5), nested=st.booleans())
def test_any_sequence_of_blocks(run, names, nested):
    torch.manual_seed(len(names))
    blocks = nn.Sequential(*(BLOCKS[name]() for name in names))
    body = nn.Sequential(blocks, nn.Sequential(InPlace(4), blocks[0])) if nested else blocks
    model = nn.Sequential(nn.Conv2d(1, 4, 1), body, nn.Flatten(), nn.Linear(256, 10))
    walked(run, model, order_of(run, model))


def test_each_layer_is_computed_a_few_times_however_deep_the_network(run):
    torch.manual_seed(0)
    depth = 12
    blocks = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(depth))
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(*blocks), nn.Flatten(), nn.Linear(256, 10))
    order = order_of(run, model)
    calls: Counter[str] = Counter()

    batches = -(-SAMPLES // BATCH)
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        walk.record(order[0]).drop()  # watches the network once, on two samples; not counted
        for name in order:
            layer = model.get_submodule(name)
            forward = layer.forward
            layer.forward = lambda x, name=name, forward=forward: (calls.update([name]), forward(x))[1]
        for name in order:
            walk.record(name).drop()
            assert len(list(calibration.folder.glob("*kept"))) <= 2, name  # the block before, and within the block
    # once when it is recorded and once when the next layer is; a pass per layer would be depth times
    assert set(calls) == set(order) and max(calls.values()) <= 2 * batches


class Bottleneck(nn.Module):
    """Three layers and a skip connection, called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.c(self.act(self.b(self.act(self.a(x))))) + x)


def test_only_outputs_that_are_used_again_are_kept(run):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Bottleneck(), Bottleneck(), nn.Flatten(), nn.Linear(256, 10))
    kept = {}
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        for name in order_of(run, model):
            walk.record(name).drop()
            names = {module: name for name, module in model.named_modules()}
            kept[name] = sorted(names[module] for module in walk._kept)
    assert kept["1.a"] == ["0"]
    assert kept["1.c"] == ["0", "1.b"]  # the skip connection; that of a is used by b alone
    assert kept["2.a"] == ["1"]
    assert kept["2.c"] == ["1", "2.b"]
    assert kept["4"] == ["2"]
    walked(run, model, order_of(run, model))


def test_going_back_begins_anew(run):
    torch.manual_seed(0)
    model = Several().eval()
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        walk.record("head")
        with torch.no_grad():
            model.stem[0].weight.mul_(2.0)
        rows = walk.record("body.0.conv").inputs.read(slice(0, SAMPLES))
        assert torch.equal(rows, Walk(calibration, model).record("body.0.conv").inputs.read(slice(0, SAMPLES)))


def test_layers_of_a_unit_that_is_not_done_are_not_kept(run):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), nn.Flatten())
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        walk.record("1.1", unit="1")
        with torch.no_grad():
            model[1][0].weight.mul_(2.0)
        rows = walk.record("1.1", unit="1").inputs.read(slice(0, SAMPLES))
        assert torch.equal(rows, Walk(calibration, model).record("1.1").inputs.read(slice(0, SAMPLES)))


def test_a_walk_that_is_dropped_sees_what_changed(run):
    torch.manual_seed(0)
    model = Several().eval()
    with CalibrationSet(run, SAMPLES, BATCH) as calibration:
        walk = Walk(calibration, model)
        walk.record("head").drop()
        walk.drop()
        assert not list(calibration.folder.glob("*kept"))
        with torch.no_grad():
            model.stem[0].weight.mul_(2.0)
        rows = walk.record("head").inputs.read(slice(0, SAMPLES))
        assert torch.equal(rows, Walk(calibration, model).record("head").inputs.read(slice(0, SAMPLES)))
