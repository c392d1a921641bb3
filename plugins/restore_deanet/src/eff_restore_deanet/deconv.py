"""The detail-enhanced convolution (Chen, He, Lu, IEEE TIP 2024, arXiv:2301.04805, section III-A).

Five 3 x 3 convolutions in parallel, four of them differences of neighbours, are one convolution, because
convolution is linear in its kernel:

    DEConv(x) = sum_i x * K_i + b_i = x * (sum_i K_i) + sum_i b_i                                eq. 4

with taps numbered 0 to 8 row by row, w of 3 x 3 and u of 3 learned numbers per pair of channels:

    vanilla     K = w
    central     K = w, but K[4] = w[4] - sum_j w[j]                  (the taps sum to 0)
    angular     K = w - w[3, 0, 1, 6, 4, 2, 7, 8, 5]                 (minus the ring turned by one step)
    horizontal  K = u in the left column, -u in the right one, 0 between
    vertical    K = u in the top row, -u in the bottom one, 0 between

Training builds the sum of the kernels and runs one convolution; `folded` keeps that sum alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eff.errors import UnsupportedModelError

_TURNED = (3, 0, 1, 6, 4, 2, 7, 8, 5)  # the ring of eight, one step clockwise; the reverse is another prior
BRANCHES = {"c": "central", "h": "horizontal", "v": "vertical", "a": "angular"}


def central(w: Tensor) -> Tensor:
    """Return the kernels (O, I, 3, 3) of the central difference of weights `w` (O, I, 3, 3)."""
    return w - F.pad(w.sum((2, 3), keepdim=True), (1, 1, 1, 1))


def angular(w: Tensor) -> Tensor:
    """Return the kernels (O, I, 3, 3) of the angular difference of weights `w` (O, I, 3, 3)."""
    return w - w.flatten(2)[..., list(_TURNED)].view_as(w)


def horizontal(u: Tensor) -> Tensor:
    """Return the kernels (O, I, 3, 3) of the horizontal difference of weights `u` (O, I, 3)."""
    return torch.stack((u, torch.zeros_like(u), -u), dim=-1)


def vertical(u: Tensor) -> Tensor:
    """Return the kernels (O, I, 3, 3) of the vertical difference of weights `u` (O, I, 3)."""
    return torch.stack((u, torch.zeros_like(u), -u), dim=-2)


def vanilla(w: Tensor) -> Tensor:
    """Return `w`: an ordinary kernel."""
    return w


_KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "vanilla": vanilla,
    "central": central,
    "horizontal": horizontal,
    "vertical": vertical,
    "angular": angular,
}


class Branch(nn.Module):
    """Weights and bias of one branch. No convolution itself, so that nothing takes it for one to change alone.

    Args:
        outputs: O, channels out.
        inputs: I, channels in.
        taps: (3, 3), or (3,) for the branches that learn a vector.
        bias: whether there is one.
    """

    def __init__(self, outputs: int, inputs: int, taps: tuple[int, ...], bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *taps))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        # What nn.Conv2d and nn.Conv1d do: fan-in counts the learned numbers, 9 or 3 per input channel.
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(inputs * math.prod(taps))
            nn.init.uniform_(self.bias, -bound, bound)


class DEConv(nn.Module):
    """A 3 x 3 convolution, stride 1, zero padding 1, that learns with difference kernels beside its own.

    Args:
        inputs: channels in.
        outputs: channels out; None: as many.
        branches: which difference branches there are, letters of "chva".
        bias: whether every branch has one.
    """

    def __init__(self, inputs: int, outputs: int | None = None, branches: str = "chva", bias: bool = True):
        super().__init__()
        outputs = outputs or inputs
        self.names = ("vanilla", *(BRANCHES[letter] for letter in branches))
        for name in self.names:
            taps = (3,) if name in ("horizontal", "vertical") else (3, 3)
            self.add_module(name, Branch(outputs, inputs, taps, bias))

    def kernels(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return kernel (O, I, 3, 3) and bias (O,) of each branch.

        Raises:
            UnsupportedModelError: the branches do not fit each other.
        """
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name in self.names:
            branch: Branch = getattr(self, name)
            found[name] = (_KERNELS[name](branch.weight), branch.bias)
        shapes = {name: tuple(kernel.shape) for name, (kernel, _) in found.items()}
        if len(set(shapes.values())) > 1 or len({bias is None for _, bias in found.values()}) > 1:
            raise UnsupportedModelError(
                "the branches of a DEConv cannot be summed, their kernels or biases differ: "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )
        return found

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        """Return the sums of all kernels and of all biases (eq. 4)."""
        kernels, biases = zip(*self.kernels().values(), strict=True)
        weight = torch.stack(kernels).sum(0)
        return weight, None if biases[0] is None else torch.stack(biases).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, O, H, W) of `x` (N, I, H, W)."""
        weight, bias = self.kernel()
        return F.conv2d(x, weight, bias, padding=1)

    def parallel(self, x: Tensor) -> Tensor:
        """Return the same by one convolution per branch: what `forward` means, for tests and timing."""
        return sum(F.conv2d(x, kernel, bias, padding=1) for kernel, bias in self.kernels().values())  # type: ignore[return-value]

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """Return the one convolution that does the same."""
        weight, bias = self.kernel()
        outputs, inputs = weight.shape[:2]
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        conv.weight.copy_(weight)
        if bias is not None and conv.bias is not None:
            conv.bias.copy_(bias)
        return conv.train(self.training)
