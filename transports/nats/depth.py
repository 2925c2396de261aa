"""How many requests wait in one model's queue, and a place in it for one more.

QUEUE_MAX_MSGS bounds what waits. The queue's stream also holds what nodes work on, and for a moment what is answered
and not acknowledged yet; so the broker's own bound is higher by MAX_ACK_PENDING, and who puts a request there asks here
first. Far from the bound that costs nothing: what this node has put since the broker's last word counts as waiting.
Near it, requests are put one at a time, each after asking the broker. Nodes that do so at the same moment may put some
requests too many, which the broker's bound has room for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from engine.service import retry_after_s
from engine.worker import Worker
from infsvc.errors import QueueFull
from transports.nats.jetstream import JetStream, JetStreamFault, seconds_of


class Depth:
    """Loop thread only.

    Args:
        changed: called when `n_pending` has; brings the worker's own figure up to date.
    """

    def __init__(self, worker: Worker, js: JetStream, *, changed: Callable[[], None]) -> None:
        self._worker, self._js, self._changed = worker, js, changed
        self.n_pending = 0
        """Messages that no node has, by the broker's last word."""
        self._n_landed = self._n_flying = 0
        self._n_heard: int | None = None
        self._landed = asyncio.Event()
        self._alone = asyncio.Lock()
        self._ahead_s = 0.0

    def now_s(self) -> float:
        """The time by the broker's clock, which stamps messages; seconds since the epoch."""
        return time.time() + self._ahead_s

    def heard(self, n_pending: int) -> None:
        """A delivered message tells how many are behind it."""
        self.n_pending = n_pending
        self._n_heard = n_pending if self._n_heard is None else min(n_pending, self._n_heard)

    async def read(self) -> None:
        """Asks the broker; raises `JetStreamFault`."""
        settings, n_landed = self._worker.settings, self._n_landed
        self._n_heard = None
        info = await self._js.call(f"CONSUMER.INFO.{settings.stream_name}.{settings.queue_durable}")
        n_pending = int(info["num_pending"])
        # What was delivered while the answer was on its way would count twice: as pending, and as being here.
        self.n_pending = n_pending if self._n_heard is None else min(n_pending, self._n_heard)
        self._n_landed -= min(n_landed, self._n_landed)
        if "ts" in info:  # brokers before 2.10 do not tell it
            self._ahead_s = seconds_of(info["ts"]) - time.time()
        self._changed()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Around the putting of one request.

        Raises:
            QueueFull: as many as QUEUE_MAX_MSGS wait.
        """
        worker = self._worker
        capacity = worker.settings.queue_max_msgs
        if worker.n_waiting + self._n_landed + self._n_flying < capacity and not self._alone.locked():
            with self._flight():
                yield
            return
        async with self._alone:
            while self._n_flying:
                self._landed.clear()
                await self._landed.wait()
            with suppress(JetStreamFault):  # the putting itself will say what is wrong
                await self.read()
            if worker.n_waiting >= capacity:
                raise self.full(worker.n_waiting)
            with self._flight():
                yield

    @contextmanager
    def _flight(self) -> Iterator[None]:
        self._n_flying += 1
        try:
            yield
        finally:
            self._n_flying -= 1
            self._n_landed += 1
            self._landed.set()

    def full(self, n_waiting: int) -> QueueFull:
        worker = self._worker
        return QueueFull(
            model=worker.name,
            n_waiting=n_waiting,
            capacity=worker.settings.queue_max_msgs,
            retry_after_s=retry_after_s(worker),
        )
