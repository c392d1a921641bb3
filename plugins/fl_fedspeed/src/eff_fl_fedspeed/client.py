"""FedSpeed (Sun, Shen, Huang, Ding, Tao, ICLR 2023, arXiv:2302.10429).

The paper, with x_t the server's weights, g^_i the prox-correction and lambda the prox weight:

    g~ = (1 - alpha) g(x) + alpha g(x + rho g(x))                       perturbed gradient
    x <- x - lr [ g~ - g^_i + (1/lambda) (x - x_t) ]                    K local steps
    g^_i <- g^_i - (1/lambda) (x_K - x_t)                               after them
    x_{t+1} = mean over participants of x_K - lambda g^_i

With the accumulated offset h_i = -lambda g^_i and lamb = 1/lambda this is, as in the reference code,

    x <- x - lr [ clip(g~ + lamb (h_i - x_t)) + (weight_decay + lamb) x ]
    h_i <- h_i + (x_K - x_t)

with the ascent normalised, rho g / (|g| + 1e-7). h_i stays with the client. `server_rule=code` adds the
mean of h over all clients, which the server follows from the weights it receives; `paper` adds each
participant's own h_i before it sends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from eff_fl_kit.local import descend

if TYPE_CHECKING:
    from eff_fl_fedspeed.config import FedSpeedConfig
    from eff_fl_kit.protocol import Client, Server, Update

OFFSET = "h"
LAST = "last"
MEAN_OFFSET = "mean_h"


def update_client(client: Client, config: FedSpeedConfig) -> Update:
    """Do the local steps of one client and update its offset h_i.

    Returns:
        "weights": x_K, or x_K + h_i under `server_rule=paper`; and "offset", the change of h_i, where the
        server cannot tell it from the weights (relaxed start).
    """
    weights, h = client.model.weights, client.remembered(OFFSET)
    if config.relaxed_init and LAST in client.state:
        weights.add_(weights - client.remembered(LAST), alpha=config.beta)
    start = weights.clone()
    descend(client, config.lamb * (h - start), pull=config.lamb, ascent=config.rho, mix=config.alpha)
    change = weights - start
    client.remember(OFFSET, h + change)
    if config.relaxed_init:
        client.remember(LAST, weights)
    if config.server_rule == "paper":
        return client.update(weights=weights + h + change)
    if config.relaxed_init:
        return client.update(weights=weights, offset=change)
    return client.update(weights=weights)


def aggregate(server: Server, updates: list[Update], config: FedSpeedConfig) -> None:
    """Set the new weights: the mean of what was sent, under `server_rule=code` plus the mean of h over all clients."""
    mean = server.mean(updates)
    if config.server_rule == "paper":
        server.weights = mean
        return
    change = server.mean(updates, "offset") if config.relaxed_init else mean - server.weights
    mean_h = server.remembered(MEAN_OFFSET) + len(updates) / server.n_clients * change
    server.remember(MEAN_OFFSET, mean_h)
    server.weights = mean + mean_h
