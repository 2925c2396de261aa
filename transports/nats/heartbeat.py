"""Health and reports out: what a node says of its models on NATS, and at the same beat on the node's own events.

It stands apart because it must go on when NATS does not: the events are published first, the messages go through a
bounded outbox that one task empties, and what finds no connection is dropped, since a late heartbeat says nothing.

| subject | when |
|---|---|
| `models.<m>.health` | on request |
| `models.<m>.heartbeat` | every 30 s, on a change of state, on a fresh connection |
| `<MONITORING_TOPIC>.<m>` | every 1 s while work waits or runs, once when it has ended, every 10 s idle |
| `monitoring.aggregate` | the same, for all models of the node; at once when dead letters come or go |
| `monitoring.alerts` | a level's rise to critical, a failed model; `durable` adds dead letters and a broker's faults |
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.fleet import Fleet
from engine.worker import Worker
from infsvc import subjects
from infsvc.events import Alert, DeadLettersChanged, EventBus, ModelStateChanged, QueueReported, ServiceHealth
from infsvc.types import ModelState
from transports.nats.bus import Bus, bounded
from transports.nats.messages import encode
from transports.nats.subscriptions import ModelSubscriptions, is_served

log = logging.getLogger("infsvc.nats")

HEARTBEAT_S = 30.0
BUSY_S = 1.0
IDLE_S = 10.0
_OUTBOX = 512
_SLACK_S = 0.05
"""A beat that comes this little too early is not put off by a whole one."""
_RANK = {"healthy": 0, "warning": 1, "critical": 2}


class _Beat:
    """When something is due that comes often while there is work and seldom without."""

    def __init__(self) -> None:
        self._last_s = float("-inf")
        self._was_busy = False

    def due(self, now_s: float, *, busy: bool) -> bool:
        interval_s = BUSY_S if busy or self._was_busy else IDLE_S
        if now_s - self._last_s < interval_s - _SLACK_S:
            return False
        self._last_s, self._was_busy = now_s, busy
        return True


class Heartbeats:
    """Publishes health and reports. Loop thread only.

    Args:
        node: the node's name.
    """

    def __init__(self, bus: Bus, fleet: Fleet, events: EventBus, node: str) -> None:
        self._bus, self._fleet, self._events, self._node = bus, fleet, events, node
        self._seen = events.subscribe()
        self._outbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(maxsize=_OUTBOX)
        self._tasks: list[asyncio.Task[None]] = []
        self._report_beats: dict[str, _Beat] = {}
        self._total_beat = _Beat()
        self._heartbeat_s: dict[str, float] = {}
        self._levels: dict[str, str] = {}
        self._n_dead: int | None = None
        self._replies = ModelSubscriptions(
            bus, fleet, name="health", subject=lambda worker: subjects.health(worker.name), handler=self._reply
        )
        bus.on_connected(self._greet)

    async def start(self) -> None:
        await self._replies.start()
        for name, work in (("follow", self._follow()), ("beat", self._beat()), ("outbox", self._send())):
            self._tasks.append(asyncio.create_task(work, name=f"nats-heartbeat-{name}"))

    async def close(self) -> None:
        """Ends the beats, says that the models go offline, and gives the outbox half a second to empty."""
        await self._replies.close()
        self._seen.close()
        if self._tasks:
            follow, beat, send = self._tasks
            await asyncio.wait({follow}, timeout=0.5)
            beat.cancel()
            for worker in self._served():
                for name in _spellings(worker.name):
                    self._put(subjects.heartbeat(name), _health(worker) | {"status": "offline"})
            await bounded(self._outbox.join(), 0.5)
            for task in (follow, send):
                task.cancel()
            await asyncio.wait(self._tasks, timeout=0.5)
            self._tasks = []

    async def _reply(self, worker: Worker, message: Msg) -> None:
        if message.reply:
            await self._bus.publish(message.reply, encode(_health(worker)))

    async def _greet(self, nc: Client) -> None:
        for worker in self._served():
            self._heartbeat(worker)

    async def _follow(self) -> None:
        async for event in self._seen:
            if isinstance(event, DeadLettersChanged):
                self._n_dead = event.n_kept
                self._put(subjects.AGGREGATE, self._totals())
            elif isinstance(event, ModelStateChanged) and event.model in self._fleet.workers:
                try:
                    self._changed(self._fleet.workers[event.model], event)
                except Exception:
                    log.exception("a heartbeat could not be made", extra={"code": "monitoring.failed"})

    def _changed(self, worker: Worker, event: ModelStateChanged) -> None:
        self._heartbeat(worker)
        if event.state is ModelState.FAILED:
            self._alert(worker, f"{worker.name} failed: {event.reason or worker.reason or 'no reason given'}")

    async def _beat(self) -> None:
        while True:
            try:
                self._tick(time.monotonic())
            except Exception:
                # One model's wrong figures must not silence the whole node.
                log.exception("a report could not be made", extra={"code": "monitoring.failed"})
            await asyncio.sleep(BUSY_S)

    def _tick(self, now_s: float) -> None:
        workers = self._served()
        for worker in workers:
            busy = worker.n_waiting + worker.n_active > 0
            if self._report_beats.setdefault(worker.name, _Beat()).due(now_s, busy=busy):
                self._report(worker)
            if now_s - self._heartbeat_s.get(worker.name, float("-inf")) >= HEARTBEAT_S - _SLACK_S:
                self._heartbeat(worker)
        if self._total_beat.due(now_s, busy=any(worker.n_waiting + worker.n_active for worker in workers)):
            self._put(subjects.AGGREGATE, self._totals())

    def _totals(self) -> dict[str, Any]:
        # Not this node's alone: what the broker keeps of all models, as last counted.
        dead = {} if self._n_dead is None else {"dead_letters": self._n_dead}
        return _totals(self._node, self._served()) | dead

    def _served(self) -> list[Worker]:
        return [worker for worker in self._fleet.workers.values() if is_served(worker)]

    def _heartbeat(self, worker: Worker) -> None:
        self._heartbeat_s[worker.name] = time.monotonic()
        document = _health(worker)
        self._events.publish(ServiceHealth(model=worker.name, document=document))
        for name in _spellings(worker.name):
            self._put(subjects.heartbeat(name), document)

    def _report(self, worker: Worker) -> None:
        report = worker.report().model_dump(mode="json")
        self._events.publish(QueueReported(model=worker.name, report=report))
        for name in _spellings(worker.name):
            self._put(subjects.report(worker.settings.monitoring_topic, name), report)
        level, before = report["status"], self._levels.get(worker.name, "healthy")
        self._levels[worker.name] = level
        if level == "critical" and before != "critical":
            self._alert(worker, f"{worker.name} has {report['pending_messages']} requests waiting")

    def _alert(self, worker: Worker, message: str) -> None:
        alert = Alert(model=worker.name, node=self._node, level="critical", msg=message)
        self._events.publish(alert)
        self._put(subjects.ALERTS, alert.wire())

    def _put(self, subject: str, document: dict[str, Any]) -> None:
        if self._bus.nc is None:
            return
        if self._outbox.full():
            self._outbox.get_nowait()
            self._outbox.task_done()
        self._outbox.put_nowait((subject, encode(document)))

    async def _send(self) -> None:
        while True:
            subject, data = await self._outbox.get()
            try:
                await self._bus.publish(subject, data)
            finally:
                self._outbox.task_done()


def _spellings(model: str) -> list[str]:
    """The subject tokens of a name: as it is, and without dots when it has some."""
    return list(dict.fromkeys((model, subjects.dotless(model))))


def _health(worker: Worker) -> dict[str, Any]:
    return worker.health().model_dump(mode="json")


def _totals(node: str, workers: list[Worker]) -> dict[str, Any]:
    reports = [worker.report() for worker in workers]
    return {
        "node": node,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "models": len(reports),
        "models_ready": sum(worker.state is ModelState.READY for worker in workers),
        "pending_messages": sum(report.pending_messages for report in reports),
        "active_processing": sum(report.active_processing for report in reports),
        "queue_capacity": sum(report.queue_capacity for report in reports),
        "worker_count": sum(report.worker_count for report in reports),
        "total_processed": sum(worker.stats.n_finished for worker in workers),
        "tokens_per_s": round(sum(worker.stats.tokens_per_s() for worker in workers), 1),
        "status": max((report.status for report in reports), key=_RANK.__getitem__, default="healthy"),
    }
