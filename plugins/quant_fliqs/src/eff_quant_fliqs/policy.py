"""The policy: a row of logits per decision, learned by REINFORCE while the network trains.

pi = softmax(theta / T);  R from -loss and cost / target;  b <- ema b + (1 - ema) R (first value R);  A = R - b
loss = -A mean_i log pi_i[a_i] + lambda_t mean_i H(pi_i)                    the entropy is penalised
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from eff_quant_fliqs.config import FLIQSConfig

SMALLEST = 1e-8


def reward(quality: float, ratio: float, config: FLIQSConfig) -> float:
    """Return R of a quality (minus a loss) and cost / target."""
    if config.reward in ("abs_one_sided", "hard_exp"):
        ratio = max(1.0, ratio)
    if config.reward in ("abs", "abs_one_sided"):
        return quality - config.beta * abs(1 - ratio)
    # A quality below 0 grows worse with a positive exponent; one above 0 needs a negative one.
    return quality * ratio ** (config.beta if quality < 0 else -config.beta)


def entropy_weight(step: int, delay: int, total: int, config: FLIQSConfig) -> float:
    """Return lambda_t: 0 up to the delay, then rising to the largest."""
    if step <= delay:
        return 0.0
    progress = min(1.0, (step - delay) / max(1, total - delay))
    shape = {
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
        "linear": progress,
        "constant": 1.0,
        "step": float(progress >= 0.5),
    }[config.entropy_schedule]
    return config.entropy_max * shape


class Policy:
    """Logits, their optimiser, and the running mean of rewards."""

    def __init__(self, decisions: int, options: int, config: FLIQSConfig):
        self.config = config
        self.logits = torch.full((decisions, options), 0.5, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=config.policy_lr)
        self.baseline: float | None = None
        self.entropies: list[float] = []
        self.costs: list[float] = []

    def probabilities(self) -> Tensor:
        """Return pi (decisions, options), with a graph to the logits."""
        return (self.logits / self.config.temperature).softmax(1)

    def sample(self, uniform: bool) -> list[int]:
        """Draw a format for each decision, from pi or evenly; random numbers are torch's."""
        pi = self.probabilities().detach().clamp(SMALLEST, 1)
        weights = torch.ones_like(pi) if uniform else pi / pi.sum(1, keepdim=True)
        return [int(index) for index in torch.multinomial(weights, 1)[:, 0]]

    def best(self) -> list[int]:
        """Return the likeliest format of each decision."""
        return [int(index) for index in self.logits.detach().argmax(1)]

    def entropy(self) -> Tensor:
        """Return the mean entropy of the decisions, nats."""
        pi = self.probabilities()
        return -(pi * pi.clamp(min=SMALLEST).log()).sum(1).mean()

    def update(self, choices: list[int], value: float, weight: float) -> None:
        """Take one step for what was drawn and its reward."""
        ema = self.config.ema
        self.baseline = value if self.baseline is None else ema * self.baseline + (1 - ema) * value
        advantage = value - self.baseline
        chosen = self.probabilities().gather(1, torch.tensor(choices)[:, None]).clamp(min=SMALLEST).log().mean()
        loss = -advantage * chosen + weight * self.entropy()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything."""
        return {
            "logits": self.logits.detach(), "optimizer": self.optimizer.state_dict(), "baseline": self.baseline,
            "entropies": self.entropies, "costs": self.costs,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        with torch.no_grad():
            self.logits.copy_(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline = state["baseline"]
        self.entropies, self.costs = list(state["entropies"]), list(state["costs"])
