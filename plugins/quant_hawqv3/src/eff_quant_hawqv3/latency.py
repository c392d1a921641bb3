"""What each layer takes on this device at 4 and at 8 bits: the table that constraint=latency asks for.

Timed is one product of the shared kernels, windows gathered before; 4-bit weights are unpacked first, because no 4-bit
product exists on CPUs or in the shared kernels. So 4 bits come out slower here; a device with such products has another
table, which `latency_table` takes as well.
"""

from __future__ import annotations

import torch

from eff.measure import time_calls
from eff_kernels.int_matmul import longest_sum, scaled_int_matmul
from eff_kernels.packing import pack_bits, unpack_bits
from eff_quant_hawqv3.network import Network

SECONDS = 0.02
"""Per layer and width."""


def measure_layers(
    net: Network, shapes: dict[str, tuple[int, ...]], device: torch.device
) -> dict[str, dict[str, float]]:
    """Return {layer: {"4": ms, "8": ms}} of one sample, in milliseconds; layers with sums too long for 8 bits are left out.

    Args:
        net: the network.
        shapes: layer -> shape of its output with one sample, (1, O, H, W) or (1, O).
        device: where to time.
    """
    found: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        layer = net.layer(name)
        groups = 1 if layer.conv is None else layer.conv["groups"]
        outputs, inside = layer.weight.shape[0] // groups, layer.weight[0].numel()
        rows = max(1, int(torch.Size(shape[2:]).numel()))
        if inside > longest_sum(torch.int8):
            continue
        x = torch.ones(rows, inside, dtype=torch.int8, device=device)
        weight = torch.ones(outputs, inside, dtype=torch.int8, device=device)
        scale = torch.ones(outputs, device=device)
        packed = pack_bits(weight.long(), 4)

        def eight(x: torch.Tensor = x, weight: torch.Tensor = weight, scale: torch.Tensor = scale) -> None:
            scaled_int_matmul(x, weight, scale)

        def four(
            x: torch.Tensor = x,
            packed: torch.Tensor = packed,
            weight: torch.Tensor = weight,
            scale: torch.Tensor = scale,
        ) -> None:
            codes = (unpack_bits(packed, 4, weight.numel()).to(torch.int8) - 8).view_as(weight)
            scaled_int_matmul(x, codes, scale)

        found[name] = {str(b): groups * time_calls(call, device, SECONDS).median for b, call in ((4, four), (8, eight))}
    return found
