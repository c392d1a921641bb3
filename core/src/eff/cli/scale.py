"""Commands that make many runs: sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from eff.cli.app import app
from eff.cli.runs import (
    Accumulate,
    Arch,
    AsJson,
    BatchSize,
    Data,
    Device,
    Epochs,
    LearningRate,
    Optimizer,
    OptimizerOption,
    PrecisionOption,
    Seed,
    TrustPickle,
    changed_recipe,
    train_options,
)

if TYPE_CHECKING:
    from eff.sweep import SweepResult
    from eff.sweep.plan import SweepPlan


@app.command()
def sweep(
    methods: Annotated[
        str, typer.Argument(metavar="METHOD[,METHOD...]", help="Methods in the order they are applied.")
    ],
    model: Annotated[str, typer.Argument(help="A model file, a run folder, or a source such as zoo:digits_cnn.")],
    space: Annotated[
        list[str] | None,
        typer.Option(
            "-s",
            "--space",
            help="What to search: name=2,3,4, name=uniform(a,b), loguniform(a,b), randint(a,b). "
            "Names: a method's options, then epochs, lr, ..., seed; method.name and train.name say whose.",
        ),
    ] = None,
    search: Annotated[
        Literal["grid", "random"] | None,
        typer.Option("--search", help="Unset: random where there is a distribution or --trials, else grid."),
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="How many settings a random search tries.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to judge by; unset: the first that is measured.")
    ] = None,
    cost: Annotated[
        str, typer.Option("--cost", help="What it is set against: size, parameters, latency, seconds or a metric.")
    ] = "size",
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="Option that all trials share: name=value.")
    ] = None,
    data: Data = None,
    arch: Arch = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = None,
    optimizer_option: OptimizerOption = None,
    accumulate: Accumulate = None,
    device: Device = None,
    precision: PrecisionOption = None,
    seed: Seed = None,
    export: Annotated[
        list[str] | None, typer.Option("--export", help="Formats each trial writes; unset: the method's own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the sweep; the same search in it goes on.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do trials that failed before anew.")] = False,
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster, e.g. ray://head:10001; unset: this machine.")
    ] = None,
    cpus: Annotated[int, typer.Option("--cpus", min=1, help="CPUs of a trial.")] = 1,
    gpus: Annotated[
        float | None,
        typer.Option("--gpus", min=0.0, help="GPUs of a trial, e.g. 0.5; unset: 1 where --device finds one."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, help="Trials at once on this machine; unset: by its CPUs.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials; touch nothing.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Search options of methods by grid or at random; a table and the Pareto front.

    Example: eff sweep quant_lsq digits -s weight_bits=2,3,4 -s act_bits=4,8
    """
    import functools

    from eff import runner
    from eff.cli.show import print_json
    from eff.errors import RequestError, RunError
    from eff.log import TerminalLog
    from eff.options import method_names, split_assignments
    from eff.schemas import Recipe
    from eff.sweep import SweepRequest, plan_sweep
    from eff.sweep import sweep as run_sweep
    from eff.sweep.on_ray import Resources, ray_pool

    names = method_names(methods)
    given = split_assignments(option or [], names)
    recipe = changed_recipe(
        Recipe(model=model), train_options(epochs, batch_size, lr, optimizer, optimizer_option, accumulate),
        data=data, arch=arch, device=device, precision=precision, seed=seed, export=export,
        trust_pickle=trust_pickle or None, methods=[{"name": name, "options": given[name]} for name in names],
    )  # fmt: skip
    if address is not None and parallel is not None:
        raise RequestError("--parallel is for this machine; with --address the cluster decides, see --cpus and --gpus")
    request = SweepRequest(recipe, tuple(space or ()), search, trials)
    folder = out or Path(f"{runner.default_out(model, recipe.methods)}-sweep")
    log = TerminalLog(quiet=as_json)
    plan = plan_sweep(request, log)
    if dry_run:
        _print_plan(plan, folder)
        return
    found_gpu = 1.0 if plan.first.device.type == "cuda" else 0.0
    resources = Resources(address, cpus, found_gpu if gpus is None else gpus, parallel)
    result = run_sweep(
        request, folder, functools.partial(ray_pool, resources),
        metric=metric, cost=cost, retry_failed=retry_failed, threads=cpus, log=log,
    )  # fmt: skip
    if as_json:
        print_json(result)
    else:
        _print_sweep(result, folder)
    if not result.of_state("done"):
        raise RunError(f"none of the {len(result.trials)} trials succeeded; their reasons stand in {folder}/sweep.json")


def _print_plan(plan: SweepPlan, folder: Path) -> None:
    from eff.cli.show import print_table

    names = [axis.name for axis in plan.axes]
    rows = [[trial.folder, *(trial.setting[name] for name in names)] for trial in plan.trials]
    print_table(f"{plan.definition.search} search, {len(rows)} trials", ["trial", *names], rows)
    typer.echo(f"  results go to {folder}")


def _print_sweep(result: SweepResult, folder: Path) -> None:
    """Print the trials best first, those on the front marked, and why others failed."""
    from eff.cli.show import metric_text, print_table
    from eff.sweep.results import CSV_FILE, FIGURE_FILE, SWEEP_FILE, best_first, figure_of

    names = list(result.trials[0].setting)
    shown = [name for name in dict.fromkeys((result.metric, result.cost)) if name is not None]
    right = range(1 + len(names), 1 + len(names) + len(shown))
    rows: list[list[object]] = []
    if result.before is not None:
        before = [metric_text(figure_of(result.before, name)) for name in shown]
        rows.append(["before", *("" for _ in names), *before, ""])
    for trial in best_first(result):
        setting = [trial.setting[name] for name in names]
        note = "front" if trial.on_front else trial.state if trial.state != "done" else ""
        rows.append([f"{trial.number:03d}", *setting, *(metric_text(trial.figure(name)) for name in shown), note])
    columns = ["trial", *(name.replace("_", " ") for name in (*names, *shown)), ""]
    print_table(", ".join(use.name for use in result.definition.recipe.methods), columns, rows, right=right)
    for trial in result.of_state("failed"):
        typer.echo(f"  {trial.folder} failed: {trial.reason}")
    files = [SWEEP_FILE, CSV_FILE, *([FIGURE_FILE] if result.of_state("done") else [])]
    typer.echo("  " + ", ".join(f"{folder}/{name}" for name in files))
