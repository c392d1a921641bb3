"""Architecture parameters and how coefficients are drawn from them.

    DARTS   softmax(alpha) for mixed outputs, sparsemax(alpha) for mixed weights: a softmax gives the entries
            that only the largest candidate has no more than its own coefficient, so all weights shrink
    DrNAS   a ~ Dirichlet(elu(alpha) + 1), reparameterised
    GDAS    p = softmax((log_softmax(alpha) + g) / tau), g Gumbel; one-hot of p with the gradient of p
    SPOS    one candidate, uniform; alpha is not learned

DARTS: Liu, Simonyan, Yang, ICLR 2019. DrNAS: Chen et al., ICLR 2021. GDAS: Dong, Yang, CVPR 2019. SPOS: Guo et
al., ECCV 2020. Sparsemax: Martins, Astudillo, ICML 2016.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from eff_nas_kit.space import Chosen, SearchSpace

SamplerName = Literal["darts", "drnas", "gdas", "spos"]
SINGLE_PATH = ("gdas", "spos")
ALPHA_STD = 1e-3
_SMALLEST_CONCENTRATION = 1e-6  # elu(alpha) + 1 reaches 0, where a Dirichlet sample is NaN
_TINY = 1e-20


def sparsemax(alpha: Tensor) -> Tensor:
    """Return the point of the simplex nearest to `alpha` (n,); many of its entries are 0."""
    ordered = alpha.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    rank = torch.arange(1, len(alpha) + 1, device=alpha.device, dtype=alpha.dtype)
    support = int((rank * ordered > excess).sum())
    return (alpha - excess[support - 1] / support).clamp_min(0)


def concentration(alpha: Tensor) -> Tensor:
    """Return DrNAS's Dirichlet parameters, above 0."""
    return (F.elu(alpha) + 1).clamp_min(_SMALLEST_CONCENTRATION)


def dirichlet_sample(alpha: Tensor) -> Tensor:
    """Return a reparameterised sample of DrNAS's Dirichlet, (n,)."""
    sample: Tensor = torch.distributions.Dirichlet(concentration(alpha), validate_args=False).rsample()
    return sample


def gumbel_one_hot(alpha: Tensor, tau: float) -> Tensor:
    """Return GDAS's sample, (n,): one-hot in value, softmax at temperature `tau` in gradient."""
    gumbel = -torch.empty_like(alpha).exponential_().clamp_min(_TINY).log()
    p = ((alpha.log_softmax(0) + gumbel) / tau).softmax(0)
    hard = F.one_hot(p.argmax(), len(p)).to(p)
    return hard + p - p.detach()


def uniform_one_hot(alpha: Tensor) -> Tensor:
    """Return SPOS's sample, (n,): one candidate, each equally likely."""
    index = torch.randint(len(alpha), (), device=alpha.device)
    return F.one_hot(index, len(alpha)).to(alpha)


def linear_tau(tau_max: float, tau_min: float, epoch: int, epochs: int) -> float:
    """Return GDAS's temperature: from `tau_max` in the first epoch to `tau_min` in the last."""
    return tau_max - (tau_max - tau_min) * min(1.0, epoch / max(1, epochs - 1))


class Architecture:
    """The architecture parameters alpha, one vector per choice, and the way to sample from them.

    Args:
        space: the choices.
        sampler: one of the four.
        mixing: decides between softmax and sparsemax for DARTS.
        generator: for the initial alphas, normal with standard deviation 1e-3.
        device: where they live.
    """

    def __init__(
        self,
        space: SearchSpace,
        sampler: SamplerName,
        mixing: Literal["entangled", "output"],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ):
        self.space = space
        self.sampler = sampler
        self.mixing = mixing
        self.alphas = {
            name: (ALPHA_STD * torch.randn(len(choice.values), generator=generator)).to(device).requires_grad_()
            for name, choice in space.choices.items()
        }

    @property
    def single_path(self) -> bool:
        """Whether a sample is one network."""
        return self.sampler in SINGLE_PATH

    @property
    def learns(self) -> bool:
        """Whether there is something to learn in alpha."""
        return self.sampler != "spos"

    def sample(self, tau: float = 1.0) -> dict[str, Tensor]:
        """Return coefficients for one step, each vector drawn once wherever it appears; with gradients."""
        draw: dict[str, Callable[[Tensor], Tensor]] = {
            "darts": self._darts,
            "drnas": dirichlet_sample,
            "gdas": lambda alpha: gumbel_one_hot(alpha, tau),
            "spos": uniform_one_hot,
        }
        return {name: draw[self.sampler](alpha) for name, alpha in self.alphas.items()}

    def _darts(self, alpha: Tensor) -> Tensor:
        return sparsemax(alpha) if self.mixing == "entangled" else alpha.softmax(0)

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """Return the expected coefficients."""
        means: dict[str, Callable[[Tensor], Tensor]] = {
            "darts": self._darts,
            "drnas": lambda alpha: concentration(alpha) / concentration(alpha).sum(),
            "gdas": lambda alpha: alpha.softmax(0),
            "spos": lambda alpha: torch.full_like(alpha, 1 / len(alpha)),
        }
        return {name: means[self.sampler](alpha) for name, alpha in self.alphas.items()}

    def entropy(self) -> float:
        """Return the mean entropy of the expected coefficients over its maximum: 1 undecided, 0 decided."""
        shares = [
            float(-(a * a.clamp_min(_TINY).log()).sum()) / math.log(len(a)) for a in self.mean().values() if len(a) > 1
        ]
        return sum(shares) / len(shares) if shares else 0.0

    def argmax(self) -> Chosen:
        """Return the candidate with the largest alpha of every choice."""
        return {name: self.space.values_of(name)[int(alpha.argmax())] for name, alpha in self.alphas.items()}

    def dirichlet_divergence(self) -> Tensor:
        """Return KL(Dirichlet(elu(alpha) + 1) || Dirichlet(1)) summed over the choices: DrNAS's `kl` regulariser."""
        parts = []
        for alpha in self.alphas.values():
            own = torch.distributions.Dirichlet(concentration(alpha), validate_args=False)
            anchor = torch.distributions.Dirichlet(torch.ones_like(alpha), validate_args=False)
            parts.append(torch.distributions.kl_divergence(own, anchor))
        return torch.stack(parts).sum()

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the alphas."""
        return {name: alpha.detach().clone() for name, alpha in self.alphas.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take alphas back."""
        with torch.no_grad():
            for name, alpha in self.alphas.items():
                alpha.copy_(state[name])


def random_network(space: SearchSpace, generator: torch.Generator) -> Chosen:
    """Return a network of the space, each equally likely."""
    return {
        name: choice.values[int(torch.randint(len(choice.values), (), generator=generator))]
        for name, choice in space.choices.items()
    }
