"""The bi-level search of TangleNAS (Sukthanker, Krishnakumar, Safari, Hutter, AutoML 2024).

Each step, on batches of two parts of the training data that share no sample:

    alpha <- Adam(grad_alpha L_valid(w, a(alpha)))      first order: w is not unrolled
    w     <- Adam(grad_w     L_train(w, a(alpha)))

with coefficients a sampled anew for each of the two. The gradient of the first is taken for alpha alone,
so nothing is left on the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eff.data import Batch, Data, move_batch
from eff.modes import eval_mode
from eff.run import Run, Step
from eff_nas_kit.layers import Selection
from eff_nas_kit.samplers import Architecture, linear_tau
from eff_nas_kit.space import Chosen
from eff_nas_kit.splitting import PartOfSplit
from eff_nas_kit.supernet import expected_share
from eff_nas_tangle.config import TangleConfig

if TYPE_CHECKING:
    from pydantic import JsonValue

ARCH_BETAS = (0.5, 0.999)


class Search:
    """The state of a search: architecture parameters with their optimiser, and what was seen on the way."""

    def __init__(self, config: TangleConfig, selection: Selection, run: Run, data: Data, valid: PartOfSplit):
        self.config = config
        self.selection = selection
        self.data = data
        """The run's data before the training part was divided."""
        self.valid = valid
        self.architecture = Architecture(
            selection.space, config.optimizer, config.mixing, run.generator("nas_tangle/alpha"), run.device
        )
        # DrNAS's l2 regulariser is the weight decay of its code: alpha = 0 is the uniform Dirichlet.
        pull = config.reg_scale if config.reg_type == "l2" else 0.0
        decay = pull if config.optimizer == "drnas" else config.arch_wd
        alphas = list(self.architecture.alphas.values())
        self.optimizer = torch.optim.Adam(alphas, lr=config.arch_lr, betas=ARCH_BETAS, weight_decay=decay)
        self.history: list[dict[str, JsonValue]] = []
        self.epoch = 0

    def before_weights(self, step: Step) -> float | None:
        """Do the architecture's step and sample coefficients for the weights' step; return the validation loss."""
        if step.epoch != self.epoch:
            self.note_epoch(step.module, step.run)
            self.epoch = step.epoch
        tau = linear_tau(self.config.tau_max, self.config.tau_min, step.epoch, step.run.train.epochs or 1)
        loss = None
        if self.architecture.learns and step.last_of_step:
            loss = self._architecture_step(step, tau)
        with torch.no_grad():
            self.selection.use(self.architecture.sample(tau), self.architecture.single_path)
        return loss

    def _architecture_step(self, step: Step, tau: float) -> float:
        self.selection.use(self.architecture.sample(tau), self.architecture.single_path)
        loss, _ = step.loss(step.model, self.valid_batch(step))
        total = loss + self._penalties(step.module)
        alphas = list(self.architecture.alphas.values())
        gradients = torch.autograd.grad(total, alphas, allow_unused=True)
        for alpha, gradient in zip(alphas, gradients, strict=True):
            alpha.grad = torch.zeros_like(alpha) if gradient is None else gradient.detach()
        self.optimizer.step()
        return float(loss.detach())

    def _penalties(self, supernet: nn.Module) -> Tensor | float:
        config, penalty = self.config, 0.0
        if config.optimizer == "drnas" and config.reg_type == "kl":
            penalty = config.reg_scale * self.architecture.dirichlet_divergence() + penalty
        if config.size_weight:
            penalty = config.size_weight * expected_share(supernet) + penalty
        return penalty

    def valid_batch(self, step: Step) -> Batch:
        """Return the validation batch of a step: a seeded order per pass, a function of the step's index alone."""
        size = min(step.run.train.batch_size or 64, len(self.valid))
        per_pass = len(self.valid) // size
        turn, position = divmod(step.index, per_pass)
        order = torch.randperm(len(self.valid), generator=step.run.generator(f"nas_tangle/valid/{turn}")).tolist()
        augment = step.run.generator(f"nas_tangle/augment/{step.index}") if step.run.train.augment else None
        return move_batch(self.valid.batch(order[position * size : (position + 1) * size], augment), step.run.device)

    def note_epoch(self, supernet: nn.Module, run: Run) -> None:
        """Measure the network that the search would choose now, for the any-time curve."""
        if not self.config.history_samples or not self.architecture.learns:
            return
        best = self.architecture.argmax()
        self.history.append(
            {
                "epoch": self.epoch + 1,
                f"valid_{run.task.headline}": self.score(supernet, run, best, self.config.history_samples),
                "entropy": self.architecture.entropy(),
            }
        )

    @torch.no_grad()
    def score(self, supernet: nn.Module, run: Run, chosen: Chosen, samples: int | None = None) -> float:
        """Return the task's headline metric of one network on validation data, with inherited weights.

        Batch norms use each batch's statistics: none were kept for single networks.
        """
        meter = run.task.meter()
        size = max(run.train.batch_size or 64, 64)
        count = min(samples or len(self.valid), len(self.valid))
        with eval_mode(supernet), self.selection.fixed(chosen):
            for start in range(0, count, size):
                batch = move_batch(self.valid.batch(range(start, min(start + size, count))), run.device)
                meter.update(run.forward(supernet, batch), batch)
        return meter.compute().values[run.task.headline].value

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed search needs."""
        return {
            "alphas": self.architecture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "epoch": self.epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.architecture.load_state_dict(state["alphas"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])
        self.epoch = int(state["epoch"])
