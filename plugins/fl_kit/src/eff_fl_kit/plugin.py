"""Declares the kit's hooks to eff, with the answers of federated averaging. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from eff.method import Extension, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from eff_fl_kit.protocol import Server, Update


class FLKit(Extension):
    """Adds the hooks `fl_*`; answers where a method does not: send the weights, average what comes back."""

    hookspecs: ClassVar = ("eff_fl_kit.hookspecs:FederatedHooks",)

    @hookimpl
    def fl_broadcast(self, server: Server) -> dict[str, Tensor]:
        """Send the weights."""
        return {"weights": server.weights}

    @hookimpl
    def fl_aggregate(self, server: Server, updates: list[Update]) -> bool:
        """Replace the weights by the mean of the clients'."""
        server.weights = server.mean(updates)
        return True
