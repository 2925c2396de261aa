"""Requests in, over core NATS: each served model's subject, and `inference.cancel`.

A message with a reply subject is answered there: the reply *is* the answer. A message without one is answered on
its `reply_to`, else on `<RESPONSE_PREFIX>.<req_id>`; here it lives in memory only and is lost with the node, and
what names neither is counted, logged and dropped. Keeping such work durably needs a stream, which is not this
file's business.

Each message becomes a task at once, because nats-py runs one subscription's callbacks one after another. Admission
is the service's; the door itself only bounds its tasks, so that a flood is answered with `queue_full` and not with
memory. A connection that is lost in the middle of a request does not end it: it finishes, and its answer goes out
if the broker is back by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.fleet import Fleet
from engine.generation import Generation
from engine.service import InferenceRequest, InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import BadRequest, Draining, EngineFailed, QueueFull, RequestError
from infsvc.types import CompletionChunk
from transports.nats.bus import Bus, bounded
from transports.nats.messages import encode, encode_final, is_answerable, named, read_object, validate
from transports.nats.subscriptions import ModelSubscriptions

log = logging.getLogger("infsvc.nats")

_CLOSE_S = 2.0
_SPARE_TASKS = 64
"""Tasks above a model's slots and queue: those that are being refused."""


@dataclass
class _Exchange:
    """One message and where its answers go."""

    worker: Worker
    message: Msg
    req_id: str | None = None
    targets: list[str] = field(default_factory=list)


class FrontDoor:
    """Takes requests from NATS to the service. Loop thread only.

    Args:
        stopping: set when the node shuts down; new work is refused from then on.
    """

    def __init__(self, bus: Bus, fleet: Fleet, service: InferenceService, stopping: asyncio.Event) -> None:
        self._bus, self._service, self._stopping = bus, service, stopping
        self._tasks: set[asyncio.Task[None]] = set()
        self._n_tasks: Counter[str] = Counter()
        self._cancels: Any = None
        self.n_dropped = 0
        self.subscriptions = ModelSubscriptions(
            bus,
            fleet,
            name="front-door",
            subject=lambda worker: worker.settings.subject,
            queue=lambda worker: worker.settings.queue_group,
            handler=self._receive,
        )
        bus.on_connected(self._subscribe_cancel)

    @property
    def n_running(self) -> int:
        """Messages that are being answered."""
        return self._n_tasks.total()

    async def start(self) -> None:
        await self.subscriptions.start()

    async def close(self) -> None:
        """Takes no more messages, and gives those under way two seconds to send their last answer."""
        await self.subscriptions.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)
        for task in self._tasks:
            task.cancel()
        if self._cancels is not None and self._bus.nc is not None:
            await bounded(self._cancels.unsubscribe(), 0.5)
        await self._bus.flush()

    async def _receive(self, worker: Worker, message: Msg) -> None:
        exchange = _Exchange(worker, message, targets=[message.reply] if message.reply else [])
        capacity = worker.settings.queue_max_msgs
        if self._n_tasks[worker.name] >= capacity + worker.n_slots + _SPARE_TASKS:
            full = QueueFull(model=worker.name, n_waiting=worker.n_waiting, capacity=capacity, retry_after_s=2)
            await self._answer(exchange, full.native(None))
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

    async def _serve(self, exchange: _Exchange) -> None:
        """A message from its bytes to its last answer; every way it can fail is an answer too."""
        try:
            final = await self._run(exchange)
        except RequestError as error:
            final = error.native(exchange.req_id)
        except Exception as error:
            log.exception("a request broke", extra={"code": "nats.request_broke", "model": exchange.worker.name})
            final = EngineFailed(f"the node failed: {type(error).__name__}").native(exchange.req_id)
        await self._answer(exchange, final)

    async def _run(self, exchange: _Exchange) -> dict[str, Any]:
        worker, message = exchange.worker, exchange.message
        body = read_object(message.data)
        exchange.req_id = named(body, "req_id")
        self._address(exchange, body)
        if not exchange.targets:
            return {}
        request = validate(body, model=worker.name, has_reply=bool(message.reply))
        if self._stopping.is_set():
            raise Draining("the node is shutting down")
        headers = message.headers or {}
        inference = InferenceRequest.from_wire(
            request, model=worker.name, source="nats", trace_id=headers.get("X-Trace-ID")
        )
        exchange.req_id = inference.req_id
        async with await self._service.submit(inference) as generation:
            if request.stream and message.reply:
                await self._stream(generation, message.reply)
                return (await generation.result()).wire() | {"done": True}
            return (await generation.result()).wire()

    @staticmethod
    def _address(exchange: _Exchange, body: dict[str, Any]) -> None:
        """Adds where answers go beside the reply subject; before validation, as a refusal must find its way too."""
        reply_to = named(body, "reply_to")
        if reply_to is not None and is_answerable(reply_to):
            if reply_to not in exchange.targets:
                exchange.targets.append(reply_to)
        elif not exchange.targets and exchange.req_id is not None:
            subject = f"{exchange.worker.settings.response_prefix}.{exchange.req_id}"
            if is_answerable(subject):
                exchange.targets.append(subject)

    async def _stream(self, generation: Generation, subject: str) -> None:
        index = 0
        async for chunk in generation:
            if chunk.text:
                event = CompletionChunk(req_id=generation.req_id, index=index, text=chunk.text)
                await self._bus.publish(subject, encode(event.model_dump()))
                index += 1

    async def _answer(self, exchange: _Exchange, answer: dict[str, Any]) -> None:
        model = exchange.worker.name
        if not exchange.targets:
            self.n_dropped += 1
            log.warning(
                "a message on %s has no reply subject, reply_to or req_id to answer to: dropped",
                exchange.message.subject,
                extra={"code": "nats.dropped", "model": model, "meta": {"n_dropped": self.n_dropped}},
            )
            return
        data = encode_final(answer, limit_bytes=self._bus.max_payload)
        for target in exchange.targets:
            if not await self._bus.publish(target, data):
                log.warning(
                    "an answer was lost: no connection to the broker",
                    extra={"code": "nats.answer_lost", "model": model, "meta": {"req_id": exchange.req_id}},
                )

    async def _subscribe_cancel(self, nc: Client) -> None:
        self._cancels = await nc.subscribe(subjects.CANCEL, cb=self._cancel)

    async def _cancel(self, message: Msg) -> None:
        """Every node hears it; only the request's owner answers."""
        try:
            req_id = named(read_object(message.data), "req_id")
            if req_id is None:
                raise BadRequest("req_id is missing", param="req_id")
        except RequestError as error:
            answer = error.native(None)
        else:
            generation = self._service.find(req_id)
            if generation is None:
                return
            generation.cancel()
            answer = {"req_id": req_id, "cancelled": True}
        if message.reply:
            await self._bus.publish(message.reply, encode(answer))
