"""Running the claims of plugins: what a paper promises, measured at desk scale."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from eff.errors import PluginError, RequestError, RunError, did_you_mean
from eff.log import Log
from eff.method import Check, Claim
from eff.registry import discover, import_object, load_method
from eff.schemas import CheckResult, ClaimResult


@dataclass(frozen=True)
class ClaimRun:
    """What a claim's function is handed."""

    seeds: tuple[int, ...]
    log: Log

    def by_seed(self, description: str, measure: Callable[[int], Mapping[str, float]]) -> dict[str, list[float]]:
        """Return what `measure` gives for each seed, as a claim's function returns it; shows progress.

        Args:
            description: of the progress.
            measure: seed -> {setting: value}, the same settings for every seed.
        """
        measured: dict[str, list[float]] = {}
        for seed in self.log.track(self.seeds, description):
            for name, value in measure(seed).items():
                measured.setdefault(name, []).append(value)
        return measured


def verify(
    plugin: str, claim: str | None = None, seeds: Sequence[int] | None = None, log: Log | None = None
) -> list[ClaimResult]:
    """Run the claims of one plugin and judge them.

    Raises:
        PluginError: the plugin is missing or broken. RequestError: it has no such claim.
        RunError: a claim's function failed or did not measure what its checks name.
    """
    claims = load_method(plugin).claims
    if claim is not None:
        names = [item.id for item in claims]
        if claim not in names:
            raise RequestError(
                f"{plugin}: has no claim '{claim}'{did_you_mean(claim, names)}; known: {', '.join(names) or 'none'}"
            )
        claims = tuple(item for item in claims if item.id == claim)
    return [run_claim(plugin, item, tuple(seeds) if seeds else item.seeds, log or Log()) for item in claims]


def run_claim(plugin: str, claim: Claim, seeds: tuple[int, ...], log: Log) -> ClaimResult:
    """Run one claim over `seeds` and judge it by its checks."""
    function = import_object(claim.run, f"{plugin}: claim '{claim.id}'")
    log.info(f"verify {plugin}: {claim.id} ({len(seeds)} seeds, about {claim.minutes:g} min)")
    started = time.monotonic()
    measured: Mapping[str, Sequence[float]] = function(ClaimRun(seeds, log))
    seconds = time.monotonic() - started
    for name, values in measured.items():
        if len(values) != len(seeds):
            raise RunError(f"{plugin}: claim '{claim.id}': '{name}' has {len(values)} values for {len(seeds)} seeds")
    checks = tuple(judge(plugin, claim.id, check, measured) for check in claim.checks)
    return ClaimResult(
        plugin=plugin,
        id=claim.id,
        statement=claim.statement,
        paper=claim.paper,
        unit=claim.unit,
        units=claim.units,
        seeds=seeds,
        measured={name: list(values) for name, values in measured.items()},
        checks=checks,
        holds=all(check.holds for check in checks),
        seconds=seconds,
    )


def judge(plugin: str, claim: str, check: Check, measured: Mapping[str, Sequence[float]]) -> CheckResult:
    """Compare the means of the two sides; the spread of the paired differences is shown beside."""
    left = _values(plugin, claim, check.left, measured)
    right = _values(plugin, claim, check.right, measured) if isinstance(check.right, str) else [check.right] * len(left)
    differences = [a - b for a, b in zip(left, right, strict=True)]
    gap = statistics.fmean(differences)
    at_least = check.relation == "at_least"
    sign = "+" if check.margin >= 0 else "-"
    margin = f" {sign} {abs(check.margin):g}" if check.margin else ""
    return CheckResult(
        check=f"{check.left} {'>=' if at_least else '<='} {check.right}{margin}",
        left=statistics.fmean(left),
        right=statistics.fmean(right),
        gap=gap,
        spread=statistics.stdev(differences) if len(differences) > 1 else None,
        holds=gap >= check.margin if at_least else gap <= check.margin,
    )


def _values(plugin: str, claim: str, name: str, measured: Mapping[str, Sequence[float]]) -> list[float]:
    if name not in measured:
        raise RunError(f"{plugin}: claim '{claim}' checks '{name}', but its function measured {', '.join(measured)}")
    return list(measured[name])


def verify_all(log: Log | None = None) -> Iterator[ClaimResult | str]:
    """Run the claims of all methods; yields each result, or why a claim could not be run."""
    for row in discover():
        try:
            claims = load_method(row.name).claims
        except PluginError as error:
            yield f"{row.name}: {error}"
            continue
        for claim in claims:
            try:
                yield run_claim(row.name, claim, claim.seeds, log or Log())
            except Exception as error:  # whatever it is, the claims that have run are not lost
                yield f"{row.name}: claim '{claim.id}' could not be run: {error}"
