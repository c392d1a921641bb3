"""Recording a network's layers one after the other without computing what lies before them again.

What a layer-by-layer method reads is made by all the layers before. Running the network up to each layer costs
depth^2 / 2 layers; a walk keeps what came out of the modules that are done, in files, and each recording goes on from there:

    with CalibrationSet(run, samples=256, batch_size=32) as calibration:
        walk = Walk(calibration, quantized_model)
        for name in order:                                          # of the forward pass
            inputs = walk.record(name, outputs=False).inputs        # (N, ...)
            ...                                                     # change layer `name`; nothing before it

A kept output stands for its whole module, so what is kept is that of the largest finished modules: of whole blocks, and
of a `nn.Sequential` only that of the last finished child. Not kept, and so computed anew, is what cannot be replayed: the
output of a module that is called several times, shares parameters, changes its input in place, hands its input on or
returns anything but one tensor with a row per sample.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff.data import Batch, batch_size_of
from eff.errors import RunError, UnsupportedModelError
from eff.run import Run
from eff_quant_kit.calibration import CalibrationSet, Rows


class LayerRows:
    """Inputs of a layer and what it made of them, sample by sample."""

    def __init__(self, inputs: Rows, outputs: Rows | None):
        self.inputs = inputs
        self.outputs = outputs

    def drop(self) -> None:
        """Delete both files."""
        self.inputs.drop()
        if self.outputs is not None:
            self.outputs.drop()


class Walk:
    """Inputs and outputs of the layers of one model, in eval mode, in the order of its forward pass.

    What runs before a recorded layer must not change any more; if it does, as when another stage begins, `drop` the walk.
    A layer that lies before one that was recorded makes the walk begin anew by itself.
    """

    def __init__(self, calibration: CalibrationSet, model: nn.Module):
        self.calibration, self.model = calibration, model
        self._calls = _watch(model, calibration.run, next(iter(calibration)))
        self._kept: dict[nn.Module, Rows] = {}
        self._skipped: set[nn.Module] = set()
        self._place = slice(0)

    def record(self, name: str, inputs: bool = True, outputs: bool = True, unit: str | None = None) -> LayerRows:
        """Return inputs and outputs of one module over all samples.

        The forward pass ends at the module. A module that one pass calls several times gives the rows of all its calls.

        Args:
            name: the module.
            inputs, outputs: what is wanted; the other is left empty.
            unit: the module around it that is not done yet, so that nothing within it is kept; None: `name` itself.

        Raises:
            UnsupportedModelError: the pass never calls it, or with inputs of several sizes.
            RunError: NaN or infinity in what it is fed.
        """
        module = self.model.get_submodule(name)
        calls = self._calls[module]
        if not calls.count:
            raise UnsupportedModelError(f"{name}: the forward pass never reaches it; exclude it")
        if any(module in other.modules() for other in [*self._kept, *self._skipped]):
            self.drop()
        taken = self.calibration.new_rows(f"{name}.inputs")
        made = self.calibration.new_rows(f"{name}.outputs") if outputs else None

        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> None:
            x = arguments[0]
            if not bool(torch.isfinite(x).all()):
                raise RunError(f"{name}: its input holds NaN or infinity; check the data and the layers before it")
            if inputs:
                taken.append(x)
            if made is not None:
                made.append(output[0] if isinstance(output, tuple) else output)
            if calls.count == 1:
                raise _Reached

        with contextlib.ExitStack() as undo, torch.no_grad():
            undo.callback(self.model.train, self.model.training)
            self.model.eval()
            done = self._finished_before(calls, self.model.get_submodule(unit or name))
            for other in [*self._kept, *self._skipped]:
                undo.enter_context(_forward_of(other, self._replay(other)))
            fresh = {other: self.calibration.new_rows("kept") for other in self._not_there(done)}
            for other, rows in fresh.items():
                undo.callback(other.register_forward_hook(self._writer(rows)).remove)
            register = module.register_forward_hook if outputs else module.register_forward_pre_hook
            undo.callback(register(keep).remove)
            for batch in self._batches():
                with contextlib.suppress(_Reached):
                    self.calibration.run.forward(self.model, batch)
        self._settle(done, fresh)
        return LayerRows(taken, made)

    def drop(self) -> None:
        """Delete what is kept; the next recording begins at the network's inputs."""
        for rows in self._kept.values():
            rows.drop()
        self._kept, self._skipped = {}, set()

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches, and note which rows they are."""
        start = 0
        for batch in self.calibration:
            self._place = slice(start, start + batch_size_of(batch))
            yield batch
            start = self._place.stop

    def _finished_before(self, target: _Calls, unit: nn.Module) -> list[nn.Module]:
        """Return the outermost modules outside of `unit` whose outputs are there, and can be kept, when it is reached."""
        found: list[nn.Module] = []
        inside = set(unit.modules())
        for module in self.model.modules():
            calls = self._calls[module]
            if calls.keepable and calls.end < target.begin and module not in inside:
                found.append(module)
                inside.update(module.modules())
        return found

    def _not_there(self, done: list[nn.Module]) -> list[nn.Module]:
        """Return the finished modules whose outputs are wanted, and were not kept before."""
        readable = {*done}
        there = self._skipped.union(self._kept)
        return [module for module in done if module not in there and self._calls[module].reader not in readable]

    def _replay(self, module: nn.Module) -> Callable[..., Tensor]:
        if module in self._skipped:  # its only reader is replaced as well, and does not look at what it is given
            return lambda x: x
        rows, device = self._kept[module], self.calibration.run.device
        return lambda *_, **__: rows.read(self._place).to(device)

    def _writer(self, rows: Rows) -> Callable[..., None]:
        def write(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if len(output) == self._place.stop - self._place.start and (
                not rows.count or output.shape[1:] == rows.shape
            ):
                rows.append(output)

        return write

    def _settle(self, done: list[nn.Module], fresh: dict[nn.Module, Rows]) -> None:
        """Keep what the next pass replays, delete the rest."""
        there, self._kept, self._skipped = self._kept | fresh, {}, set()
        for module in reversed(done):  # a reader comes after what it reads
            reader = self._calls[module].reader
            if reader in self._kept or reader in self._skipped:
                self._skipped.add(module)
            elif module in there and len(there[module]) == len(self.calibration):
                self._kept[module] = there.pop(module)
            elif module in there:  # not a row per sample
                self._calls[module].keepable = False
        for rows in there.values():
            rows.drop()


class _Reached(Exception):
    """Ends a forward pass at the layer that was asked for."""


@dataclass
class _Calls:
    """How one forward pass calls a module; `begin` and `end` of the first call count the events of the pass."""

    count: int = 0
    begin: int = -1
    end: int = -1
    keepable: bool = False
    reader: nn.Module | None = None
    """The only module that is given the output, where that is certain."""


def _watch(model: nn.Module, run: Run, batch: Batch) -> dict[nn.Module, _Calls]:
    """Return how a forward pass calls each module."""
    found = {module: _Calls() for module in model.modules()}
    seen: dict[nn.Module, list[tuple[Tensor, int]]] = {}
    clock = itertools.count()

    def enter(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls = found[module]
        calls.count += 1
        if calls.count == 1:
            calls.begin = next(clock)
            given = [x for x in (*arguments, *named.values()) if isinstance(x, Tensor)]
            seen[module] = [(x, x._version) for x in given]

    def leave(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls = found[module]
        if calls.count == 1:
            calls.end = next(clock)
            calls.keepable = isinstance(output, Tensor) and output.ndim > 0 and not any(
                x._version != version or _share_memory(x, output) for x, version in seen.pop(module)
            )  # fmt: skip

    was_training = model.training
    model.eval()
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in found]
    handles += [module.register_forward_hook(leave, with_kwargs=True) for module in found]
    try:
        with torch.no_grad():
            run.forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    users = Counter(id(value) for module in found for value in module._parameters.values() if value is not None)
    for module, calls in found.items():
        inside = list(module.modules())
        shared = any(found[item].count > 1 for item in inside)
        tied = any(users[id(value)] > 1 for item in inside for value in item._parameters.values())
        calls.keepable = calls.keepable and not shared and not tied
        if type(module).forward is nn.Sequential.forward and calls.count == 1:
            for child, reader in itertools.pairwise(module):
                found[child].reader = reader
    return found


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand for that of one module."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
