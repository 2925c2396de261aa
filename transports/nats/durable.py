"""The durable queues of all models that this node serves: made when a model is served, kept true over connections, and
handed over when the node leaves.

It stands apart from one model's `WorkQueue` because of what concerns them together: whether the broker has JetStream at
all, streams of an operator's own that spoil the promise, dead letters, and the question between nodes who is at work on
what.

    connection → JetStream there? → dead letters → for each served model: streams, consumers → queue and spool
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from engine.fleet import Fleet
from engine.service import InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import QueueUnavailable
from infsvc.events import Alert, Event, ModelStateChanged, RequestFinished
from infsvc.types import ModelState
from transports.nats.bus import Bus
from transports.nats.exchange import Exchange, Exchanges
from transports.nats.expiry import Expiry
from transports.nats.intake import Intake
from transports.nats.jetstream import SUBJECT_OVERLAP, JetStream, JetStreamFault, election_s
from transports.nats.messages import encode
from transports.nats.once import OnceBook
from transports.nats.owners import Owners
from transports.nats.puller import ConsumerGone
from transports.nats.spool import Spool, name_of
from transports.nats.streams import (
    foreign_streams,
    once_bucket,
    once_stream,
    queue_consumer,
    queue_stream,
    spool_consumer,
    spool_stream,
)
from transports.nats.subscriptions import is_served
from transports.nats.undertaker import Undertaker
from transports.nats.work_queue import WorkQueue

log = logging.getLogger("infsvc.nats")

_SETUP_S = 5.0
"""How long a request waits for its queue to be made on a fresh connection."""
_SETTLE_S = 1.5
_RETRY_S = 2.0
_LOOK_S = 60.0
"""How often an operator's own streams are looked for."""
_CLOSE_S = 2.0


class _Lane:
    """One model's queue and spool, and the task that serves them over the present connection."""

    def __init__(self, worker: Worker, queue: WorkQueue, intake: Intake, spool: Spool) -> None:
        self.worker, self.queue, self.intake, self.spool = worker, queue, intake, spool
        self.task: asyncio.Task[None] | None = None
        self.ready = asyncio.Event()
        self.problem: str | None = None
        self.made = False
        """Whether its streams are on this broker."""
        self.spools = False


class Durable:
    """Loop thread only.

    Args:
        node: the node's name.
    """

    def __init__(self, bus: Bus, fleet: Fleet, service: InferenceService, exchanges: Exchanges, node: str) -> None:
        self._bus, self._fleet, self._service, self._exchanges = bus, fleet, service, exchanges
        self._node = node
        self.instance = f"{subjects.dotless(''.join(c if c.isalnum() else '_' for c in node))}-{secrets.token_hex(6)}"
        self.js = JetStream(bus)
        n_replicas = max((worker.settings.stream_replicas for worker in fleet.workers.values()), default=1)
        self.js.patience_s = self._election_s = election_s(n_replicas)
        self._owners = Owners(bus, self.instance, moves=bool(self._election_s), works_on=self._works_on)
        self._undertaker = Undertaker(
            bus,
            self.js,
            fleet,
            service,
            exchanges,
            instance=self.instance,
            alert=self._alert,
            n_replicas=n_replicas,
        )
        self.dead = self._undertaker.dead
        self._lanes: dict[str, _Lane] = {}
        self._session: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._decided = asyncio.Event()
        self._off: str | None = None
        self._patient_until_s = 0.0
        self._foreign: dict[str, tuple[str, ...]] = {}
        self._handing_over: set[asyncio.Task[None]] = set()
        self._leaving = False
        bus.on_connected(self._connected)
        bus.events.listen(self._on_event)

    async def start(self) -> None:
        """Nothing runs before the bus has a connection."""

    async def hand_over(self) -> None:
        """Takes no more work and gives back, at once, what no slot works on; what runs goes on."""
        self._leaving = True
        await asyncio.gather(*(lane.queue.hand_over() for lane in self._lanes.values()))

    async def close(self) -> None:
        """Leaves every queue: two seconds for what ends now; the broker gives the rest to others."""
        await self.hand_over()
        await asyncio.gather(
            *(lane.queue.settled(_CLOSE_S) for lane in self._lanes.values()),
            *(lane.spool.close(_CLOSE_S) for lane in self._lanes.values()),
        )
        await self._end_session()
        await self.dead.close()
        await self._bus.flush()

    def foreign(self, model: str) -> tuple[str, ...]:
        """Streams of an operator's own over the model's public subject."""
        return self._foreign.get(model, ())

    async def settle(self, workers: list[Worker]) -> None:
        """Waits for these models' streams to be made on this broker, or found impossible; not for long."""
        self._changed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await self._decided.wait()
                if self._off is None:
                    lanes = [self._lane(worker) for worker in workers]
                    await asyncio.gather(*(lane.ready.wait() for lane in lanes if not lane.made))

    async def reason(self, worker: Worker) -> str | None:
        """Why the model's queue takes nothing, or None. Waits while that is being found out."""
        if self._bus.nc is None:
            return "there is no connection to the broker"
        try:
            async with asyncio.timeout(_SETUP_S + self._election_s):
                await self._decided.wait()
                if self._off is not None:
                    return self._off
                lane = self._lanes.get(worker.name)
                if lane is None:
                    return f"{worker.name} is not served by this node"
                await lane.ready.wait()
                return lane.problem
        except TimeoutError:
            return "the broker's queue is not ready"

    async def takes(self, exchange: Exchange) -> bool:
        """Whether the model's queue can take this request."""
        return await self.reason(exchange.worker) is None and self._lanes[exchange.worker.name].intake.fits(exchange)

    async def spools(self, worker: Worker) -> bool:
        """Whether what is published without a reply subject is kept by itself, also when no front door takes it."""
        return await self.reason(worker) is None and self._lanes[worker.name].spools

    async def put(self, exchange: Exchange) -> None:
        """Puts a request into its model's queue; see `Intake.put`."""
        problem = await self.reason(exchange.worker)
        if problem is not None:
            raise QueueUnavailable(f"requests cannot be kept: {problem}")
        await self._lanes[exchange.worker.name].intake.put(exchange)

    async def pass_over(self, exchange: Exchange) -> None:
        """Tells the spool that a message was refused, so that it does not queue it after all."""
        lane, name = self._lanes.get(exchange.worker.name), name_of(exchange)
        if lane is not None and name is not None and lane.ready.is_set() and lane.problem is None:
            with suppress(JetStreamFault):
                await lane.queue.book.mark(name)

    # The connection.

    async def _connected(self, nc: Client) -> None:
        await self._end_session()
        await self._owners.listen(nc)
        self._session = asyncio.create_task(self._serve(nc), name="nats-durable")

    async def _end_session(self) -> None:
        self._decided.clear()
        session, self._session = self._session, None
        tasks = [task for task in (session, *(lane.task for lane in self._lanes.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for lane in self._lanes.values():
            lane.task, lane.made = None, False
            lane.ready.clear()

    async def _serve(self, nc: Client) -> None:
        """Serves every model's queue over one connection until it is cancelled."""
        self._patient_until_s = time.monotonic() + self._election_s
        while not await self._prepare():  # noqa: ASYNC110 - the broker sends no word when JetStream comes on
            await asyncio.sleep(_RETRY_S)
        undertaker = asyncio.create_task(self._bury_forever(nc), name="nats-undertaker")
        try:
            while True:
                self._changed.clear()
                for worker in self._fleet.workers.values():
                    lane = self._lanes.get(worker.name)
                    if is_served(worker) and (lane is None or lane.task is None):
                        self._open_lane(nc, worker)
                    elif lane is not None and lane.task is not None and not is_served(worker):
                        await self._close_lane(lane)
                self._decided.set()
                await self._changed.wait()
        finally:
            undertaker.cancel()
            await asyncio.gather(undertaker, return_exceptions=True)

    async def _prepare(self) -> bool:
        """Whether the broker can keep requests; says so when it cannot."""
        try:
            await self.js.call("INFO")
            await self.dead.prepare()
        except JetStreamFault as fault:
            if self._bus.nc is None or not self._bus.nc.is_connected or self._waits_for_a_leader(fault):
                return False
            reason = f"the durable queue is off: {fault}"
            if self._off != reason:
                self._off = reason
                log.warning("%s; requests with a reply subject are served", reason, extra={"code": "queue.off"})
                await self._alert(None, "warning", reason)
            self._decided.set()
            self._remark()
            return False
        if self._off is not None:
            self._off = None
            log.info("the durable queue is on", extra={"code": "queue.on"})
        self._remark()
        return True

    def _waits_for_a_leader(self, fault: JetStreamFault) -> bool:
        """Whether a cluster may only be between two leaders: its silence says nothing for a while."""
        return (fault.unanswered or fault.leaderless) and time.monotonic() < self._patient_until_s

    async def _bury_forever(self, nc: Client) -> None:
        while True:
            try:
                await self.dead.run(nc)
            except (ConsumerGone, NatsError) as error:
                log.warning("advisories cannot be read: %s", error, extra={"code": "queue.advisory"})
            await asyncio.sleep(_RETRY_S)
            with suppress(JetStreamFault):
                await self.dead.prepare()

    def _lane(self, worker: Worker) -> _Lane:
        """The model's lane, which is made once and outlives connections."""
        lane = self._lanes.get(worker.name)
        if lane is None:
            book = OnceBook(self.js, once_bucket(worker.settings))
            queue = WorkQueue(
                worker,
                bus=self._bus,
                js=self.js,
                book=book,
                exchanges=self._exchanges,
                service=self._service,
                instance=self.instance,
                alive=self._owners.alive,
                bury=self._undertaker.bury,
            )
            intake = Intake(
                worker,
                bus=self._bus,
                js=self.js,
                book=book,
                exchanges=self._exchanges,
                service=self._service,
                depth=queue.depth,
                on_put=queue.look,
            )
            spool = Spool(worker, js=self.js, book=book, intake=intake, exchanges=self._exchanges)
            lane = self._lanes[worker.name] = _Lane(worker, queue, intake, spool)
        return lane

    def _open_lane(self, nc: Client, worker: Worker) -> None:
        lane = self._lane(worker)
        if not self._leaving:
            lane.queue.take_up()
        lane.task = asyncio.create_task(self._run_lane(nc, lane), name=f"nats-queue-{worker.name}")

    async def _close_lane(self, lane: _Lane) -> None:
        """A model that is served no more: others have its queue."""
        lane.ready.clear()
        await lane.queue.hand_over()
        await lane.queue.settled(_CLOSE_S)
        task, lane.task = lane.task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        lane.worker.n_queued_durable = 0

    async def _run_lane(self, nc: Client, lane: _Lane) -> None:
        while True:
            try:
                lane.spools = await self._have_streams(lane.worker)
                lane.made = True
                self._judge(lane, None)
                runs = [lane.queue.run(nc)] + ([lane.spool.run(nc)] if lane.spools else [])
                expiry = Expiry(lane.worker, self.js, expire=self._undertaker.expire)
                await _all(*runs, expiry.run(), self._look_for_foreign(lane.worker))
            except (JetStreamFault, ConsumerGone, NatsError) as error:
                if isinstance(error, JetStreamFault) and not lane.made and self._waits_for_a_leader(error):
                    await asyncio.sleep(_RETRY_S)
                    continue
                words = f"the queue of {lane.worker.name} cannot be used: {error}"
                if lane.problem != words:
                    log.warning("%s", words, extra={"code": "queue.failed", "model": lane.worker.name})
                self._judge(lane, words)
            except Exception:
                log.exception("a queue broke", extra={"code": "queue.failed", "model": lane.worker.name})
                self._judge(lane, f"the queue of {lane.worker.name} broke: see the log")
            await asyncio.sleep(_RETRY_S)

    def _judge(self, lane: _Lane, problem: str | None) -> None:
        lane.problem = problem
        lane.ready.set()
        self._remark()

    async def _have_streams(self, worker: Worker) -> bool:
        """Makes a model's streams and consumers; whether the spool is among them."""
        settings = worker.settings
        for other in self._fleet.workers.values():
            if other is not worker and other.settings.stream_name == settings.stream_name:
                raise JetStreamFault(f"its STREAM_NAME {settings.stream_name} is also that of {other.name}")
        await self.js.have_stream(queue_stream(settings))
        await self.js.have_consumer(settings.stream_name, queue_consumer(settings))
        await self.js.have_stream(once_stream(settings))
        await self._look(worker)
        try:
            await self.js.have_stream(spool_stream(settings))
        except JetStreamFault as fault:
            if fault.err_code != SUBJECT_OVERLAP:
                raise
            return False
        await self.js.have_consumer(str(spool_stream(settings).name), spool_consumer(settings))
        return True

    async def _look_for_foreign(self, worker: Worker) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            with suppress(JetStreamFault):
                before = self._foreign.get(worker.name)
                await self._look(worker)
                if before and not self._foreign.get(worker.name):
                    raise ConsumerGone("the subject is free again, and the spool is made")

    async def _look(self, worker: Worker) -> None:
        """Finds an operator's own streams over the model's public subject, and says so once."""
        names = tuple(await foreign_streams(self.js, worker.settings))
        if names == self._foreign.get(worker.name, ()):
            return
        self._foreign[worker.name] = names
        self._remark()
        if names:
            words = self._foreign_words(worker.name, names)
            log.warning("%s", words, extra={"code": "queue.foreign_stream", "model": worker.name})
            await self._alert(worker.name, "warning", words)

    def _foreign_words(self, model: str, names: tuple[str, ...]) -> str:
        subject = self._fleet.get(model).settings.subject
        return (
            f"the stream {', '.join(names)} covers {subject} and answers its callers with a receipt before the model "
            f"can: take the subject out of it, or set no_ack; publishers of their own have "
            f"{self._fleet.get(model).settings.queue_subject}"
        )

    def _remark(self) -> None:
        """What the bus says beside `connected`."""
        words = [self._off] if self._off is not None else []
        words += [lane.problem for lane in self._lanes.values() if lane.problem is not None and lane.task is not None]
        words += [self._foreign_words(model, names) for model, names in self._foreign.items() if names]
        self._bus.remark("; ".join(words) or None)

    # What models and queues tell.

    def _on_event(self, event: Event) -> None:
        if isinstance(event, ModelStateChanged):
            self._changed.set()
            lane = self._lanes.get(event.model or "")
            if lane is None:
                return
            if event.state is ModelState.DRAINING:
                task = asyncio.create_task(lane.queue.hand_over(), name=f"queue-hand-over-{lane.worker.name}")
                self._handing_over.add(task)
                task.add_done_callback(self._handing_over.discard)
            elif event.state is ModelState.READY and not self._leaving:
                lane.queue.take_up()
        if isinstance(event, ModelStateChanged | RequestFinished) and event.model in self._lanes:
            self._lanes[event.model].queue.wake()

    def _works_on(self, model: str, req_id: str) -> bool:
        lane = self._lanes.get(model)
        return lane is not None and lane.queue.works_on(req_id)

    async def _alert(self, model: str | None, level: str, words: str) -> None:
        alert = Alert(model=model, node=self._node, level=level, msg=words)
        self._bus.events.publish(alert)
        await self._bus.publish(subjects.ALERTS, encode(alert.wire()))


async def _all(*works: Any) -> None:
    """Runs all until one fails; the others are cancelled then.

    Each is cancelled once: a second time would break off what it does to end well, such as leaving a subject, and a
    flush that is broken off costs nats-py its connection.
    """
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
