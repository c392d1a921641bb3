"""What the hooks are handed: the client, the server, and what travels between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eff.data import move_batch

if TYPE_CHECKING:
    from eff.data import Batch
    from eff.run import Loss, Run
    from eff_fl_kit.config import FederatedConfig
    from eff_fl_kit.flat import FlatModel

State = dict[str, Tensor]
STATISTICS = "statistics"
"""Name under which the running statistics of batch normalisation travel, both ways."""


def bytes_of(tensors: State) -> int:
    """Return the bytes of the values; names and framing are not counted."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def is_finite(tensors: State) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in tensors.values())


@dataclass(eq=False)
class Update:
    """What a client sends after its local training."""

    index: int
    samples: int
    steps: int
    gradients: int
    """Gradient evaluations; an ascent step costs one more per local step."""
    loss: float
    """Mean training loss over the local steps, at the points where the first gradient was taken."""
    sent: State


@dataclass(eq=False)
class Client:
    """One client in one round."""

    index: int
    round: int
    model: FlatModel
    """Holds the received weights when the hook is called."""
    received: State
    state: State
    """The client's memory, on the CPU between rounds."""
    samples: Tensor
    """Indices of its samples in the training split."""
    lr: float
    config: FederatedConfig
    run: Run
    loss: Loss
    backward: Callable[[Tensor], None]
    generator: torch.Generator
    steps: int = 0
    gradients: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def remembered(self, name: str) -> Tensor:
        """Return an entry of `state` on the device; zeros like the weights where there is none yet."""
        value = self.state.get(name)
        return torch.zeros_like(self.model.weights) if value is None else value.to(self.model.weights)

    def remember(self, name: str, value: Tensor) -> None:
        """Put a copy of `value` into the client's memory."""
        self.state[name] = value.detach().to("cpu", copy=True)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of all local epochs, each epoch in another seeded order.

        A last batch of one sample is left out where the model normalises by batches and there is another.
        """
        from eff_fl_kit.flat import normalisation_layers

        split = self.run.split("train")
        size = self.run.train.batch_size or 1
        smallest = 2 if len(self.samples) > size and normalisation_layers(self.model.module) else 1
        augmentation = self.generator if self.run.train.augment else None
        for _ in range(self.config.local_epochs):
            order = self.samples[torch.randperm(len(self.samples), generator=self.generator)]
            for part in torch.split(order, size):
                if len(part) >= smallest:
                    yield move_batch(split.batch(part.tolist(), augmentation), self.run.device)

    def gradient(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss and the gradient at the current weights.

        The gradient is the model's own vector, overwritten by the next call.
        """
        self.model.gradient.zero_()
        device = self.run.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.run.precision == "bf16"):
            loss, _ = self.loss(self.model.module, batch)
        self.backward(loss)
        self.gradients += 1
        return loss.detach(), self.model.gradient

    def update(self, **sent: Tensor) -> Update:
        """Return the update with `sent` copied out of the model's memory."""
        loss = float(torch.stack(self.losses).mean()) if self.losses else 0.0
        copies = {name: value.detach().clone() for name, value in sent.items()}
        return Update(self.index, len(self.samples), self.steps, self.gradients, loss, copies)


@dataclass(eq=False)
class Server:
    """The server in one round."""

    round: int
    weights: Tensor
    """Flat vector of the trained parameters; `fl_aggregate` sets the new one."""
    state: State
    """The server's memory from round to round (control variates, mean offsets), on the CPU."""
    n_clients: int
    """All clients, not only those of the round."""
    lr: float = 0.0

    def mean(self, updates: list[Update], name: str = "weights", by_samples: bool = False) -> Tensor:
        """Return the mean of what the clients sent under `name`.

        Args:
            updates: of the round.
            name: which of the sent vectors.
            by_samples: weigh a client by its number of samples.
        """
        first = updates[0].sent[name]
        exact = torch.float32 if first.device.type == "mps" else torch.float64  # mps has no float64
        total = torch.zeros_like(first, dtype=exact)
        shares = [float(update.samples) if by_samples else 1.0 for update in updates]
        for share, update in zip(shares, updates, strict=True):
            total.add_(update.sent[name].to(total), alpha=share / sum(shares))
        return total.to(first)

    def remembered(self, name: str) -> Tensor:
        """Return an entry of `state` on the device; zeros like the weights where there is none yet."""
        value = self.state.get(name)
        return torch.zeros_like(self.weights) if value is None else value.to(self.weights)

    def remember(self, name: str, value: Tensor) -> None:
        """Put a copy of `value` into the server's memory."""
        self.state[name] = value.detach().to("cpu", copy=True)
