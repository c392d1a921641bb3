"""The hooks of federated methods, in the order of a round. A method implements `fl_client_update` at least.

    server                                   client i
    fl_broadcast  -> {"weights": ...}   -->
                                             fl_client_update(client) -> Update
                                        <--
    fl_aggregate(server, updates)

The same implementations run in process and on Flower. Another plugin may wrap them
(`@hookimpl(wrapper=True)`), e.g. to compress or to clip what a client sends.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from typing import TYPE_CHECKING

from eff.hookspecs import hookspec

if TYPE_CHECKING:
    from torch import Tensor

    from eff_fl_kit.protocol import Client, Server, Update


class FederatedHooks:
    """Hook specifications of the family `fl`."""

    @hookspec(firstresult=True)
    def fl_broadcast(self, server: Server) -> dict[str, Tensor]:
        """Return what every client of the round is sent; its bytes are counted once per client.

        Must hold "weights", the flat vector of the trainable parameters. Called before every round.
        """

    @hookspec(firstresult=True)
    def fl_client_update(self, client: Client) -> Update:
        """Train `client.model` on the client's own data and return what is sent back.

        `client.received` is what `fl_broadcast` returned, `client.state` is the client's memory from
        round to round (empty at first; tensors by name). What is put there is kept only if everything
        the client sends is finite. End with `client.update(weights=...)`.
        """

    @hookspec(firstresult=True)
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """Set `server.weights` (and `server.state`) from what the clients sent; return True.

        `updates` has at least one element, all finite, in the order of the clients' numbers. Running
        statistics of batch normalisation are averaged by the kit.
        """
