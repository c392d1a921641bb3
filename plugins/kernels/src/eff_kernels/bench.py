"""`eff bench-kernels`: every op beside the peers a user would pick instead, in one run.

Each op package has a module `bench` with `cases(device)`. A case is one input: our call, the peers', what must move and be
computed at least. Correctness comes first; time is shown against the limits of the device, measured in the same run.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer

if TYPE_CHECKING:
    import torch

    from eff_kernels.dispatch import Choice

Calls = Sequence[Callable[[], Any]]
"""The same call on different buffers, so that one call's data is not in the caches for the next."""
T = TypeVar("T")
ROUNDS = 3
"""Every implementation is measured so often, in turns, so that a slow phase of the machine meets all."""
SAME = 0.05
"""Within this share of each other two times count as equal."""


class Made(NamedTuple):
    """What a library's peer consists of."""

    calls: Calls
    expected: Callable[[], Any] | None = None
    """What `calls[0]()` must give, where that is not the case's reference: the library has weights or codes of its own."""
    memory: int | None = None
    """Bytes, as `Case.memory` has them."""


class Library(NamedTuple):
    """A peer from a library that need not be installed."""

    module: str
    """Top-level package that it is in."""
    make: Callable[[], Made]
    """Imports the library and prepares the calls; may fail, e.g. where the device is none of the library's."""


@dataclass(frozen=True)
class Case:
    """One input of one op."""

    name: str
    ours: Calls
    peers: Mapping[str, Calls]
    choice: Choice
    moved: int = 0
    """Bytes that must be read and written at least."""
    flops: int = 0
    """Operations that must be done at least (a multiply-add is 2)."""
    dtype: str = "float32"
    """Of the matrix product whose rate limits the flops."""
    reference: Callable[[], Any] | None = None
    """What `ours[0]()` must give: a tensor, or a tuple of them."""
    tolerance: float = 1e-5
    """Largest difference from the reference, relative to its largest value."""
    memory: Mapping[str, int] = field(default_factory=dict)
    """Bytes that an implementation ("eff" or a peer) keeps or needs at most, where that is the point."""
    bounds: Mapping[str, Calls] = field(default_factory=dict)
    """Calls that do less than ours, to see what the rest costs; no peers."""
    libraries: Mapping[str, Library] = field(default_factory=dict)
    """More peers: measured where the library is installed, and only if the result is within `tolerance` too."""


@dataclass(frozen=True)
class Row:
    """One implementation of one op on one input."""

    op: str
    case: str
    implementation: str
    kind: str
    """ours, peer or bound."""
    milliseconds: float
    over_ours: float
    """Time over that of our own path: above 1, ours is faster."""
    of_limit: float | None
    """The least time the device allows, over this time."""
    memory: int | None
    path: str
    error: float | None
    """Of our result against the reference; of ours only."""


def buffers(make: Callable[[int], T], size: int, least: int = 2) -> list[T]:
    """Return make(0), make(1), ...: inputs of `size` bytes each, together beyond every cache (256 MiB), at most 32."""
    return [make(index) for index in range(min(32, max(least, -(-(256 << 20) // max(1, size)))))]


def ops() -> list[str]:
    """Return the names of all ops."""
    import eff_kernels

    return sorted(found.name for found in pkgutil.iter_modules(eff_kernels.__path__) if found.ispkg)


def bench_kernels(
    op: Annotated[str | None, typer.Option(help="Only this op, e.g. fake_quant.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time per implementation and case.")] = 0.6,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which path each op takes and why; measure nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
) -> None:
    """Measure every op beside its installed peers, in one run; exit code 1 when a result is wrong.

    Example: eff bench-kernels --op fake_quant --explain
    """
    import json

    import torch

    from eff.errors import RequestError, did_you_mean
    from eff.files import write_text
    from eff.runner import resolve_device

    known = ops()
    if op is not None and op not in known:
        raise RequestError(f"there is no op '{op}'{did_you_mean(op, known)}; known: {', '.join(known)}")
    target = resolve_device(device)
    chosen = [op] if op else known
    try:
        if explain:
            paths = [path for name in chosen for path in _paths(name, target)]
            if out is not None:
                write_text(out, json.dumps(paths, indent=2) + "\n")
            typer.echo(json.dumps(paths, indent=2) if as_json else "\n".join(map(_sentence, paths)))
            return
        limits = Limits.measure(target, seconds)
        rows = [
            row for name in chosen for case in _cases(name, target) for row in _measure(name, case, limits, seconds)
        ]
    except ValueError as error:  # EFF_KERNELS asks for what there is not
        raise RequestError(str(error)) from error
    text = json.dumps({"limits": limits.as_json(), "rows": [asdict(row) for row in rows]}, indent=2)
    if out is not None:
        write_text(out, text + "\n")
    if as_json:
        typer.echo(text)
    else:
        _show(rows, limits, torch.get_num_threads())
    if any(row.path == "wrong" for row in rows):
        raise typer.Exit(1)


def _cases(op: str, device: torch.device) -> Iterator[Case]:
    return iter(importlib.import_module(f"eff_kernels.{op}.bench").cases(device))


def _paths(op: str, device: torch.device) -> list[dict[str, str]]:
    return [
        {"op": op, "case": case.name, "path": case.choice.path, "reason": case.choice.reason}
        for case in _cases(op, device)
    ]


def _sentence(path: Mapping[str, str]) -> str:
    return f"{path['op']}, {path['case']}: {path['path']} ({path['reason']})"


@dataclass
class Limits:
    """What the device can do at most, measured."""

    device: torch.device
    seconds: float
    copy: float
    """Bytes read and written per second by a copy."""
    products: dict[str, float] = field(default_factory=dict)
    """Flops per second of a matrix product, per dtype."""

    @classmethod
    def measure(cls, device: torch.device, seconds: float) -> Limits:
        """Measure the copy; matrix products when they are asked for."""
        import torch

        size = 64 << 20
        pairs = [(torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)) for _ in range(4)]
        calls = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
        return cls(device, seconds, 2 * size / (1e-3 * _median_ms({"copy": calls}, device, seconds)["copy"]))

    def product_rate(self, dtype: str) -> float:
        """Return the flops per second of a large matrix product."""
        import torch

        if dtype not in self.products:
            n = 1024 if self.device.type == "cpu" else 8192
            kind = getattr(torch, dtype)
            if kind == torch.int8:
                a, b = (torch.ones(n, n, dtype=kind, device=self.device) for _ in range(2))
                calls: Calls = [lambda: torch._int_mm(a, b)]
            else:
                a, b = (torch.randn(n, n, device=self.device).to(kind) for _ in range(2))
                calls = [lambda: a @ b]
            time = _median_ms({"product": calls}, self.device, self.seconds)["product"]
            self.products[dtype] = 2 * n**3 / (1e-3 * time)
        return self.products[dtype]

    def least_ms(self, case: Case) -> float:
        """Return the time that moving and computing takes at least; 0 where a case does not say."""
        computing = case.flops / self.product_rate(case.dtype) if case.flops else 0.0
        return 1e3 * max(case.moved / self.copy, computing)

    def as_json(self) -> dict[str, Any]:
        """Return what is measured, with the device's model, date and versions."""
        import datetime

        import torch

        return {
            "device": device_name(self.device),
            "threads": torch.get_num_threads(),
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "copy_gb_s": self.copy / 1e9,
            "product_gflop_s": {dtype: rate / 1e9 for dtype, rate in self.products.items()},
        }


def device_name(device: torch.device) -> str:
    """Return the model of the GPU, or of the processor as the system names it."""
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:  # Linux, where platform.processor() has at most the architecture
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "model name"
    ]
    return next(filter(None, models), "") or platform.processor() or platform.machine()


def _median_ms(implementations: Mapping[str, Calls], device: torch.device, seconds: float) -> dict[str, float]:
    """Return the median time of each implementation, measured in turns; those that fail are left out."""
    import statistics

    times: dict[str, list[float]] = {}
    for name, calls in implementations.items():
        try:
            for call in calls[:2]:  # the first call compiles and loads
                call()
            times[name] = []
        except Exception as error:  # a peer lacks a compiler, a dtype or this device
            if name == "eff":
                raise
            _leave_out(name, error)
    for _ in range(ROUNDS):
        for name in times:
            times[name] += _sample(implementations[name], device, seconds / ROUNDS)
    return {name: statistics.median(found) for name, found in times.items()}


def _sample(calls: Calls, device: torch.device, seconds: float) -> list[float]:
    """Return times per call in ms: of single calls, on a GPU of as many as make the launch unimportant."""
    import time

    import torch

    rotation = itertools.cycle(calls)
    cuda = device.type == "cuda"
    together, found = 10 if cuda else 1, []
    end = time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 1000):
        started = time.perf_counter()
        if cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
        for _ in range(together):
            next(rotation)()
        if cuda:
            last.record()
            torch.cuda.synchronize(device)
            found.append(first.elapsed_time(last) / together)
        else:
            found.append(1e3 * (time.perf_counter() - started))
    return found


def _measure(op: str, case: Case, limits: Limits, seconds: float) -> list[Row]:
    error = None if case.reference is None else largest_error(case.ours[0](), case.reference())
    right = error is None or error <= case.tolerance
    made = dict(installed_peers(case))
    peers = {**case.peers, **{name: peer.calls for name, peer in made.items()}}
    memory = {**case.memory, **{name: peer.memory for name, peer in made.items()}}
    times = _median_ms({"eff": case.ours, **peers, **case.bounds}, limits.device, seconds)
    least = limits.least_ms(case)
    path = case.choice.path if right else "wrong"
    kinds = {"eff": "ours", **dict.fromkeys(case.bounds, "bound")}
    return [
        Row(
            op, case.name, name, kinds.get(name, "peer"), time, time / times["eff"], least / time if least else None, memory.get(name),
            path if name == "eff" else "", error if name == "eff" else None,
        )
        for name, time in times.items()
    ]  # fmt: skip


def installed_peers(case: Case) -> Iterator[tuple[str, Made]]:
    """Yield the peers of installed libraries that run here and give the right result; say of the others why not."""
    import importlib.util

    for name, library in case.libraries.items():
        if importlib.util.find_spec(library.module) is None:
            continue
        try:
            made = library.make()
            expected = made.expected or case.reference
            error = 0.0 if expected is None else largest_error(made.calls[0](), expected())
        except Exception as problem:  # the library lacks this device, a dependency, or has changed
            _leave_out(name, problem)
            continue
        if error <= case.tolerance:
            yield name, made
        else:
            typer.echo(f"{name} left out: its result differs by {error:.2g}, expected {case.tolerance:.2g}", err=True)


def _leave_out(name: str, problem: Exception) -> None:
    typer.echo(f"{name} left out: {(str(problem).splitlines() or [''])[0]}", err=True)


def largest_error(found: Any, expected: Any) -> float:
    """Return the largest difference of tensors, relative to the largest expected value; NaN counts as infinite."""
    import torch

    if isinstance(expected, tuple):
        return max(largest_error(one, other) for one, other in zip(found, expected, strict=True))
    found, expected = found.detach().double(), expected.detach().double()
    same = found == expected  # infinities that belong there
    difference = torch.where(same, 0.0, found - expected).abs().max()
    error = float(difference / expected[expected.isfinite()].abs().max().clamp(min=1e-30))
    return error if math.isfinite(error) else float("inf")


def verdict(rows: Sequence[Row]) -> str:
    """Say how ours stands against the best peer of a case: never a speed-up where it is slower."""
    peers = [row for row in rows if row.kind == "peer"]
    if any(row.path == "wrong" for row in rows):
        return "WRONG"
    if not peers:
        return ""
    best = min(peers, key=lambda row: row.milliseconds)
    if best.over_ours > 1 + SAME:
        return f"{best.over_ours:.2f}x faster than {best.implementation}"
    if best.over_ours < 1 - SAME:
        return f"slower: {1 / best.over_ours:.2f}x the time of {best.implementation}"
    return f"as fast as {best.implementation}"


def _show(rows: Sequence[Row], limits: Limits, threads: int) -> None:
    from eff.cli.show import print_table

    with_memory = any(row.memory is not None for row in rows)
    table = []
    for _, group in itertools.groupby(rows, key=lambda row: (row.op, row.case)):
        case = list(group)
        for index, row in enumerate(case):
            limit = "" if row.of_limit is None else f"{100 * row.of_limit:.0f} %"
            memory = [("" if row.memory is None else f"{row.memory / 1e6:.3g}")] if with_memory else []
            names = [row.op, row.case] if not index else ["", ""]
            table.append(
                [*names, row.implementation + (" (does less)" if row.kind == "bound" else ""), f"{row.milliseconds:.3g}", f"{row.over_ours:.2f}", limit, *memory,
                 verdict(case) if not index else ""]
            )  # fmt: skip
    rates = "".join(f", {kind} products {rate / 1e9:.0f} GFLOP/s" for kind, rate in limits.products.items())
    print_table(
        f"{device_name(limits.device)}, {threads} threads, copy {limits.copy / 1e9:.1f} GB/s{rates}",
        ["op", "case", "implementation", "median ms", "over eff", "of limit", *(["MB"] * with_memory), "eff is"],
        table,
        right=(3, 4, 5, 6) if with_memory else (3, 4, 5),
    )
