"""The base class of federated methods: a round is a training step. Imports no torch.

class FedNew(FederatedMethod[FedNewConfig]):
    card = Card(...)

    @hookimpl
    def fl_client_update(self, client):
        ...
        return client.update(weights=client.model.weights)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from eff.errors import RequestError
from eff.method import Method, hookimpl
from eff.schemas import Metrics, TrainOptions
from eff_fl_kit.config import FederatedConfig

if TYPE_CHECKING:
    from torch import nn

    from eff.data import Data
    from eff.run import Run, Step, StepResult
    from eff_fl_kit.rounds import Federation

ConfigT = TypeVar("ConfigT", bound=FederatedConfig)


class FederatedMethod(Method[ConfigT]):
    """Runs rounds through the hooks of `eff_fl_kit.hookspecs`; a method implements `fl_client_update` at least."""

    def __init__(self, config: ConfigT | None = None):
        super().__init__(config)
        self.server_state: dict[str, Any] = {}
        self.client_states: dict[int, dict[str, Any]] = {}
        """Memory of the clients that run in this process, by their number."""
        self.history: list[dict[str, Any]] = []
        """One row per round: clients, loss, spread, bytes, gradients."""
        self.elsewhere = False
        """Whether the clients keep their memories outside this process."""
        self.federation: Federation | None = None

    def training(self) -> TrainOptions:
        """Return the local steps as training options; an epoch of core is a round."""
        config = self.config
        return TrainOptions(
            epochs=config.rounds, batch_size=config.batch_size, lr=config.lr, optimizer="sgd", momentum=0.0,
            weight_decay=config.weight_decay, clip_norm=config.max_norm, schedule="constant",
        )  # fmt: skip

    def step_count(self, run: Run) -> int | None:
        """Return the number of rounds.

        Raises:
            RequestError: an option asks for what clients do not do, or the data cannot be divided so.
        """
        from eff_fl_kit.rounds import check_request

        check_request(self.config, run)
        return run.train.epochs or 0

    @hookimpl
    def train_step(self, step: Step) -> StepResult:
        """Do one round: draw clients, send, train on each, aggregate."""
        from eff_fl_kit.rounds import Federation

        if self.federation is None:
            self.federation = Federation(self, step.run)
        return self.federation.run_round(step)

    @hookimpl
    def evaluate(self, model: nn.Module, data: Data, run: Run) -> Metrics:
        """Report the training loss and, after a training, every round."""
        from eff_fl_kit.diagnostics import diagnose

        return diagnose(self, model, run)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the server and the clients, and the rounds so far."""
        return {
            "server": self.server_state, "clients": self.client_states, "history": self.history,
            "elsewhere": self.elsewhere,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            RequestError: the clients' memories are not here, because they were on Flower.
        """
        if state.get("elsewhere"):
            raise RequestError("this run's clients were on Flower and took their memory with them; start the run anew")
        self.server_state = dict(state.get("server", {}))
        self.client_states = {index: dict(value) for index, value in state.get("clients", {}).items()}
        self.history = list(state.get("history", []))
