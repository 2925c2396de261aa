"""The models of other nodes on this broker: who is there, how they are, how fast they answer.

It stands apart from the fleet, which owns models: these are only heard of. What is heard goes on as this node's own
events do, marked with the other node's name, so that the screen and `/api/events` show the whole bus.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from nats.aio.client import Client

from infsvc.events import Alert, EventBus, QueueReported, ServiceHealth
from infsvc.roster import Roster, Sighting
from infsvc.types import ServiceDocument
from infsvc.watch import Watch
from transports.nats.bus import Bus, bounded

log = logging.getLogger("infsvc.nats")

_CLOSE_S = 0.5
_TEXT = 500


class Registry:
    """Keeps a roster of other nodes' models. Loop thread only.

    Args:
        node, start_time: this node's own, whose models it knows better.

    Attributes:
        own_response_time_ms: by model, how long this node's own health reply took over the broker.
    """

    def __init__(self, bus: Bus, events: EventBus, *, node: str, start_time: str) -> None:
        self._events, self._node, self._start_time = events, node, start_time
        self._own = (node, start_time)
        self.roster = Roster(ignore=self._own)
        self.own_response_time_ms: dict[str, float] = {}
        self._watch: Watch | None = None
        self._complained: set[str] = set()
        bus.on_connected(self._renew)

    async def close(self) -> None:
        if self._watch is not None:
            await bounded(self._watch.close(), _CLOSE_S)
            self._watch = None

    def services(self) -> list[ServiceDocument]:
        """Every model of every other node, by name and node."""
        return self.roster.services()

    def find(self, model: str, node: str | None = None) -> ServiceDocument | None:
        """A model of another node, one that is online first; None when nobody tells of it."""
        found = [each for each in self.services() if each.model_name == model and node in (None, each.node)]
        return min(found, key=lambda each: each.status != "online", default=None)

    async def _renew(self, nc: Client) -> None:
        if self._watch is not None:
            await bounded(self._watch.close(), _CLOSE_S)
        self._watch = Watch(
            nc,
            self.roster,
            on_health=self._on_health,
            on_report=self._on_report,
            on_alert=self._on_alert,
            on_own=self.own_response_time_ms.__setitem__,
            own=self._own,
        )
        await self._watch.start()

    def _on_health(self, sighting: Sighting) -> None:
        document = sighting.service(time.time())
        self._events.publish(
            ServiceHealth(model=document.model_name, node=document.node, document=document.model_dump(mode="json"))
        )
        if document.node == self._node and document.status != "offline" and document.start_time not in self._complained:
            self._complained.add(document.start_time)
            log.warning(
                "another node on this broker is called %s too: give one of them another name with INFSVC_NODE",
                self._node,
                extra={"code": "nats.namesake", "meta": {"start_time": document.start_time}},
            )

    def _on_report(self, sighting: Sighting) -> None:
        report = sighting.report
        if report is not None:
            self._events.publish(
                QueueReported(
                    model=report.model_name, node=sighting.document.node, report=report.model_dump(mode="json")
                )
            )

    def _on_alert(self, alert: dict[str, Any]) -> None:
        node, model = str(alert.get("node", ""))[:_TEXT], str(alert.get("model", ""))[:_TEXT]
        if node and node != self._node:
            self._events.publish(
                Alert(
                    model=model or None,
                    node=node,
                    level=str(alert.get("level", "critical"))[:_TEXT],
                    msg=str(alert.get("msg", ""))[:_TEXT],
                )
            )
