"""What happened on a node, as typed events, and the bus that hands them to whoever watches.

The screen, server-sent events, heartbeats and the event log all read the same events. The bus lives on the loop's
thread; only `publish_threadsafe` may be called from another. A subscriber that does not keep up loses its oldest events
and is told how many.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from infsvc.types import ModelState


@dataclass(frozen=True, kw_only=True)
class Event:
    """The root. `ts` is seconds since the epoch; `node` the node's name."""

    type: ClassVar[str] = "event"
    ts: float = field(default_factory=time.time)
    node: str = ""
    model: str | None = None

    def wire(self) -> dict[str, Any]:
        """The event as one JSON object; absent fields are left out."""
        return {"type": self.type} | {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ModelStateChanged(Event):
    type: ClassVar[str] = "model.state"
    state: ModelState
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelProgress(Event):
    """A download's or a load's progress in bytes."""

    type: ClassVar[str] = "model.progress"
    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None = None
    eta_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class RequestStarted(Event):
    """A request was admitted."""

    type: ClassVar[str] = "request.started"
    req_id: str
    tokens_in: int
    source: str


@dataclass(frozen=True, kw_only=True)
class RequestFinished(Event):
    type: ClassVar[str] = "request.finished"
    req_id: str
    tokens_in: int
    tokens_out: int
    tokens_cached: int = 0
    ttft_ms: float | None
    duration_ms: float
    finish_reason: str
    source: str


@dataclass(frozen=True, kw_only=True)
class QueueReported(Event):
    type: ClassVar[str] = "queue.report"
    report: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServiceHealth(Event):
    type: ClassVar[str] = "service.health"
    document: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BrokerStateChanged(Event):
    """`state` is `starting`, `connected`, `down` or `off`; `embedded` says whose broker it is."""

    type: ClassVar[str] = "broker.state"
    state: str
    url: str
    embedded: bool
    reason: str | None = None
    retry_in_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class LogLine(Event):
    """One line of the structured log. `code` is a word such as `model.loaded`; `meta` its figures."""

    type: ClassVar[str] = "log"
    level: str
    code: str
    msg: str
    meta: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class DeadLettersChanged(Event):
    """A dead letter came or went, on any node; `n_kept` is how many the broker keeps."""

    type: ClassVar[str] = "queue.dead"
    n_kept: int


@dataclass(frozen=True, kw_only=True)
class Alert(Event):
    type: ClassVar[str] = "alert"
    level: str
    msg: str


class Subscription:
    """A bounded view of the bus, read with `async for`. Iteration ends after `close()`."""

    def __init__(self, bus: EventBus, size: int) -> None:
        self._bus = bus
        self._items: deque[Event] = deque(maxlen=size)
        self._wake = asyncio.Event()
        self._closed = False
        self.n_lost = 0

    def _put(self, event: Event) -> None:
        if len(self._items) == self._items.maxlen:
            self.n_lost += 1
        self._items.append(event)
        self._wake.set()

    def drain(self) -> list[Event]:
        """All that has come since the last read."""
        items = list(self._items)
        self._items.clear()
        return items

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            # One at a time: a reader that leaves takes nothing with it.
            while self._items:
                yield self._items.popleft()
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()

    def close(self) -> None:
        """Ends the iteration and leaves the bus."""
        self._closed = True
        self._wake.set()
        self._bus._forget(self)


class EventBus:
    """Hands each event to every subscriber, on the loop's thread, and keeps the last `n_recent` for those who come
    later."""

    def __init__(self, node: str, *, n_recent: int = 2000) -> None:
        self._node = node
        self._subscriptions: list[Subscription] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._recent: deque[Event] = deque(maxlen=n_recent)
        self._loop: asyncio.AbstractEventLoop | None = None

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Names the loop that `publish_threadsafe` posts to."""
        self._loop = loop

    def publish(self, event: Event) -> None:
        """Hands the event to all. Loop thread only; never blocks."""
        if not event.node:
            object.__setattr__(event, "node", self._node)
        self._recent.append(event)
        for listener in self._listeners:
            listener(event)
        for subscription in self._subscriptions:
            subscription._put(event)

    def publish_threadsafe(self, event: Event) -> None:
        """The same from any thread; dropped when the loop is gone."""
        if self._loop is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.publish, event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Calls `listener` inline for each event; it must be quick and must not raise."""
        self._listeners.append(listener)

    def subscribe(self, *, size: int = 1000, replay: bool = False) -> Subscription:
        """A new subscription; with `replay` it begins with the recent events."""
        subscription = Subscription(self, size)
        if replay:
            for event in self._recent:
                subscription._put(event)
        self._subscriptions.append(subscription)
        return subscription

    def _forget(self, subscription: Subscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)
