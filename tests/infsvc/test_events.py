"""The bus: everybody hears everything in order, and who is slow is told what was lost."""

from __future__ import annotations

import asyncio
import json
import threading

from infsvc.events import Alert, Event, EventBus, LogLine, ModelStateChanged, Subscription
from infsvc.types import ModelState


def alert(n: int) -> Alert:
    return Alert(level="info", msg=str(n))


def numbers(events: list[Event]) -> list[int]:
    return [int(event.msg) for event in events if isinstance(event, Alert)]


async def test_all_hear_all_in_order() -> None:
    bus, heard = EventBus("here"), []
    bus.listen(heard.append)
    first, second = bus.subscribe(), bus.subscribe()
    for n in range(5):
        bus.publish(alert(n))
    assert numbers(first.drain()) == numbers(second.drain()) == numbers(heard) == [0, 1, 2, 3, 4]
    assert first.drain() == []


async def test_an_event_gets_the_nodes_name_unless_it_has_one() -> None:
    bus = EventBus("here")
    subscription = bus.subscribe()
    bus.publish(alert(1))
    bus.publish(Alert(level="info", msg="2", node="elsewhere"))
    assert [event.node for event in subscription.drain()] == ["here", "elsewhere"]


async def test_who_is_slow_loses_the_oldest_and_is_told_how_many() -> None:
    bus = EventBus("here")
    slow, quick = bus.subscribe(size=3), bus.subscribe(size=100)
    for n in range(10):
        bus.publish(alert(n))
    assert numbers(slow.drain()) == [7, 8, 9]
    assert (slow.n_lost, quick.n_lost) == (7, 0)
    bus.publish(alert(10))
    assert numbers(slow.drain()) == [10]
    assert slow.n_lost == 7


async def test_who_comes_late_may_have_the_recent_ones() -> None:
    bus = EventBus("here", n_recent=3)
    for n in range(5):
        bus.publish(alert(n))
    assert bus.subscribe().drain() == []
    late = bus.subscribe(replay=True)
    bus.publish(alert(5))
    assert numbers(late.drain()) == [2, 3, 4, 5]


async def read(subscription: Subscription, n: int) -> list[int]:
    found: list[Event] = []
    async for event in subscription:
        found.append(event)
        if len(found) == n:
            break
    return numbers(found)


async def test_iteration_waits_for_what_comes() -> None:
    bus = EventBus("here")
    subscription = bus.subscribe()
    reading = asyncio.create_task(read(subscription, 3))
    for n in range(3):
        await asyncio.sleep(0)
        bus.publish(alert(n))
    assert await reading == [0, 1, 2]


async def test_a_reader_that_leaves_takes_nothing_with_it() -> None:
    bus = EventBus("here")
    subscription = bus.subscribe()
    for n in range(4):
        bus.publish(alert(n))
    assert await read(subscription, 1) == [0]
    assert await read(subscription, 2) == [1, 2]
    assert numbers(subscription.drain()) == [3]


async def test_close_ends_the_iteration_after_what_is_there() -> None:
    bus = EventBus("here")
    subscription = bus.subscribe()
    reading = asyncio.create_task(read(subscription, 99))
    await asyncio.sleep(0)
    bus.publish(alert(1))
    subscription.close()
    subscription.close()
    bus.publish(alert(2))
    assert await reading == [1]


async def test_publish_from_another_thread() -> None:
    bus = EventBus("here")
    subscription = bus.subscribe()
    bus.publish_threadsafe(alert(0))
    bus.bind(asyncio.get_running_loop())
    heard_on: list[str] = []
    bus.listen(lambda event: heard_on.append(threading.current_thread().name))

    def publish() -> None:
        for n in range(1, 50):
            bus.publish_threadsafe(alert(n))

    await asyncio.to_thread(publish)
    assert await read(subscription, 49) == list(range(1, 50))
    assert set(heard_on) == {threading.current_thread().name}


def test_a_loop_that_is_gone_is_no_error() -> None:
    bus = EventBus("here")
    loop = asyncio.new_event_loop()
    bus.bind(loop)
    loop.close()
    bus.publish_threadsafe(alert(1))


def test_on_the_wire() -> None:
    event = ModelStateChanged(ts=5.0, node="here", model="m", state=ModelState.READY)
    assert json.loads(json.dumps(event.wire())) == {
        "type": "model.state",
        "ts": 5.0,
        "node": "here",
        "model": "m",
        "state": "ready",
    }
    line = LogLine(ts=5.0, node="here", level="info", code="startup", msg="x", meta={"a": 1})
    assert line.wire()["meta"] == {"a": 1}
    assert "model" not in line.wire()
