"""The contract test kit for plugin authors: `eff check`, or in pytest with

    EFF_PLUGIN = "quant_mine"

    def test_contract(eff_contract_check):
        eff_contract_check()

which becomes one test per check (the pytest plugin comes with eff-core).
"""

from eff.testing.contract import CHECKS, CheckOutcome, check_plugin, plugin_at, run_check

__all__ = ["CHECKS", "CheckOutcome", "check_plugin", "plugin_at", "run_check"]
