"""Health on request, heartbeats and reports at their beat, levels and alerts; events also without a broker."""

from __future__ import annotations

import json
from typing import Any

import pytest
from nats.errors import NoRespondersError

from infsvc.events import Alert, Event, EventBus, QueueReported, ServiceHealth
from infsvc.home import Home
from infsvc.types import HealthDocument, ModelState
from transports.nats import heartbeat as module
from transports.nats.bus import Bus
from transports.nats.heartbeat import Heartbeats, _Beat

from .conftest import PATIENCE_S, Doors, asked, client_of, happened, told
from .fakes import FakeFleet, FakeWorker


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the pace."""
    monkeypatch.setattr(module, "BUSY_S", 0.01)
    monkeypatch.setattr(module, "_SLACK_S", 0.0)


@pytest.fixture
async def dotted(url: str, home: Home, events: EventBus) -> Any:
    async with Doors(url, home, events, FakeWorker("tiny-v1.5", events)) as doors:
        yield doors


async def test_health_is_answered(doors: Doors, client: Any) -> None:
    document = await asked(client, "models.demo.health", b"")
    assert HealthDocument.model_validate(document).model_name == "demo"
    assert document["status"] == "online"
    assert document["last_activity"] is None


async def test_health_of_a_model_nobody_asked_for_is_not(url: str, home: Home, events: EventBus) -> None:
    idle = FakeWorker("idle", events)
    idle.asked, idle.state = False, ModelState.ON_DISK
    async with Doors(url, home, events, FakeWorker("demo", events), idle), client_of(url) as client:
        with pytest.raises(NoRespondersError):
            await client.request("models.idle.health", b"", timeout=PATIENCE_S)


async def test_a_change_of_state_is_a_heartbeat_at_once_under_both_names(dotted: Doors, url: str) -> None:
    async with client_of(url) as client:
        literal = await client.subscribe("models.tiny-v1.5.heartbeat")
        wildcard = await client.subscribe("models.*.heartbeat")
        await client.flush()
        dotted.worker.move(ModelState.DRAINING)
        assert (await told(literal))["status"] == "draining"
        message = await wildcard.next_msg(timeout=PATIENCE_S)
        assert message.subject == "models.tiny-v1_5.heartbeat"
        assert json.loads(message.data)["model_name"] == "tiny-v1.5"


async def test_heartbeats_go_on_by_themselves(doors: Doors, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)
    beats = await client.subscribe("models.demo.heartbeat")
    for _ in range(3):
        assert (await told(beats))["status"] == "online"


async def test_the_last_heartbeat_says_offline(url: str, home: Home, events: EventBus) -> None:
    async with Doors(url, home, events) as doors, client_of(url) as client:
        beats = await client.subscribe("models.demo.heartbeat")
        await client.flush()
        await doors.heartbeats.close()
        assert (await told(beats))["status"] == "offline"


async def test_reports_show_the_level_under_both_names(dotted: Doors, url: str, events: EventBus) -> None:
    async with client_of(url) as client:
        literal = await client.subscribe("monitoring.inference.tiny-v1.5")
        wildcard = await client.subscribe("monitoring.inference.*")
        await client.flush()
        for waiting, level in ((1, "healthy"), (5, "warning"), (10, "critical")):
            dotted.worker.n_in_line = waiting
            for subscription in (literal, wildcard):
                while (report := await told(subscription))["pending_messages"] != waiting:
                    pass
                assert report["status"] == level
        event = await happened(
            events, lambda event: isinstance(event, QueueReported) and event.report["status"] == "critical"
        )
        assert event.model == "tiny-v1.5"


async def test_a_rise_to_critical_is_one_alert(doors: Doors, client: Any, events: EventBus) -> None:
    alerts = await client.subscribe("monitoring.alerts")
    totals = await client.subscribe("monitoring.aggregate")
    await client.flush()
    doors.worker.n_in_line = 11
    alert = await told(alerts)
    assert (alert["type"], alert["model"], alert["level"]) == ("alert", "demo", "critical")
    assert alert["msg"] == "demo has 11 requests waiting"
    for _ in range(5):
        await told(totals)
    assert alerts.pending_msgs == 0
    await happened(events, lambda event: isinstance(event, Alert))


async def test_a_failed_model_is_an_alert(doors: Doors, client: Any) -> None:
    alerts = await client.subscribe("monitoring.alerts")
    await client.flush()
    doors.worker.move(ModelState.FAILED, "no such file")
    assert (await told(alerts))["msg"] == "demo failed: no such file"


async def test_the_aggregate_is_the_sum(url: str, home: Home, events: EventBus) -> None:
    first, second = FakeWorker("a", events), FakeWorker("b", events)
    first.n_in_line, second.n_in_line, second.n_active = 2, 6, 4
    async with Doors(url, home, events, first, second), client_of(url) as client:
        total = await told(await client.subscribe("monitoring.aggregate"))
    expected = {"node": "test", "models": 2, "models_ready": 2, "pending_messages": 8, "active_processing": 4}
    assert expected.items() <= total.items()
    assert (total["status"], total["queue_capacity"]) == ("warning", 4000)


async def test_dead_letters_stand_in_the_totals_at_once(doors: Doors, client: Any) -> None:
    totals = await client.subscribe("monitoring.aggregate")
    await client.flush()
    await client.jetstream().publish("inference.queue.demo", b"nonsense")
    while (await told(totals)).get("dead_letters") != 1:
        pass


async def test_events_go_on_without_a_broker(url: str, home: Home, events: EventBus) -> None:
    worker = FakeWorker("demo", events)
    fleet: Any = FakeFleet(worker)
    bus = Bus(url, embedded="off", home=home, events=events, node="test")
    heartbeats = Heartbeats(bus, fleet, events, "test")
    await bus.start()
    await heartbeats.start()
    worker.n_in_line = 1
    await happened(events, lambda event: isinstance(event, QueueReported), replay=False)
    worker.move(ModelState.DRAINING)

    def drained(event: Event) -> bool:
        return isinstance(event, ServiceHealth) and event.document["status"] == "draining"

    await happened(events, drained)
    await heartbeats.close()
    await bus.close()


def test_the_beat_is_quick_with_work_and_says_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUSY_S", 1.0)
    beat = _Beat()
    said = [(now, busy) for now, busy in ((0, False), (1, False), (2, False))]
    assert [beat.due(now, busy=busy) for now, busy in said] == [True, False, False]
    assert [beat.due(now, busy=True) for now in (3, 4)] == [True, True]
    assert [beat.due(now, busy=False) for now in (5, 6, 14, 15)] == [True, False, False, True]
