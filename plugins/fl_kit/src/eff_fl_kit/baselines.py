"""The baselines that federated papers compare with, on the same client loop.

    FedAvg     McMahan, Moore, Ramage, Hampson, Aguera y Arcas, AISTATS 2017
    FedProx    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, MLSys 2020: f_i + (mu/2) |w - w_t|^2
    FedSAM     Qu, Li, Duan, Liu, Tang, Lu, ICML 2022: the gradient at w + rho g/|g|
    FedDyn     Acar, Zhao, Matas, Mattina, Whatmough, Saligrama, ICLR 2021: dynamic regulariser
    SCAFFOLD   Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020, option II

They are methods like any other, but not commands: papers' plugins compare with them in their claims.
The server takes the plain mean of the clients of a round (`by_samples=true`: weighted by their samples).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Card, Field, hookimpl
from eff_fl_kit.config import FederatedConfig
from eff_fl_kit.method import FederatedMethod

if TYPE_CHECKING:
    from torch import Tensor

    from eff_fl_kit.protocol import Client, Server, Update


def _card(title: str, author: str, venue: str, year: int, paper: str) -> Card:
    url = f"https://arxiv.org/abs/{paper.partition(':')[2]}"
    return Card(
        title=title, authors=(author,), venue=venue, year=year, paper=paper, url=url, tasks=("any",),
        needs=("train_data",),
    )  # fmt: skip


class AveragingConfig(FederatedConfig):
    """Options of the baselines that average weights."""

    by_samples: bool = Field(False, description="Weigh clients by their number of samples.")
    mu: float = Field(0.0, ge=0, description="Strength of the proximal term (FedProx).")
    rho: float = Field(0.0, ge=0, description="Radius of the ascent step (FedSAM).")


class FedAvg(FederatedMethod[AveragingConfig]):
    """Local SGD and averaging; with `mu` FedProx, with `rho` FedSAM."""

    card: ClassVar = _card(
        "Communication-Efficient Learning of Deep Networks from Decentralized Data",
        "H. Brendan McMahan", "AISTATS", 2017, "arXiv:1602.05629",
    )  # fmt: skip

    @hookimpl
    def fl_client_update(self, client: Client) -> Update:
        """Minimise f_i(w) + (mu/2) |w - w_t|^2 by SGD, at the ascent point where rho > 0."""
        from eff_fl_kit.local import descend

        mu = self.config.mu
        correction = -mu * client.received["weights"] if mu else None
        descend(client, correction, pull=mu, ascent=self.config.rho)
        return client.update(weights=client.model.weights)

    @hookimpl
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """Take the mean of the clients' weights."""
        server.weights = server.mean(updates, by_samples=self.config.by_samples)
        return True


class FedDynConfig(FederatedConfig):
    """Options of FedDyn."""

    alpha: float = Field(0.1, gt=0, description="Strength of the dynamic regulariser.")


class FedDyn(FederatedMethod[FedDynConfig]):
    """Federated learning with dynamic regularisation."""

    card: ClassVar = _card(
        "Federated Learning Based on Dynamic Regularization", "Durmus Alp Emre Acar", "ICLR", 2021, "arXiv:2111.04263"
    )

    @hookimpl
    def fl_client_update(self, client: Client) -> Update:
        """Minimise f_i(w) - <g_i, w> + (alpha/2) |w - w_t|^2, then g_i <- g_i - alpha (w_i - w_t)."""
        from eff_fl_kit.local import descend

        alpha, start = self.config.alpha, client.received["weights"]
        g = client.remembered("g")
        descend(client, -g - alpha * start, pull=alpha)
        client.remember("g", g - alpha * (client.model.weights - start))
        return client.update(weights=client.model.weights)

    @hookimpl
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """h <- h - (alpha / N) sum (w_i - w_t); w_{t+1} = mean(w_i) - h / alpha."""
        alpha = self.config.alpha
        mean = server.mean(updates)
        h = server.remembered("h") - alpha * len(updates) / server.n_clients * (mean - server.weights)
        server.remember("h", h)
        server.weights = mean - h / alpha
        return True


class Scaffold(FederatedMethod[FederatedConfig]):
    """Stochastic controlled averaging with option II for the control variates and a global step of 1.

    Without weight decay and clipping c_i is the mean of the client's gradients, as in the paper.
    """

    card: ClassVar = _card(
        "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
        "Sai Praneeth Karimireddy", "ICML", 2020, "arXiv:1910.06378",
    )  # fmt: skip

    @hookimpl
    def fl_broadcast(self, server: Server) -> dict[str, Tensor]:
        """Send the weights and the server's control variate: twice the bytes of FedAvg."""
        return {"weights": server.weights, "control": server.remembered("control")}

    @hookimpl
    def fl_client_update(self, client: Client) -> Update:
        """Step along g - c_i + c; then c_i <- c_i - c + (w_t - w_i) / (K lr)."""
        from eff_fl_kit.local import descend

        c, c_i = client.received["control"], client.remembered("control")
        descend(client, c - c_i)
        change = (client.received["weights"] - client.model.weights) / (max(1, client.steps) * client.lr) - c
        client.remember("control", c_i + change)
        return client.update(weights=client.model.weights, control=change)

    @hookimpl
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """Take the mean of the weights; c <- c + (1/N) sum (change of c_i)."""
        share = len(updates) / server.n_clients
        server.remember("control", server.remembered("control") + share * server.mean(updates, "control"))
        server.weights = server.mean(updates)
        return True
