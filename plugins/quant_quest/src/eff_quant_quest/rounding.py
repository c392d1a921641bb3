"""Learned rounding before finetuning (Q-Diffusion's stage; AdaRound, Nagel et al., 2020).

w_hat = delta (clip(floor(w / delta) + h(V) + zp) - zp),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
loss = MSE of the layer's output + 0.01 sum(1 - |2 h - 1|^beta), beta from 20 to 2 after 20 % of the iterations
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff_quant_kit.diffusion.inputs import record_inputs
from eff_quant_kit.layers import QuantLayer
from eff_quant_quest.calibration import Calibrated

BATCH, LR, PENALTY, WARM_UP = 32, 1e-3, 0.01, 0.2


def soft_round(v: Tensor) -> Tensor:
    """Return h(V) in [0, 1]."""
    return (1.2 * v.sigmoid() - 0.1).clamp(0, 1)


def reconstruct(calibrated: Calibrated, iterations: int) -> None:
    """Replace each layer's weight by its learned rounding, on the float model's inputs of all timesteps."""
    path, generator = calibrated.path, calibrated.run.generator("quant_quest/rounding")
    for item in calibrated.operands:
        module = calibrated.model.get_submodule(item.name)
        if not isinstance(module, QuantLayer):
            continue
        parts = [
            record_inputs(calibrated.teacher, [item], x, t, path.labels)[item]
            for x, t in zip(path.x, path.t, strict=True)
        ]
        _reconstruct_layer(module, torch.cat(parts), iterations, generator)


def _reconstruct_layer(module: QuantLayer, inputs: Tensor, iterations: int, generator: torch.Generator) -> None:
    layer, quantizer = module.layer, module.weight_quantizer
    assert quantizer is not None and quantizer.offset is not None
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    shape = [-1] + [1] * (weight.ndim - 1)
    scale, offset = quantizer.scale.detach().view(shape), quantizer.offset.detach().view(shape)
    floor = ((weight - offset) / scale).floor()
    share = ((weight - offset) / scale - floor).clamp(1e-4, 1 - 1e-4)
    v = torch.logit((share + 0.1) / 1.2).requires_grad_(True)
    optimizer = torch.optim.Adam([v], LR)

    def output(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w) if isinstance(layer, nn.Linear) else layer._conv_forward(x, w, None)  # type: ignore[operator]

    for index in range(iterations):
        x = inputs[torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=generator)]
        h = soft_round(v)
        rounded = (floor + h).clamp(0, quantizer.q_max) * scale + offset
        loss = F.mse_loss(output(x, rounded), output(x, weight))
        progress = (index / iterations - WARM_UP) / (1 - WARM_UP)
        if progress >= 0:
            loss = loss + PENALTY * (1 - (2 * h - 1).abs().pow(20 - 18 * progress)).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        hard = (floor + (soft_round(v) >= 0.5)).clamp(0, quantizer.q_max) * scale + offset
        layer.weight.copy_(hard)  # type: ignore[operator]
