"""What the method promises, measured."""

import torch

from {{ cookiecutter.package }}.rounding import round_to_levels


def error_falls_with_bits(run):
    """Return the relative rounding error of normal weights, per seed."""
    measured = {"bits_2": [], "bits_4": []}
    for seed in run.log.track(run.seeds, "error_falls_with_bits"):
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
        for bits in (2, 4):
            error = (round_to_levels(weight, bits) - weight).norm() / weight.norm()
            measured[f"bits_{bits}"].append(float(error))
    return measured
