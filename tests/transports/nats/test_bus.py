"""The connection's circle: whose broker it is, loss and return, what is said of it, and an end that is never long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest
from nats.aio.client import Client

from infsvc.errors import ConfigError
from infsvc.events import BrokerStateChanged, EventBus
from infsvc.home import Home
from transports.nats.broker import EmbeddedBroker, Listener, probe
from transports.nats.bus import Bus, bounded

from .conftest import broker_is, client_of, free_port, happened


def make_bus(url: str, home: Home, events: EventBus, *, embedded: str = "auto") -> Bus:
    return Bus(url, embedded="auto" if embedded == "auto" else "off", home=home, events=events, node="test")


async def test_starts_a_broker_where_none_is(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    fresh: list[Client] = []

    async def remember(nc: Client) -> None:
        assert bus.state.status == "starting"
        fresh.append(nc)

    bus.on_connected(remember)
    await bus.start()
    said = await broker_is(events, "connected")
    assert said.embedded
    assert bus.state.embedded
    assert fresh == [bus.nc]
    assert bus.max_payload == 8 * 2**20
    await bus.close()
    assert bus.state.status == "off"
    assert not await bus.publish("anywhere", b"")


async def test_uses_a_broker_that_is_there(broker: EmbeddedBroker, url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    await bus.start()
    assert not (await broker_is(events, "connected")).embedded
    await bus.close()
    assert broker.running


async def test_restarts_its_own_broker_when_it_is_killed(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    calls: list[Client] = []

    async def subscribe(nc: Client) -> None:
        calls.append(nc)

    bus.on_connected(subscribe)
    await bus.start()
    await broker_is(events, "connected")
    assert bus._broker is not None
    assert bus._broker.pid is not None
    os.kill(bus._broker.pid, signal.SIGKILL)
    down = await broker_is(events, "down")
    assert down.reason == "the connection was lost"
    assert down.retry_in_s == 0.5
    await broker_is(events, "connected", replay=False)
    assert len(calls) == 2
    assert calls[1] is bus.nc
    await bus.close()


async def test_takes_over_when_somebody_elses_broker_goes(
    broker: EmbeddedBroker, url: str, home: Home, events: EventBus
) -> None:
    mine = Home(home.root.with_name("mine"), home.shipped)
    bus = make_bus(url, mine, events)
    await bus.start()
    await broker_is(events, "connected")
    await broker.stop()
    await happened(events, lambda event: isinstance(event, BrokerStateChanged) and event.embedded)
    assert bus.state.status == "connected"
    await bus.close()


async def test_a_stuck_broker_of_its_own_is_replaced(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    await bus.start()
    await broker_is(events, "connected")
    assert bus._broker is not None
    first = bus._broker.pid
    assert first is not None
    os.kill(first, signal.SIGSTOP)
    assert bus.nc is not None
    await bounded(bus.nc.close(), 0.5)  # what three unanswered pings do after a quarter of a minute
    await broker_is(events, "down")
    await broker_is(events, "connected", replay=False)
    assert bus._broker.pid not in (None, first)
    await bus.close()


async def test_a_port_taken_by_another_program_is_said_and_tried_again(home: Home, events: EventBus) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    bus = make_bus(f"nats://127.0.0.1:{port}", home, events)
    async with server:
        await bus.start()
        down = await broker_is(events, "down")
        assert down.reason is not None
        assert f"127.0.0.1:{port} is taken by something" in down.reason
        second = await happened(
            events, lambda event: isinstance(event, BrokerStateChanged) and (event.retry_in_s or 0) > 0.5
        )
        assert isinstance(second, BrokerStateChanged)
        assert second.retry_in_s == 1.0
    await broker_is(events, "connected")
    await bus.close()


async def test_without_an_embedded_one_a_missing_broker_is_a_state(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events, embedded="off")
    begun = time.monotonic()
    await bus.start()
    assert time.monotonic() - begun < 0.1
    down = await broker_is(events, "down")
    assert down.reason is not None
    assert down.reason.startswith(f"cannot connect to {url}: ")
    assert "refused" in down.reason or "Connect call failed" in down.reason
    assert not await bus.publish("anywhere", b"")
    await bus.close()


@pytest.mark.parametrize("login", ["me:p%40ss@", "t%40ken@"])
async def test_user_and_password_work_and_are_never_shown(
    login: str, home: Home, events: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    port = free_port()
    bus = make_bus(f"nats://{login}127.0.0.1:{port}", home, events)
    await bus.start()
    await broker_is(events, "connected")
    await bus.close()
    everything = caplog.text + json.dumps([event.wire() for event in events.subscribe(replay=True).drain()])
    assert bus.state.url == f"nats://127.0.0.1:{port}"
    for secret in ("p%40ss", "p@ss", "t%40ken", "t@ken"):
        assert secret not in everything


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nats://a:b@host:1", "nats://host:1"),
        ("host", "nats://host:4222"),
        ("nats://a:b@h1:1, tls://c@h2", "nats://h1:1,tls://h2:4222"),
        ("nats://[::1]:5", "nats://[::1]:5"),
    ],
)
def test_what_is_shown_of_a_url(url: str, text: str, home: Home, events: EventBus) -> None:
    assert make_bus(url, home, events).state.url == text


@pytest.mark.parametrize("url", ["", ",", "nats://", "nats://me:secret@host:port", "http://host", "nats://h:1,x://h"])
def test_what_is_no_url(url: str, home: Home, events: EventBus) -> None:
    with pytest.raises(ConfigError, match="INFSVC_NATS_URL: not nats://") as caught:
        make_bus(url, home, events)
    assert "secret" not in str(caught.value)


async def test_close_is_quick_when_the_broker_hangs(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    await bus.start()
    await broker_is(events, "connected")
    assert bus._broker is not None
    assert bus._broker.pid is not None
    os.kill(bus._broker.pid, signal.SIGSTOP)
    await bus.publish("anywhere", bytes(2**20))
    begun = time.monotonic()
    await bus.close()
    assert time.monotonic() - begun < 2.5
    assert not bus._broker.running


async def test_close_while_it_starts(url: str, home: Home, events: EventBus) -> None:
    bus = make_bus(url, home, events)
    await bus.start()
    await asyncio.sleep(0)
    await bus.close()
    assert bus._broker is not None
    assert not bus._broker.running
    assert await probe(bus._broker.host, bus._broker.port) is Listener.NOTHING


async def test_a_broken_callback_does_not_end_the_connection(
    url: str, home: Home, events: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(nc: Client) -> None:
        raise RuntimeError("a door's own fault")

    bus = make_bus(url, home, events)
    bus.on_connected(breaks)
    await bus.start()
    await broker_is(events, "connected")
    async with client_of(url) as client:
        assert client.is_connected
    await bus.close()
    assert "a door's own fault" in caplog.text
