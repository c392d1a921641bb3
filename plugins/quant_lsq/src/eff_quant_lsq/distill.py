"""Distillation from the float model (paper, sec. 3.5: temperature 1, equal weights)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.data import Batch
from eff.run import Loss, Run


def with_teacher(loss: Loss, teacher: nn.Module, run: Run) -> Loss:
    """Return `loss` plus the cross entropy of the outputs to the teacher's, with equal weights."""

    def combined(model: nn.Module, batch: Batch) -> tuple[Tensor, Any]:
        hard, output = loss(model, batch)
        with torch.no_grad():
            target = run.forward(teacher, batch)
        return hard + F.cross_entropy(output, target.softmax(1)), output

    return combined


def keep_teacher(model: nn.Module) -> nn.Module:
    """Return a frozen copy of the model as it came."""
    teacher = copy.deepcopy(model).eval()
    return teacher.requires_grad_(False)
