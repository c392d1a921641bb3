"""Claim functions."""
from eff.claims import ClaimRun
def digits_macro(run: ClaimRun) -> dict[str, list[float]]:
    return {}
