"""{{ cookiecutter.plugin }}: the equation, the claim and the contract."""

import pytest
import torch
from eff.claims import verify
from {{ cookiecutter.package }}.rounding import round_to_levels

EFF_PLUGIN = "{{ cookiecutter.plugin }}"


def test_contract(eff_contract_check):
    eff_contract_check()


def test_rounding_is_what_the_equation_says():
    weight = torch.tensor([[1.0, 0.4, -0.2], [0.0, 0.0, 0.0]])  # scales 1 and (floor)
    assert round_to_levels(weight, 2).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.claim
def test_the_claim_holds():
    assert all(result.holds for result in verify(EFF_PLUGIN))
