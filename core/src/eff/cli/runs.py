"""Commands that make a model: apply, train, compare, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource

from eff.cli.app import app

if TYPE_CHECKING:
    from eff.schemas import Recipe

Data = Annotated[
    str | None,
    typer.Option(
        "--data", help="Data source: digits, folder:PATH, PATH.parquet, hf:ID, PATH.npz; ?train=N&test=N&seed=N."
    ),
]
Arch = Annotated[
    str | None, typer.Option("--arch", help="Architecture for a bare state dict, e.g. zoo:cifar_resnet20.")
]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the training data; 0 trains nothing.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Samples per batch, over all devices.")]
Accumulate = Annotated[int | None, typer.Option("--accumulate", help="Batches whose gradients make one step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Initial learning rate.")]
Optimizer = Annotated[str | None, typer.Option("--optimizer", help="sgd, adam, adamw, or one an extension adds.")]
OptimizerOption = Annotated[
    list[str] | None,
    typer.Option("--optimizer-option", help="Argument of the optimizer: name=value, e.g. betas=0.9,0.99."),
]
Devices = Annotated[int | None, typer.Option("--devices", help="Processes that train data-parallel, one device each.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
Out = Annotated[Path | None, typer.Option("--out", help="Run folder for the results.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the results in --out.")]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Load pickled code. Only for files you made yourself.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def changed_recipe(recipe: Recipe, train: dict[str, Any], **changes: Any) -> Recipe:
    """Return the recipe with what the command line sets put over it; all faults are reported together."""
    from pydantic import ValidationError

    from eff.errors import ConfigError, RequestError, check_all, raise_problems
    from eff.runner import make_plan
    from eff.schemas import Recipe as RecipeSchema

    content = recipe.model_dump(mode="json", exclude_unset=True)
    content |= {key: value for key, value in changes.items() if value is not None}
    content["train"] = {**content.get("train", {}), **{key: value for key, value in train.items() if value is not None}}
    try:
        return RecipeSchema.model_validate(content)
    except ValidationError as error:
        faults: list[RequestError] = [
            ConfigError(
                f"--{str(fault['loc'][-1]).replace('_', '-')}: {fault['msg'][0].lower()}{fault['msg'][1:]}, got {fault['input']!r}"
            )
            for fault in error.errors()
        ]
        wrong = {str(fault["loc"][-1]) for fault in error.errors()}
        content["train"] = {key: value for key, value in content["train"].items() if key not in wrong}
        rest = {key: value for key, value in content.items() if key not in wrong}
        check_all(lambda: raise_problems(faults), lambda: make_plan(RecipeSchema.model_validate(rest)))
        raise


def train_options(
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    optimizer: str | None,
    optimizer_option: list[str] | None,
    accumulate: int | None,
) -> dict[str, Any]:
    from eff.options import read_assignments

    options = read_assignments(optimizer_option, "--optimizer-option") if optimizer_option else None
    return {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "optimizer": optimizer,
        "optimizer_options": options, "accumulate": accumulate,
    }  # fmt: skip


@app.command()
def apply(
    context: typer.Context,
    methods: Annotated[
        str | None, typer.Argument(metavar="METHOD[,METHOD...]", help="Methods in the order they are applied.")
    ] = None,
    model: Annotated[
        str | None, typer.Argument(help="A model file, a run folder, or a source such as zoo:digits_cnn.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("-o", "--option", help="Option of a method: name=value, or method.name=value.")
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
    devices: Devices = None,
    precision: PrecisionOption = None,
    seed: Seed = None,
    export: Annotated[
        list[str] | None, typer.Option("--export", help="Formats to write; unset: the method's own.")
    ] = None,
    out: Out = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", help="Repeat the run of a recipe.yaml; other options go over it.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on with the interrupted run in this folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and the plan; touch nothing.")] = False,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Apply methods to a model: measure, change, train, measure, export, report.

    Example: eff apply quant_lsq model.pt -o weight_bits=3 --epochs 4
    """
    from eff import runner
    from eff.errors import RequestError
    from eff.options import method_names, split_assignments
    from eff.schemas import Recipe

    if resume is not None:
        if given := _given_besides(context, "resume", "as_json"):
            raise RequestError(f"--resume takes everything from the run folder; leave out {', '.join(given)}")
        _run_and_print(lambda log: (runner.resume(resume, log=log), resume), as_json)
        return
    base = runner.read_recipe(recipe) if recipe else None
    if base is None and (methods is None or model is None):
        raise RequestError("name the methods and the model, e.g. eff apply quant_lsq model.pt, or give --recipe")
    if base is None:
        assert model is not None
        base = Recipe(model=model)
    content: dict[str, Any] = {}
    if methods is not None:
        content["methods"] = [{"name": name} for name in method_names(methods)]
    names = [use["name"] for use in content.get("methods", [use.model_dump() for use in base.methods])]
    if option:
        assigned = split_assignments(option, names)
        known = {use.name: use.options for use in base.methods}
        content["methods"] = [{"name": name, "options": {**known.get(name, {}), **assigned[name]}} for name in names]
    full = changed_recipe(
        base, train_options(epochs, batch_size, lr, optimizer, optimizer_option, accumulate),
        model=model, data=data, arch=arch, device=device, devices=devices, precision=precision, seed=seed,
        export=export, trust_pickle=trust_pickle or None, **content,
    )  # fmt: skip
    if not full.methods:
        raise RequestError("no method named; eff list-plugins shows what is installed")
    folder = out or runner.default_out(full.model, full.methods)
    if dry_run:
        plan = runner.make_plan(full)
        shown = full.model_copy(update={"train": plan.train})
        if as_json:
            steps = {"recipe": shown.model_dump(mode="json"), "plan": plan.steps(), "out": str(folder)}
            typer.echo(json.dumps(steps, indent=2))
            return
        typer.echo(runner.recipe_text(shown) + "# plan")
        for number, line in enumerate(plan.steps(), 1):
            typer.echo(f"#  {number}. {line}")
        typer.echo(f"# results go to {folder}")
        return
    _run_and_print(lambda log: (runner.apply(full, folder, force=force, log=log), folder), as_json)


def _given_besides(context: typer.Context, *names: str) -> list[str]:
    """Return what the command line gives besides the parameters of these names, as the user writes it."""
    return [
        parameter.opts[-1] if parameter.opts[0].startswith("-") else str(parameter.human_readable_name)
        for parameter in context.command.params
        if parameter.name not in (None, *names)
        and context.get_parameter_source(str(parameter.name)) is ParameterSource.COMMANDLINE
    ]


def _run_and_print(work: Any, as_json: bool) -> None:
    from eff.cli.show import print_json, print_report
    from eff.log import TerminalLog

    report, folder = work(TerminalLog(quiet=as_json))
    if as_json:
        print_json(report)
    else:
        print_report(report, str(folder))


@app.command()
def train(
    arch: Annotated[str, typer.Argument(help="Model source, e.g. zoo:digits_cnn or package.module:factory.")],
    data: Annotated[
        str, typer.Option("--data", help="Data source: digits, folder:PATH, PATH.parquet, hf:ID, PATH.npz.")
    ],
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    optimizer: Optimizer = None,
    optimizer_option: OptimizerOption = None,
    accumulate: Accumulate = None,
    device: Device = None,
    devices: Devices = None,
    precision: PrecisionOption = None,
    seed: Seed = None,
    export: Annotated[list[str] | None, typer.Option("--export", help="Formats to write besides model.pt.")] = None,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a plain model and write model.pt.

    Example: eff train zoo:digits_cnn --data digits --out digits
    """
    from eff import runner
    from eff.schemas import Recipe

    full = changed_recipe(
        Recipe(model=arch), train_options(epochs, batch_size, lr, optimizer, optimizer_option, accumulate),
        data=data, device=device, devices=devices, precision=precision, seed=seed, export=export,
    )  # fmt: skip
    folder = out or runner.default_out(arch, ())
    _run_and_print(lambda log: (runner.apply(full, folder, force=force, log=log), folder), as_json)


@app.command()
def compare(
    settings: Annotated[
        list[str], typer.Argument(metavar="METHOD[:name=value...]... MODEL", help="Settings, then the model.")
    ],
    data: Data = None,
    arch: Arch = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    device: Device = None,
    seed: Seed = None,
    export: Annotated[
        list[str] | None, typer.Option("--export", help="Formats of each setting whose method writes them.")
    ] = None,
    out: Out = None,
    force: Force = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Put one model through several methods or settings; a table and a plot of quality against size.

    Example: eff compare quant_lsq quant_lsq:weight_bits=2:act_bits=2 model.pt
    """
    from eff.cli.show import comparison_table, markdown_table, print_json, print_table
    from eff.compare import compare as run_comparison
    from eff.errors import RequestError
    from eff.files import write_text
    from eff.log import TerminalLog
    from eff.schemas import Recipe

    *methods, model = settings
    if not methods:
        raise RequestError("name at least one method and the model, e.g. eff compare quant_lsq model.pt")
    recipe = changed_recipe(
        Recipe(model=model), {"epochs": epochs, "batch_size": batch_size, "lr": lr},
        data=data, arch=arch, device=device, seed=seed, export=export, trust_pickle=trust_pickle or None,
    )  # fmt: skip
    folder = out or Path("comparison")
    result = run_comparison(methods, recipe, folder, force=force, log=TerminalLog(quiet=as_json))
    headers, rows = comparison_table(result)
    write_text(folder / "compare.md", markdown_table(headers, rows))
    if as_json:
        print_json(result)
        return
    settings_in_columns = [list(line) for line in zip(headers, *rows, strict=True)]
    print_table("", settings_in_columns[0], settings_in_columns[1:], right=range(1, len(rows) + 1))
    typer.echo(f"  {folder}/compare.png, {folder}/compare.md, {folder}/compare.json")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the demo's files.")] = Path("eff-demo"),
    force: Force = False,
) -> None:
    """Train a small classifier on real digits, quantize it to 4 bits, show before and after.

    Example: eff demo
    """
    from eff.demo import run_demo

    run_demo(out, force)
