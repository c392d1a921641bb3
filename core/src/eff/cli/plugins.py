"""Commands about plugins: list-plugins, info, verify, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from eff.cli.app import app

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command("list-plugins")
def list_plugins(
    family: Annotated[str | None, typer.Option(help="Only this family, e.g. quant.")] = None, as_json: AsJson = False
) -> None:
    """List installed plugins. Reads package metadata only; imports no plugin.

    Example: eff list-plugins --family quant
    """
    from eff.errors import RequestError, did_you_mean
    from eff.registry import EXTENSIONS, FAMILIES, METHODS, discover

    methods = discover(METHODS)
    families = {*FAMILIES, *(row.family for row in methods)}
    if family is not None and family not in families:
        raise RequestError(
            f"there is no family '{family}'{did_you_mean(family, families)}; known: {', '.join(sorted(families))}"
        )
    rows = [row for row in methods if family in (None, row.family)]
    if family is None:
        rows += discover(EXTENSIONS)
    if as_json:
        import json

        typer.echo(json.dumps([row.as_dict() for row in rows], indent=2))
        return
    from eff.cli.show import print_columns

    if not rows:
        typer.echo(
            "no plugins installed" + (f" in family {family}" if family else "") + "; try: pip install eff-quant-lsq"
        )
        return
    kinds = {METHODS: "", EXTENSIONS: "extension"}
    print_columns(
        ["name", "family", "version", "status", "summary"],
        [[row.name, kinds[row.group] or row.family, row.version, row.status, row.reason or row.summary] for row in rows],
    )  # fmt: skip


@app.command()
def info(
    plugin: Annotated[str, typer.Argument(help="Name of a method, e.g. quant_lsq.")],
    schema: Annotated[bool, typer.Option("--schema", help="Print the configuration as JSON Schema.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a method's card and its options.

    Example: eff info quant_lsq
    """
    from eff.cli.show import print_json, print_table
    from eff.options import option_rows
    from eff.registry import find, load_method

    row = find(plugin)
    method = load_method(plugin)
    card = method.card
    if schema:
        print_json(method.config_type().model_json_schema())
        return
    rows = option_rows(method.config_type())
    if as_json:
        print_json({**row.as_dict(), "card": card.model_dump(mode="json"), "options": rows})
        return
    facts = {
        "paper": f"{', '.join(card.authors)}: {card.title}. {card.venue} {card.year}",
        "read": f"{card.paper}  {card.url}",
        "version": f"{row.version} ({row.distribution})",
        "tasks": ", ".join(card.tasks),
        "needs": ", ".join(need.replace("_", " ") for need in card.needs) or "nothing",
        "exports": ", ".join(card.formats) or "core's formats",
        "composes with": "; ".join(card.composes_with),
        "conflicts with": ", ".join(card.conflicts_with),
        "notes": card.notes,
    }
    typer.echo(f"{plugin}: {row.summary}")
    print_table("", ["", ""], [[name, text] for name, text in facts.items() if text])
    print_table(
        "options (-o name=value)",
        ["name", "type", "default", "range", "meaning"],
        [list(line.values()) for line in rows],
    )
    for claim in method.claims:
        typer.echo(f"claim {claim.id}: {claim.statement} (eff verify {plugin}, about {claim.minutes:g} min)")


@app.command()
def verify(
    plugin: Annotated[str | None, typer.Argument(help="Name of a method.")] = None,
    all_plugins: Annotated[bool, typer.Option("--all", help="The claims of all installed methods.")] = False,
    claim: Annotated[str | None, typer.Option(help="Only this claim.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to use instead of the claim's, e.g. 0,1,2.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run what a paper promises, at desk scale, and say whether it holds. Exit code 1 where it does not.

    Example: eff verify quant_lsq
    """
    from eff.claims import verify as run_claims
    from eff.claims import verify_all
    from eff.cli.show import print_claims, print_json
    from eff.errors import InterruptedRunError, RequestError
    from eff.log import TerminalLog

    if (plugin is None) == (not all_plugins):
        raise RequestError("name one plugin, or give --all")
    try:
        chosen = [int(seed) for seed in seeds.split(",")] if seeds else None
    except ValueError as error:
        raise RequestError(f"--seeds {seeds}: write whole numbers with commas, e.g. 0,1,2") from error
    log = TerminalLog()
    skipped: list[str] = []
    results = []
    stopped = False
    if plugin is None:
        try:
            for found in verify_all(log):
                if isinstance(found, str):
                    skipped.append(found)
                else:
                    results.append(found)
        except KeyboardInterrupt:  # it may have taken many minutes; show what there is
            stopped = True
    else:
        results = run_claims(plugin, claim, chosen, log)
    if as_json:
        print_json(results)
    elif results:
        print_claims(results)
    else:
        typer.echo("no claims to run")
    for line in skipped:
        log.warn(f"left out: {line}")
    if stopped:
        raise InterruptedRunError("stopped before all claims had run")
    if skipped or any(not result.holds for result in results):
        raise typer.Exit(1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, Triton and every plugin. Exit code 1 where something is broken.

    Example: eff doctor
    """
    from eff.cli.show import print_json, print_table
    from eff.doctor import examine

    findings = examine()
    if as_json:
        print_json(findings)
    else:
        print_table(
            "", ["what", "state", "detail", "what to do"], [[f.what, f.state, f.detail, f.remedy] for f in findings]
        )
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
