"""Eval mode and gradients for a while, and what was before back again."""

from __future__ import annotations

import contextlib

import pytest
from torch import nn

from eff.modes import eval_mode, gradients_for


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def frozen_inside() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), nn.Dropout())
    model[0][1].eval()
    return model


def test_every_module_is_in_eval_mode_and_then_in_its_own_again():
    for model in (frozen_inside(), frozen_inside().eval()):
        model[0][0].train()  # in a model in eval mode: as Monte-Carlo dropout has it
        before = modes(model)
        with eval_mode(model):
            assert not any(modes(model))
        assert modes(model) == before


def test_the_modes_come_back_after_an_error():
    model = frozen_inside()
    before = modes(model)
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert modes(model) == before


def test_modules_that_do_something_when_the_mode_changes_are_told():
    class Merging(nn.Linear):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(1, 1))
    with eval_mode(model):
        assert model[0].merged
    assert not model[0].merged


@pytest.mark.parametrize("error", [False, True])
def test_only_the_wanted_parameters_ask_for_gradients_and_then_those_that_did(error):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    inside = {}
    with contextlib.suppress(KeyError), gradients_for(model, [model[0].weight, model[1].bias]):
        inside = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        if error:
            raise KeyError
    assert inside == {"0.weight": True, "0.bias": False, "1.weight": False, "1.bias": True}
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
