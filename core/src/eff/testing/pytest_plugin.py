"""The pytest side of the contract kit: a test with the argument `eff_contract_check` runs once per check."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_generate_tests(metafunc: Any) -> None:
    """Make one test of each contract check for the module's EFF_PLUGIN."""
    if "eff_contract_check" not in metafunc.fixturenames:
        return
    from eff.testing.contract import CHECKS

    plugin = getattr(metafunc.module, "EFF_PLUGIN", None)
    if plugin is None:
        raise pytest.UsageError(
            f'{metafunc.module.__name__}: set EFF_PLUGIN = "<family>_<method>" for eff_contract_check'
        )
    metafunc.parametrize("eff_contract_check", [(plugin, name) for name in CHECKS], ids=list(CHECKS), indirect=True)


@pytest.fixture
def eff_contract_check(request: pytest.FixtureRequest) -> Any:
    """Return a function that runs one contract check and fails or skips as it came out."""
    from eff.testing.contract import run_check

    plugin, name = request.param

    def check() -> None:
        outcome = run_check(name, plugin)
        if outcome.state == "skipped":
            pytest.skip(outcome.detail)
        assert outcome.state == "passed", outcome.detail

    return check
