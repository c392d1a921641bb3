"""Recording a network's layers one after the other without computing what lies before them again.

What a layer-by-layer method reads is made by all the layers before. Running the network up to each layer costs
depth^2 / 2 layers; a walk keeps what came out of the modules that are done, in files, and each recording goes on from there:

    with CalibrationSet(run, samples=256, batch_size=32) as calibration:
        walk = Walk(calibration, quantized_model)
        for name in order:                                          # of the forward pass
            inputs = walk.record(name, outputs=False).inputs        # (N, ...)
            ...                                                     # change layer `name`; nothing before it

A kept output stands for its whole module, so kept are those of the largest finished modules (of whole blocks), and of these
only the ones that still bear on what comes: the input of the next block, a skip connection. Not kept, and so computed anew,
is what cannot be replayed: the output of a module that is called several times, shares parameters, changes its input in
place, hands its input on, or returns anything but one tensor with a row per sample.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eff.data import Batch, batch_size_of
from eff.errors import RunError, UnsupportedModelError
from eff.modes import eval_mode
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
        self._kept: dict[nn.Module, Rows] = {}
        self._skipped: set[nn.Module] = set()
        self._touched: set[int] = set()
        self._place = slice(0)

    @cached_property
    def _watch(self) -> _Watch:
        """What a forward pass does; found at the first recording, as a method may never record."""
        return _watch(self.model, self.calibration.run, next(iter(self.calibration)))

    @property
    def _calls(self) -> dict[nn.Module, _Calls]:
        return self._watch.calls

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
        unfinished = set(self.model.get_submodule(unit or name).modules())
        if any(other in unfinished or module in other.modules() for other in [*self._kept, *self._skipped]):
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
            undo.enter_context(eval_mode(self.model))
            done = self._finished_before(calls, unfinished)
            for other in [*self._kept, *self._skipped]:
                undo.enter_context(_forward_of(other, self._replay(other)))
            fresh = {
                other: self.calibration.new_rows("kept") for other in self._wanted(done) if other not in self._kept
            }
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

    def _finished_before(self, target: _Calls, unfinished: set[nn.Module]) -> list[nn.Module]:
        """Return the outermost finished modules whose outputs are there, and can be kept, when `target` is reached."""
        found: list[nn.Module] = []
        inside = set(unfinished)
        for module in self.model.modules():
            calls = self._calls[module]
            if calls.keepable and calls.end < target.begin and module not in inside:
                found.append(module)
                inside.update(module.modules())
        return found

    def _wanted(self, done: list[nn.Module]) -> list[nn.Module]:
        """Return the finished modules whose outputs bear on something if none of them runs."""
        live = self._watch.live({*done})
        return [module for module in done if self._calls[module].memory in live]

    def _replay(self, module: nn.Module) -> Callable[..., Tensor]:
        device = self.calibration.run.device
        if module in self._skipped:
            shape, dtype = self._calls[module].shape, self._calls[module].dtype
            # What is computed with it is not used; NaN, so that it could not be in silence.
            nothing = torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype, device=device)
            written = self._calls[module].memory in self._touched

            def hand_on(*_: Any, **__: Any) -> Tensor:
                values = nothing.expand(self._rows_now, *shape)
                return values.clone() if written else values  # an operation may write into it

            return hand_on
        rows = self._kept[module]
        return lambda *_, **__: rows.read(self._place).to(device)

    @property
    def _rows_now(self) -> int:
        """The samples of the current batch."""
        return int(self._place.stop - self._place.start)

    def _writer(self, rows: Rows) -> Callable[..., None]:
        def write(module: nn.Module, arguments: Any, output: Tensor) -> None:
            if len(output) == self._rows_now and (not rows.count or output.shape[1:] == rows.shape):
                rows.append(output)

        return write

    def _settle(self, done: list[nn.Module], fresh: dict[nn.Module, Rows]) -> None:
        """Keep what the next pass replays, delete the rest."""
        for module, rows in fresh.items():
            if len(rows) < len(self.calibration):  # not a row per sample
                self._calls[module].keepable = False
                rows.drop()
        there = {module: rows for module, rows in (self._kept | fresh).items() if len(rows)}
        replaced, wanted = done, self._wanted(done)
        while any(module not in there for module in wanted):  # those must run again, and what they use is wanted
            replaced = [module for module in replaced if module in there or module not in wanted]
            wanted = self._wanted(replaced)
        self._kept = {module: there.pop(module) for module in wanted}
        self._skipped = {*replaced} - {*wanted}
        self._touched = self._watch.touched({*replaced})
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
    """Whether the output can stand for the module."""
    shape: torch.Size = torch.Size()
    """Of the output for one sample."""
    dtype: torch.dtype = torch.float32
    memory: int = 0
    """Where the output was."""


class _Watch(TorchDispatchMode):
    """Notes when a forward pass calls each module, and what its operations read and write."""

    def __init__(self, model: nn.Module, samples: int):
        super().__init__()
        self.calls = {module: _Calls() for module in model.modules()}
        self.samples = samples
        self.results: set[int] = set()
        self._operations: list[tuple[tuple[nn.Module, ...], set[int], set[int]]] = []
        self._events = itertools.count()
        self._running: list[nn.Module] = []
        self._given: dict[nn.Module, list[tuple[Tensor, int]]] = {}
        self.alive: list[Tensor] = []  # or memory would be used again, and be taken for that of something else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.alive += made
        self._operations.append((tuple(self._running), _memories((args, kwargs)), _memories(made)))
        return result

    def live(self, replaced: set[nn.Module]) -> set[int]:
        """Return the memories that bear on the network's output if nothing runs within the modules `replaced`."""
        live = set(self.results)
        for running, read, written in reversed(self._operations):
            # what writes nothing, as reading a number does, may decide on anything
            if replaced.isdisjoint(running) and not (written and written.isdisjoint(live)):
                live |= read
        return live

    def touched(self, replaced: set[nn.Module]) -> set[int]:
        """Return the memories that operations outside of the modules `replaced` work on."""
        return {
            memory
            for running, read, written in self._operations
            if replaced.isdisjoint(running)
            for memory in read | written
        }

    def enter(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Be called before a module."""
        self._running.append(module)
        calls = self.calls[module]
        calls.count += 1
        if calls.count == 1:
            calls.begin = next(self._events)
            self._given[module] = [(x, x._version) for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]

    def leave(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Be called after a module."""
        self._running.pop()
        calls = self.calls[module]
        if calls.count > 1:
            return
        calls.end = next(self._events)
        given = self._given.pop(module)
        if isinstance(output, Tensor) and output.ndim and len(output) == self.samples:
            calls.shape, calls.dtype, calls.memory = output.shape[1:], output.dtype, _memory(output)
            calls.keepable = all(x._version == version and _memory(x) != calls.memory for x, version in given)


def _watch(model: nn.Module, run: Run, batch: Batch) -> _Watch:
    """Return what a forward pass on two samples does."""
    samples = min(2, batch_size_of(batch))
    watch = _Watch(model, samples)
    handles = [module.register_forward_pre_hook(watch.enter, with_kwargs=True) for module in watch.calls]
    handles += [module.register_forward_hook(watch.leave, with_kwargs=True) for module in watch.calls]
    few = {key: value[:samples] if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        with eval_mode(model), torch.no_grad(), watch:
            result = run.forward(model, few)
    finally:
        for handle in handles:
            handle.remove()
    watch.results = _memories(result)
    values = {module: [*module._parameters.values(), *module._buffers.values()] for module in watch.calls}
    owners = Counter(id(value) for own in values.values() for value in own if value is not None)
    for module, calls in watch.calls.items():
        # where a layer is used elsewhere too, it may change after the module is done
        shared = any(
            bool(values[item]) and (watch.calls[item].count > 1 or any(owners[id(value)] > 1 for value in values[item]))
            for item in module.modules()
        )
        calls.keepable = calls.keepable and calls.count == 1 and bool(watch.results) and not shared
    watch.alive.clear()
    return watch


def _memories(tree: Any) -> set[int]:
    return {_memory(x) for x in tree_leaves(tree) if isinstance(x, Tensor)}


def _memory(x: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return x.untyped_storage().data_ptr() if x.layout is torch.strided else 0


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
