"""What was published on a model's public subject, looked at a second time: the net under the front door.

The spool stream keeps every message there, also while no node is up, and cannot see who waits for a reply. So a message
is left alone for a moment, in which some node's front door queues it, answers it or refuses it; then

| it has | and | it |
|---|---|---|
| a `req_id` | a record, a mark or a place in the queue since it came | was seen to: passed over |
| a `req_id` | none of them | is queued, answered where it says |
| a `reply_to` alone | no mark, which a front door leaves that refused it | is queued under its number in the spool |
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
from transports.nats.intake import Intake
from transports.nats.jetstream import JetStream, JetStreamFault, election_s
from transports.nats.once import OnceBook, body_hash
from transports.nats.puller import Puller
from transports.nats.streams import SPOOL_BATCH, spool_durable, spool_name

log = logging.getLogger("infsvc.nats")

NAMED_GRACE_S = 2.0
"""How long a front door, which may be busy, has to see to a message with a `req_id` before the spool does."""
ALONE_GRACE_S = 0.25
"""The same for a `reply_to` alone, which only the spool can queue: long enough for a refusal."""

_AGAIN_S = 1.0
_OLD_S = 10.0
"""What lies longer than this came while nobody was there, and needs no grace. Clocks may differ by less."""


def name_of(exchange: Exchange) -> str | None:
    """The name under which a message is marked as seen to, or None where the spool passes over it anyway."""
    if not exchange.body:
        return None
    if isinstance(exchange.body.get("req_id"), str):
        return str(exchange.body["req_id"])
    if exchange.body.get("reply_to") is not None:
        return f"body:{body_hash(exchange.body)}"
    return None


class Spool:
    """A model's spool. Loop thread only."""

    def __init__(
        self,
        worker: Worker,
        *,
        js: JetStream,
        book: OnceBook,
        intake: Intake,
        exchanges: Exchanges,
    ) -> None:
        self._worker, self._js, self._book, self._intake, self._exchanges = worker, js, book, intake, exchanges
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self.n_passed_over = self.n_queued = 0
        settings = worker.settings
        self._puller = Puller(
            spool_name(settings),
            spool_durable(settings),
            room=lambda: 0 if self._closed else SPOOL_BATCH - len(self._tasks),
            take=self._take,
            patience_s=election_s(settings.stream_replicas),
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
        embeds = message.subject == self._worker.settings.embedding_subject
        exchange = Exchange(self._worker, message.data, message.headers or {}, None, embeds)
        problem: RequestError | None = None
        try:
            exchange.read()
        except RequestError as error:
            problem = error
        name = name_of(exchange)
        if name is not None and message.metadata.num_delivered == 1 and time.time() - came_s < _OLD_S:
            # The broker holds it meanwhile.
            await self._later(message, ALONE_GRACE_S if exchange.req_id is None else NAMED_GRACE_S)
            return
        try:
            if name is None or await self._is_seen_to(exchange, name, problem, message, came_s):
                self.n_passed_over += 1
            else:
                self.n_queued += 1
        except RequestError as error:
            if exchange.targets:
                await self._exchanges.answer(exchange, error.native(exchange.req_id))
        except JetStreamFault as fault:
            # Left to the broker, which gives it out again.
            log.debug("a spooled message waits: %s", fault, extra={"code": "spool.waits", "model": self._worker.name})
            await self._later(message, _AGAIN_S)
            return
        await self._js.send(message.reply, b"+ACK")

    async def _later(self, message: Msg, seconds: float) -> None:
        await self._js.send(message.reply, f'-NAK {{"delay": {int(seconds * 1e9)}}}'.encode())

    async def _is_seen_to(
        self, exchange: Exchange, name: str, problem: RequestError | None, message: Msg, came_s: float
    ) -> bool:
        """Whether a front door has dealt with the message; else puts it into the queue."""
        seq = message.metadata.sequence.stream
        record = None if exchange.req_id is None else await self._book.read(exchange.req_id)
        if record is not None and record.stored_s >= came_s:
            return True
        if await self._book.marked_s(name) >= came_s:
            return True
        if problem is not None:
            raise problem
        if not exchange.targets:
            raise BadRequest("reply_to or req_id: nothing can be published there", param="reply_to")
        headers = {name: exchange.headers[name] for name in subjects.CARRIED_HEADERS if name in exchange.headers}
        model = self._worker.name
        if exchange.req_id is None:
            exchange.req_id = f"{model}-{seq}-{came_s:.3f}"
            headers[subjects.REQ_ID_HEADER] = exchange.req_id
        headers[subjects.CAME_HEADER] = f"{came_s:.3f}"
        # An id that was used before this message came is a repeat, which the broker's window must not swallow.
        msg_id = subjects.msg_id(model, exchange.req_id if record is None else f"{exchange.req_id}:{seq}")
        return await self._intake.put_spooled(exchange, headers | {subjects.MSG_ID_HEADER: msg_id})
