"""`eff bench-kernels`: every op beside the peers a user would pick instead, in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

BUFFERS = 4
"""Inputs that are rotated, so that one call's data is not in the caches for the next."""


@dataclass(frozen=True)
class Row:
    """One implementation of one op on one input."""

    op: str
    case: str
    implementation: str
    milliseconds: float
    ratio: float
    """Time over that of our own path."""
    of_bandwidth: float
    """Bytes that must move, per second, over the copy bandwidth measured in the same run."""


def bench_kernels(
    op: Annotated[str | None, typer.Option(help="Only this op, e.g. fake_quant.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    size: Annotated[int, typer.Option(help="Elements of the input.")] = 4_194_304,
    explain: Annotated[bool, typer.Option("--explain", help="Say which path each op takes and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure every op beside its installed peers, in one run.

    Example: eff bench-kernels --op fake_quant --explain
    """
    import json
    from dataclasses import asdict

    import torch

    from eff.cli.show import print_table
    from eff.errors import RequestError, did_you_mean
    from eff.runner import resolve_device
    from eff_kernels.dispatch import choose

    if op is not None and op not in OPS:
        raise RequestError(f"there is no op '{op}'{did_you_mean(op, OPS)}; known: {', '.join(OPS)}")
    target = resolve_device(device)
    if explain:
        for name in [op] if op else OPS:
            try:
                choice = choose(target, torch.float32)
            except ValueError as error:  # EFF_KERNELS asks for what there is not
                raise RequestError(str(error)) from error
            typer.echo(f"{name}: {choice.path} ({choice.reason})")
        return
    rows = [row for name in ([op] if op else OPS) for row in OPS[name](target, size)]
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print_table(
        f"{size:,} float32 elements on {target}, {torch.get_num_threads()} threads",
        ["op", "case", "implementation", "median ms", "over ours", "of copy bandwidth"],
        [
            [r.op, r.case, r.implementation, f"{r.milliseconds:.2f}", f"{r.ratio:.2f}", f"{100 * r.of_bandwidth:.0f} %"]
            for r in rows
        ],
        right=(3, 4, 5),
    )


def _median_ms(calls: list[Callable[[], Any]], device: Any) -> float:
    """Return the median time of calls that rotate through several buffers."""
    import itertools

    from eff.measure import time_calls

    rotation = itertools.cycle(calls)
    return time_calls(lambda: next(rotation)(), device, 1.0).median


def _fake_quant_rows(device: Any, size: int) -> list[Row]:
    import torch

    from eff_kernels.fake_quant import fake_quant

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator).to(device).requires_grad_() for _ in range(BUFFERS)]
    scale = torch.tensor(0.2, device=device, requires_grad=True)
    zero = torch.zeros(1, device=device)
    ones = torch.ones(size, device=device)

    def learnable(x: Any) -> Any:
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale.view(1), zero, -8, 7, 1.0)

    def detach_form(x: Any) -> Any:
        u = (x / scale).clamp(-8, 7)
        return ((u.round() - u).detach() + u) * scale

    implementations: dict[str, Callable[[Any], Any]] = {
        "eff": lambda x: fake_quant(x, scale, -8, 7),
        "torch learnable op": learnable,
        "autograd": detach_form,
        "torch.compile": torch.compile(detach_form),
    }
    target = torch.empty_like(inputs[0])
    copies = [lambda x=x: target.copy_(x.detach()) for x in inputs]
    bandwidth = 8 * size / _median_ms(copies, device)
    cases: dict[str, tuple[int, Callable[..., Any]]] = {
        "forward": (8 * size, lambda function, x: function(x.detach())),
        "forward + backward": (20 * size, lambda function, x: torch.autograd.grad(function(x), (x, scale), ones)),
    }
    rows = []
    for case, (moved, use) in cases.items():
        times = {}
        for name, function in implementations.items():
            try:
                times[name] = _median_ms([lambda x=x, f=function, u=use: u(f, x) for x in inputs], device)
            except Exception as error:  # torch.compile needs a C++ compiler
                typer.echo(f"{name} left out: {(str(error).splitlines() or [''])[0]}", err=True)
        rows += [
            Row("fake_quant", case, name, value, value / times["eff"], moved / value / bandwidth)
            for name, value in times.items()
        ]
    return rows


OPS: dict[str, Callable[[Any, int], list[Row]]] = {"fake_quant": _fake_quant_rows}
