"""Requests in, over core NATS: each served model's subjects, and `inference.cancel`.

A model takes requests on SUBJECT and texts to embed on `embedding.request.<m>`, both as one of a queue group, so that
one node gets each; and on subjects of this node alone, for callers that have chosen a node.

A message with a reply subject is answered there: the reply *is* the answer. One without is answered on its `reply_to`,
else on `<RESPONSE_PREFIX>.<req_id>`. The door decides how a request goes on:

| it | goes |
|---|---|
| has a `req_id`, or no reply subject | to the durable queue: any node may answer it, also after a crash, and once |
| has a reply subject alone, and a slot is free | straight to the engine: nobody could ask for it again |
| has a reply subject alone, and no slot is free | to the durable queue, where a node with room finds it |
| is malformed, or cannot be queued | nowhere: it is refused, and the spool is told to pass over it |

A broker without JetStream has no queue, and a message of the broker's very largest size finds no room for the queue's
headers: whoever waits on a reply subject is then served from memory, and the rest is refused in words. What has neither
reply subject, `reply_to` nor `req_id` is counted, logged and dropped. What has a `reply_to` alone is the spool's,
because only its number there can tell two such messages apart.

Each message becomes a task at once, because nats-py runs one subscription's callbacks one after another. Admission is
the service's and the queue's; the door itself only bounds its tasks, so that a flood is answered with `queue_full` and
not with memory. A connection that is lost in the middle of a request does not end it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.fleet import Fleet
from engine.service import InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import Draining, EngineFailed, ModelNotLoaded, QueueFull, RequestError
from infsvc.types import ModelState
from transports.nats.bus import Bus, bounded
from transports.nats.durable import Durable
from transports.nats.exchange import Exchange, Exchanges
from transports.nats.messages import encode, read_object, validate_cancel
from transports.nats.queue_desk import QueueDesk
from transports.nats.subscriptions import Handler, ModelSubscriptions

log = logging.getLogger("infsvc.nats")

_CLOSE_S = 2.0
_SPARE_TASKS = 64
"""Tasks above a model's slots and queue: those that are being refused."""
_SOON = frozenset({ModelState.LOADING, ModelState.READY})


class FrontDoor:
    """Takes requests from NATS to the engine or to the durable queue. Loop thread only.

    Args:
        stopping: set when the node shuts down; new work is refused from then on.
        node, start_time: this node's own, which name the subjects that only it takes.
    """

    def __init__(
        self,
        bus: Bus,
        fleet: Fleet,
        service: InferenceService,
        exchanges: Exchanges,
        durable: Durable,
        desk: QueueDesk,
        stopping: asyncio.Event,
        *,
        node: str = "",
        start_time: str = "",
    ) -> None:
        self._bus, self._service, self._stopping = bus, service, stopping
        self._exchanges, self._durable, self._desk = exchanges, durable, desk
        self._leaving = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_tasks: Counter[str] = Counter()
        self._cancels: Any = None
        self.n_dropped = 0
        shared: dict[str, Any] = {
            "queue": lambda worker: worker.settings.queue_group,
            # A message that comes before its spool is there would be in this process's memory alone.
            "before": durable.settle,
        }

        def own(worker: Worker, *, embedding: bool) -> str:
            return subjects.direct(worker.name, node, start_time, embedding=embedding)

        def subscribed(
            name: str, subject: Callable[[Worker], str], handler: Handler, **more: Any
        ) -> ModelSubscriptions:
            return ModelSubscriptions(bus, fleet, name=name, subject=subject, handler=handler, **more)

        self.subscriptions = subscribed("front-door", lambda worker: worker.settings.subject, self._receive, **shared)
        self._beside = (
            subscribed(
                "front-door-embedding",
                lambda worker: worker.settings.embedding_subject,
                self._receive_texts,
                only=lambda worker: worker.settings.subject != worker.settings.embedding_subject,
                **shared,
            ),
            subscribed("own-door", lambda worker: own(worker, embedding=False), self._receive),
            subscribed("own-door-embedding", lambda worker: own(worker, embedding=True), self._receive_texts),
        )
        bus.on_connected(self._subscribe_cancel)

    @property
    def n_running(self) -> int:
        """Messages that are being answered."""
        return self._n_tasks.total()

    async def start(self) -> None:
        for subscriptions in (self.subscriptions, *self._beside):
            await subscriptions.start()

    async def leave(self) -> None:
        """Takes no more messages, so that the broker gives them to other nodes; what is under way goes on."""
        self._leaving = True
        await asyncio.gather(*(subscriptions.close() for subscriptions in (self.subscriptions, *self._beside)))

    async def close(self) -> None:
        """Takes no more messages, and gives those under way two seconds to send their last answer."""
        await self.leave()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)
        for task in self._tasks:
            task.cancel()
        if self._cancels is not None and self._bus.nc is not None:
            await bounded(self._cancels.unsubscribe(), 0.5)
        await self._bus.flush()

    async def _receive_texts(self, worker: Worker, message: Msg) -> None:
        await self._receive(worker, message, embeds=True)

    async def _receive(self, worker: Worker, message: Msg, *, embeds: bool = False) -> None:
        exchange = Exchange(worker, message.data, message.headers or {}, message.reply or None, embeds)
        capacity = worker.settings.queue_max_msgs
        if self._n_tasks[worker.name] >= capacity + worker.n_slots + _SPARE_TASKS:
            if exchange.reply:
                full = QueueFull(model=worker.name, n_waiting=worker.n_waiting, capacity=capacity, retry_after_s=2)
                await self._exchanges.answer(exchange, full.native(None))
            # What nobody waits for lies in the spool, which takes it from there.
            return
        self._n_tasks[worker.name] += 1
        task = asyncio.create_task(self._serve(exchange), name=f"nats-request-{worker.name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._forget(worker.name, done))

    def _forget(self, model: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._n_tasks[model] -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request broke", exc_info=error, extra={"code": "nats.request_broke", "model": model})

    async def _serve(self, exchange: Exchange) -> None:
        """A message from its bytes to its answer, or to the queue; every way it can fail is an answer too."""
        refused = False
        try:
            final = await self._run(exchange)
        except RequestError as error:
            final, refused = error.native(exchange.called), True
        except Exception as error:
            log.exception("a request broke", extra={"code": "nats.request_broke", "model": exchange.worker.name})
            final = EngineFailed(f"the node failed: {type(error).__name__}").native(exchange.req_id)
        if final is None:
            return
        if exchange.targets:
            await self._exchanges.answer(exchange, final)
        else:
            self._drop(exchange)
        if refused:
            await self._durable.pass_over(exchange)

    async def _run(self, exchange: Exchange) -> dict[str, Any] | None:
        """The answer, or None when somebody else will give it."""
        exchange.read()
        if not exchange.targets:
            return {}
        leaving = self._leaving or self._stopping.is_set()
        for_the_spool = exchange.reply is None and (leaving or exchange.req_id is None)
        if for_the_spool and await self._durable.spools(exchange.worker):
            return None  # it lies there for this node, another one or the next start
        if leaving:
            raise Draining("the node is shutting down")
        exchange.check_headers()
        if await self._is_direct(exchange):
            return await self._exchanges.compute(exchange)
        await self._durable.put(exchange)
        return None

    async def _is_direct(self, exchange: Exchange) -> bool:
        worker = exchange.worker
        if exchange.reply is None:
            return False
        if exchange.req_id is None and worker.n_in_flight < worker.n_slots and not worker.n_queued_durable:
            return True
        if worker.state not in _SOON:
            if worker.state is ModelState.DRAINING:
                raise Draining(f"{worker.name} is being unloaded", param="model")
            raise ModelNotLoaded(worker.name, worker.state.replace("_", " "), worker.reason)
        return not await self._durable.takes(exchange)

    def _drop(self, exchange: Exchange) -> None:
        self.n_dropped += 1
        log.warning(
            "a message on %s has no reply subject, reply_to or req_id to answer to: dropped",
            exchange.worker.settings.subject,
            extra={"code": "nats.dropped", "model": exchange.worker.name, "meta": {"n_dropped": self.n_dropped}},
        )

    async def _subscribe_cancel(self, nc: Client) -> None:
        self._cancels = await nc.subscribe(subjects.CANCEL, cb=self._cancel)

    async def _cancel(self, message: Msg) -> None:
        """Every node hears it; only the request's owner answers, or who takes it out of the queue."""
        try:
            req_id = validate_cancel(read_object(message.data)).req_id
        except RequestError as error:
            answer = error.native(None)
        else:
            generation = self._service.find(req_id)
            if generation is None:
                task = asyncio.create_task(self._cancel_queued(req_id, message.reply), name="nats-cancel")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                return
            generation.cancel()
            answer = {"req_id": req_id, "cancelled": True}
        if message.reply:
            await self._bus.publish(message.reply, encode(answer))

    async def _cancel_queued(self, req_id: str, reply: str) -> None:
        """What no node has taken has no owner: who takes it out of the queue answers."""
        if await self._desk.cancel(req_id) and reply:
            await self._bus.publish(reply, encode({"req_id": req_id, "cancelled": True}))
