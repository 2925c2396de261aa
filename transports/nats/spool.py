"""What was published on a model's public subject, looked at a second time: the net under the front door.

The spool stream keeps every message there, also while no node is up, and cannot see who waits for a reply. So a message
is left alone for a moment, in which some node's front door queues it, answers it or refuses it; then

| it has | and | it |
|---|---|---|
| a `req_id` | a record or a place in the queue since it came | was seen to: passed over |
| a `req_id` | neither | is queued, answered where it says |
| a `reply_to` alone | no front door has refused it | is queued under its number in the spool |
| neither | | was a caller's that waits on a reply subject, and is gone with it |
"""

from __future__ import annotations

import asyncio
import logging
import time

from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import BadRequest, RequestError
from transports.nats.exchange import Exchange, Exchanges
from transports.nats.jetstream import JetStream, JetStreamFault
from transports.nats.once import OnceBook, body_hash
from transports.nats.puller import Puller
from transports.nats.streams import SPOOL_BATCH, spool_durable, spool_name
from transports.nats.work_queue import WorkQueue

log = logging.getLogger("infsvc.nats")

GRACE_S = 0.25
"""How long a front door has to see to a message before the spool does."""

_OLD_S = 10.0
"""What lies longer than this came while nobody was there, and needs no grace. Clocks may differ by less."""
_MARK = "refused:"


def mark_of(exchange: Exchange) -> str | None:
    """The book's key that tells the spool to pass over a refused message, or None where it would anyway."""
    if not exchange.body:
        return None
    if isinstance(exchange.body.get("req_id"), str):
        return str(exchange.body["req_id"])
    if exchange.body.get("reply_to") is not None:
        return f"{_MARK}{body_hash(exchange.body)}"
    return None


class Spool:
    """A model's spool. Loop thread only."""

    def __init__(
        self, worker: Worker, *, js: JetStream, book: OnceBook, queue: WorkQueue, exchanges: Exchanges
    ) -> None:
        self._worker, self._js, self._book, self._queue, self._exchanges = worker, js, book, queue, exchanges
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.n_passed_over = self.n_queued = 0
        settings = worker.settings
        self._puller = Puller(
            spool_name(settings),
            spool_durable(settings),
            room=lambda: 0 if self._closed else SPOOL_BATCH - len(self._tasks),
            take=self._take,
        )

    async def run(self, nc: Client) -> None:
        """Looks through the spool over one connection until it is cancelled; raises `ConsumerGone`."""
        await self._puller.run(nc)

    async def close(self, seconds: float) -> None:
        """Takes no more; what was begun has `seconds` to end, and is looked at again otherwise."""
        self._closed = True
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _take(self, message: Msg) -> None:
        task = asyncio.create_task(self._see_to(message), name=f"spool-{self._worker.name}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._puller.wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(
                "a spooled message broke",
                exc_info=error,
                extra={"code": "spool.broke", "model": self._worker.name},
            )

    async def _see_to(self, message: Msg) -> None:
        came_s = message.metadata.timestamp.timestamp()
        if time.time() - came_s < _OLD_S:
            await asyncio.sleep(GRACE_S)
        exchange = Exchange(self._worker, message.data, message.headers or {}, None)
        try:
            if await self._is_seen_to(exchange, message, came_s):
                self.n_passed_over += 1
            else:
                self.n_queued += 1
        except RequestError as error:
            if exchange.targets:
                await self._exchanges.answer(exchange, error.native(exchange.req_id))
        except JetStreamFault as fault:
            # Left to the broker, which gives it out again.
            log.debug("a spooled message waits: %s", fault, extra={"code": "spool.waits", "model": self._worker.name})
            await self._js.send(message.reply, b'-NAK {"delay": 1000000000}')
            return
        await self._js.send(message.reply, b"+ACK")

    async def _is_seen_to(self, exchange: Exchange, message: Msg, came_s: float) -> bool:
        """Whether a front door has dealt with the message; else puts it into the queue."""
        seq = message.metadata.sequence.stream
        problem: RequestError | None = None
        try:
            exchange.read()
        except RequestError as error:
            problem = error
        key = mark_of(exchange)
        if key is None:
            return True
        record = await self._book.read(key)
        if record is not None and (record.stored_s >= came_s or key.startswith(_MARK)):
            return True
        if problem is not None:
            raise problem
        if not exchange.targets:
            raise BadRequest("reply_to or req_id: nothing can be published there", param="reply_to")
        headers = {
            name: exchange.headers[name]
            for name in (subjects.TRACE_HEADER, subjects.DEADLINE_HEADER)
            if name in exchange.headers
        }
        model = self._worker.name
        if exchange.req_id is None:
            exchange.req_id = f"{model}-{seq}-{came_s:.3f}"
            headers[subjects.REQ_ID_HEADER] = exchange.req_id
        # An id that was used before this message came is a repeat, which the broker's window must not swallow.
        msg_id = subjects.msg_id(model, exchange.req_id if record is None else f"{exchange.req_id}:{seq}")
        return await self._queue.put_spooled(exchange, headers | {subjects.MSG_ID_HEADER: msg_id})
