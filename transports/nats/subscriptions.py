"""One subscription for each model that this node stands for, kept true while models come and go and connections
change.

It stands apart because the front door and the health replies need the same: a model that was asked for is
reachable, one that was unloaded is not, and a fresh connection knows nothing yet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from engine.fleet import Fleet
from engine.worker import Worker
from infsvc.events import ModelStateChanged
from infsvc.types import ModelState
from transports.nats.bus import Bus, bounded

log = logging.getLogger("infsvc.nats")

Handler = Callable[[Worker, Msg], Awaitable[None]]

_DRAIN_S = 1.0
_HELD = frozenset({ModelState.LOADING, ModelState.READY, ModelState.DRAINING})


def is_served(worker: Worker) -> bool:
    """Whether this node answers for the model: somebody asked for it, or it still holds memory."""
    return worker.asked or worker.state in _HELD


class ModelSubscriptions:
    """Subscribes `subject(worker)` for every served model.

    Args:
        name: names the task.
        queue: the queue group of a worker's subscription; "" for none.
        only: which served models have this subject.
        handler: called with each message, one after another; it hands off and returns.
        before: awaited with the models that are about to be subscribed; it does not take long.
    """

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        *,
        name: str,
        subject: Callable[[Worker], str],
        handler: Handler,
        queue: Callable[[Worker], str] = lambda _: "",
        only: Callable[[Worker], bool] = lambda _: True,
        before: Callable[[list[Worker]], Awaitable[None]] | None = None,
    ) -> None:
        self._bus, self._fleet, self._name = bus, fleet, name
        self._subject, self._queue, self._handler, self._before = subject, queue, handler, before
        self._only = only
        self._nc: Client | None = None
        self._subscriptions: dict[str, Subscription] = {}
        self._one_at_a_time = asyncio.Lock()
        self._events = bus.events.subscribe()
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        bus.on_connected(self._renew)

    @property
    def models(self) -> frozenset[str]:
        """Whose subject is subscribed now."""
        return frozenset(self._subscriptions) if self._bus.nc is self._nc else frozenset()

    async def start(self) -> None:
        self._task = asyncio.create_task(self._follow(), name=f"nats-{self._name}")
        await self._sync()

    async def close(self) -> None:
        """Leaves every subject; what the broker had sent before is still handed to the handler."""
        self._closed = True
        self._events.close()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=_DRAIN_S)
            self._task.cancel()
        leaving, self._subscriptions = self._subscriptions, {}
        await asyncio.gather(*(_leave(subscription) for subscription in leaving.values()))

    async def _follow(self) -> None:
        async for event in self._events:
            if isinstance(event, ModelStateChanged):
                await self._sync()

    async def _renew(self, nc: Client) -> None:
        """A fresh connection: what was subscribed went with the old one."""
        async with self._one_at_a_time:
            self._subscriptions.clear()
            self._nc = nc
        await self._sync()

    async def _sync(self) -> None:
        async with self._one_at_a_time:
            nc = self._nc
            if self._closed or nc is None or nc is not self._bus.nc:
                return
            workers = self._fleet.workers.values()
            joining = [worker for worker in workers if self._is_due(worker) and worker.name not in self._subscriptions]
            if joining and self._before is not None:
                await self._before(joining)
            for worker in self._fleet.workers.values():
                subscribed = worker.name in self._subscriptions
                if self._is_due(worker) and not subscribed:
                    await self._join(nc, worker)
                elif subscribed and not self._is_due(worker):
                    await _leave(self._subscriptions.pop(worker.name))

    def _is_due(self, worker: Worker) -> bool:
        return is_served(worker) and self._only(worker)

    async def _join(self, nc: Client, worker: Worker) -> None:
        async def receive(message: Msg) -> None:
            await self._handler(worker, message)

        subject = self._subject(worker)
        try:
            self._subscriptions[worker.name] = await nc.subscribe(subject, queue=self._queue(worker), cb=receive)
        except NatsError as error:
            if not nc.is_closed:
                log.error(
                    "cannot subscribe to %s: %s",
                    subject,
                    error,
                    extra={"code": "nats.subscribe_failed", "model": worker.name},
                )


async def _leave(subscription: Subscription) -> None:
    # Drained, not dropped: a request that is already on its way gets its refusal instead of a time-out.
    await bounded(subscription.drain(), _DRAIN_S)  # type: ignore[no-untyped-call]
