"""NATS micro: answers `$SRV.PING`, `INFO` and `STATS` for the service `infsvc`, one endpoint a served model.

The library's own service would subscribe to each endpoint's subject and answer there a second time, beside the front
door. So its message types are used and its machinery is not: the endpoints named here are the front door's, and their
figures are counted from the node's events.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.micro.service import EndpointInfo, EndpointStats, ServiceInfo, ServicePing, ServiceStats

from engine.fleet import Fleet
from engine.worker import Worker
from infsvc import __version__, subjects
from infsvc.events import Event, EventBus, RequestFinished
from infsvc.watch import SERVICE
from transports.nats.bus import Bus
from transports.nats.messages import encode
from transports.nats.subscriptions import is_served

_DESCRIPTION = "language models on somebody's own machines"


@dataclass
class _Served:
    """What an endpoint has done since the node began."""

    n_requests: int = 0
    n_errors: int = 0
    took_ns: int = 0
    last_error: str = ""


class MicroService:
    """Subscribes on each fresh connection. Loop thread only.

    Args:
        node: the node's name.
        start_time: RFC 3339; together with the name it tells one start of a node from another.
    """

    def __init__(self, bus: Bus, fleet: Fleet, events: EventBus, *, node: str, start_time: str) -> None:
        self._bus, self._fleet = bus, fleet
        self._started = datetime.fromisoformat(start_time)
        self._metadata = {"node": node, "start_time": start_time}
        self.instance = secrets.token_hex(11)
        self._served: dict[str, _Served] = {}
        events.listen(self._count)
        bus.on_connected(self._subscribe)

    def _count(self, event: Event) -> None:
        if isinstance(event, RequestFinished) and event.source == "nats" and event.model is not None:
            served = self._served.setdefault(event.model, _Served())
            served.n_requests += 1
            served.took_ns += round(event.duration_ms * 1e6)
            if event.finish_reason == "error":
                served.n_errors += 1
                served.last_error = f"500:{event.req_id} ended with an error"

    async def _subscribe(self, nc: Client) -> None:
        for verb, document in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for name, instance in (("", ""), (SERVICE, ""), (SERVICE, self.instance)):
                subject = subjects.service(verb, name=name, instance=instance)
                await nc.subscribe(subject, cb=self._answering(document))

    def _answering(self, document: Callable[[], dict[str, Any]]) -> Callable[[Msg], Any]:
        async def answer(message: Msg) -> None:
            if message.reply:
                await self._bus.publish(message.reply, encode(document()))

        return answer

    def _endpoints(self) -> list[Worker]:
        return [worker for worker in self._fleet.workers.values() if is_served(worker)]

    def _ping(self) -> dict[str, Any]:
        return ServicePing(id=self.instance, name=SERVICE, version=__version__, metadata=self._metadata).to_dict()

    def _info(self) -> dict[str, Any]:
        return ServiceInfo(
            id=self.instance,
            name=SERVICE,
            version=__version__,
            description=_DESCRIPTION,
            metadata=self._metadata,
            endpoints=[
                EndpointInfo(
                    name=subjects.dotless(worker.name),
                    subject=worker.settings.subject,
                    queue_group=worker.settings.queue_group,
                    metadata={"model": worker.name, "health": subjects.health(worker.name)},
                )
                for worker in self._endpoints()
            ],
        ).to_dict()

    def _stats(self) -> dict[str, Any]:
        return ServiceStats(
            id=self.instance,
            name=SERVICE,
            version=__version__,
            metadata=self._metadata,
            started=self._started,
            endpoints=[self._endpoint_stats(worker) for worker in self._endpoints()],
        ).to_dict()

    def _endpoint_stats(self, worker: Worker) -> EndpointStats:
        served = self._served.get(worker.name, _Served())
        return EndpointStats(
            name=subjects.dotless(worker.name),
            subject=worker.settings.subject,
            queue_group=worker.settings.queue_group,
            num_requests=served.n_requests,
            num_errors=served.n_errors,
            processing_time=served.took_ns,
            average_processing_time=served.took_ns // max(1, served.n_requests),
            last_error=served.last_error,
            data={"pending_messages": worker.n_waiting, "active_processing": worker.n_active},
        )
