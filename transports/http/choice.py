"""Which model a request is for, and whether this node or another one answers it.

It stands apart from the routes because all that run a model choose alike. A model that is ready here is always run
here; what is not, and is online on another node, is that node's. On a model's own port, and in a request that another
node has forwarded, only this node's models count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infsvc.errors import BadRequest, ModelNotLoaded, UnknownModel, shown
from infsvc.types import ModelState, ServiceDocument

if TYPE_CHECKING:
    from transports.node import Node


class ServedElsewhere(Exception):
    """Other nodes run the model; `nodes` are they, the one with the most room first."""

    def __init__(self, nodes: Sequence[ServiceDocument]) -> None:
        self.nodes = nodes
        super().__init__(f"{nodes[0].model_name} is online at {', '.join(each.node for each in nodes)}")


class ModelChoice:
    """The choice of one port.

    Args:
        model: the one model of this port, or None on the gateway, where the request's `model` picks.
        forwards: whether other nodes may answer.
    """

    def __init__(self, node: Node, model: str | None, *, forwards: bool = True) -> None:
        self._node, self.model = node, model
        self._forwards = forwards and model is None

    def elsewhere(self, model: str | None = None) -> list[ServiceDocument]:
        """What is online on other nodes, all or one model, by node; nothing on a port that does not forward."""
        if not self._forwards:
            return []
        online = [each for each in self._node.forwarder.services() if each.status == "online"]
        return [each for each in online if model in (None, each.model_name)]

    def of(self, named: str | None) -> str:
        """The name of this node's model that is to run.

        Raises:
            ServedElsewhere: another node is to run it.
            BadRequest: none is named and there is not just one; or the port is another model's.
            UnknownModel, ModelNotLoaded: no node has it, or runs it.
        """
        if self.model is not None and named is not None and named != self.model:
            raise BadRequest(
                f"this is {self.model}'s port and the body names {shown(named)}: leave model out, or use the gateway",
                param="model",
            )
        name = self.model or named
        if self._forwards:
            self._look_elsewhere(name)
        return self._node.service.resolve(name).name

    def _look_elsewhere(self, name: str | None) -> None:
        node = self._node
        if node.service.draining:
            return  # this node's own business is to end
        ready = [each.name for each in node.fleet.workers.values() if each.state is ModelState.READY]
        if name in ready or (name is None and ready):
            return
        services = node.forwarder.services()
        if name is None:
            names = {each.model_name for each in services if each.status == "online"}
            if len(names) != 1:
                if names:
                    known = ", ".join(sorted(names))
                    raise BadRequest(f"model is needed to choose one of those loaded: {known}", param="model")
                return
            (name,) = names
        nodes = node.forwarder.nodes(name)
        if nodes:
            raise ServedElsewhere(nodes)
        if name in node.fleet.workers:
            return
        heard = next((each for each in services if each.model_name == name), None)
        if heard is not None:
            why = f"at {heard.node}" + (f": {heard.reason}" if heard.reason else "")
            raise ModelNotLoaded(name, heard.status, why)
        if services:
            raise UnknownModel(name, sorted({*node.fleet.workers, *(each.model_name for each in services)}))
