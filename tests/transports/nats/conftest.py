"""A real broker on a free port, a real client, and a node's doors in front of a fake service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from infsvc.events import BrokerStateChanged, Event, EventBus
from infsvc.home import Home
from tests.nodes import free_port
from transports.nats.broker import EmbeddedBroker
from transports.nats.bus import Bus
from transports.nats.durable import Durable
from transports.nats.exchange import Exchanges
from transports.nats.front_door import FrontDoor
from transports.nats.heartbeat import Heartbeats
from transports.nats.queue_desk import QueueDesk

from .fakes import FakeFleet, FakeService, FakeWorker

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spool looks again soon, so that a test need not wait for it."""
    monkeypatch.setattr("transports.nats.spool.NAMED_GRACE_S", 0.5)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home", tmp_path / "shipped")


@pytest.fixture
def url() -> str:
    return f"nats://127.0.0.1:{free_port()}"


@pytest.fixture
def events() -> EventBus:
    return EventBus("test")


@pytest.fixture
async def broker(home: Home, url: str) -> AsyncIterator[EmbeddedBroker]:
    broker = EmbeddedBroker(home, url)
    await broker.start()
    yield broker
    await broker.stop()


async def happened(events: EventBus, wanted: Callable[[Event], bool], *, replay: bool = True) -> Event:
    """The first event that is wanted, past ones included."""
    subscription = events.subscribe(replay=replay)
    try:
        async with asyncio.timeout(PATIENCE_S):
            async for event in subscription:
                if wanted(event):
                    return event
    finally:
        subscription.close()
    raise AssertionError("the bus of events ended")


async def broker_is(events: EventBus, state: str, *, replay: bool = True) -> BrokerStateChanged:
    event = await happened(
        events, lambda event: isinstance(event, BrokerStateChanged) and event.state == state, replay=replay
    )
    assert isinstance(event, BrokerStateChanged)
    return event


async def told(subscription: Subscription) -> dict[str, Any]:
    """The next message's JSON."""
    message = await subscription.next_msg(timeout=PATIENCE_S)
    body: dict[str, Any] = json.loads(message.data)
    return body


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    client = Client()
    try:
        await client.connect(url, allow_reconnect=False, error_cb=_quiet)
        yield client
    finally:
        await client.close()


async def _quiet(error: Exception) -> None:
    pass


class Doors:
    """A node's NATS side: bus, front door and heartbeats, with one model `demo` unless others are given."""

    def __init__(self, url: str, home: Home, events: EventBus, *workers: FakeWorker) -> None:
        self.events = events
        self.fleet = FakeFleet(*(workers or (FakeWorker("demo", events),)))
        self.service = FakeService()
        self.stopping = asyncio.Event()
        self.bus = Bus(url, embedded="auto", home=home, events=events, node="test")
        fleet: Any = self.fleet
        service: Any = self.service
        exchanges = Exchanges(self.bus, service)
        self.durable = Durable(self.bus, fleet, service, exchanges, "test")
        self.desk = QueueDesk(self.durable, fleet, service, exchanges)
        self.front_door = FrontDoor(self.bus, fleet, service, exchanges, self.durable, self.desk, self.stopping)
        self.heartbeats = Heartbeats(self.bus, fleet, events, "test")

    async def __aenter__(self) -> Doors:
        async with AsyncExitStack() as exits:
            for part in (self.bus, self.durable, self.front_door, self.heartbeats):
                await part.start()
                exits.push_async_callback(part.close)
            await broker_is(self.events, "connected")
            self._exits = exits.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    @property
    def worker(self) -> FakeWorker:
        return next(iter(self.fleet.workers.values()))


@pytest.fixture
async def doors(url: str, home: Home, events: EventBus) -> AsyncIterator[Doors]:
    async with Doors(url, home, events) as doors:
        yield doors


@pytest.fixture
async def client(doors: Doors, url: str) -> AsyncIterator[Client]:
    async with client_of(url) as client:
        yield client


async def asked(client: Client, subject: str, body: Any, **extra: Any) -> dict[str, Any]:
    """Sends a request and returns the reply's JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    message = await client.request(subject, data, timeout=PATIENCE_S, **extra)
    answer: dict[str, Any] = json.loads(message.data)
    return answer
