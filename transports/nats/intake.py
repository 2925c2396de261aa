"""Requests into one model's durable queue: by one publish that the broker acknowledges, or refused in words.

It stands apart from `WorkQueue`, which takes them out again, as it needs no engine and holds nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from engine.service import InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import Conflict, QueueUnavailable, TooLarge
from infsvc.types import new_req_id
from transports.nats.bus import Bus
from transports.nats.depth import Depth
from transports.nats.exchange import Exchange, Exchanges
from transports.nats.jetstream import FULL, TOO_LARGE, JetStream, JetStreamFault, Stored
from transports.nats.once import OnceBook, answer_of

HEADERS_BYTES = 4096
"""Room for a queued message's headers, which the broker counts too."""

_N_TRIES = 3
_AGAIN_S = 1.0


class Intake:
    """Puts requests into a model's queue. Loop thread only.

    Args:
        depth: has a place for each that is put.
        on_put: called after each that is in.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        bus: Bus,
        js: JetStream,
        book: OnceBook,
        exchanges: Exchanges,
        service: InferenceService,
        depth: Depth,
        on_put: Callable[[], None],
    ) -> None:
        self.worker, self.book = worker, book
        self._bus, self._js, self._exchanges, self._service = bus, js, exchanges, service
        self._depth, self._on_put = depth, on_put

    def fits(self, exchange: Exchange) -> bool:
        """Whether the broker takes the message a second time, with the headers of the queue."""
        return len(exchange.data) <= self._bus.max_payload - HEADERS_BYTES

    async def put(self, exchange: Exchange) -> None:
        """Puts a request that was read into the queue; whoever takes it answers the caller.

        Raises:
            QueueFull, QueueUnavailable, TooLarge: it is not in the queue.
            Conflict: its `req_id` is known with another body.
        """
        if not self.fits(exchange):
            raise TooLarge(self._bus.max_payload - HEADERS_BYTES)
        headers = {key: exchange.headers[key] for key in subjects.CARRIED_HEADERS if key in exchange.headers}
        if exchange.reply:
            headers[subjects.REPLY_HEADER] = exchange.reply
        if exchange.req_id is None:
            exchange.req_id = exchange.called or new_req_id()
            headers[subjects.REQ_ID_HEADER] = exchange.req_id
        msg_id = subjects.msg_id(self.worker.name, exchange.req_id)
        stored = await self._store(exchange, headers | {subjects.MSG_ID_HEADER: msg_id})
        if stored.duplicate:
            with suppress(JetStreamFault):
                await self.book.mark(exchange.req_id)
            await self._put_again(exchange, headers)
        self._on_put()

    async def put_spooled(self, exchange: Exchange, headers: dict[str, str]) -> bool:
        """Puts a message of the spool into the queue; whether it was there already.

        Raises:
            RequestError: as `put`.
            JetStreamFault: the broker cannot be asked now.
        """
        try:
            stored = await self._store(exchange, headers)
        except QueueUnavailable as error:
            raise JetStreamFault(str(error)) from None
        self._on_put()
        return stored.duplicate

    async def _put_again(self, exchange: Exchange, headers: dict[str, str]) -> None:
        """A request whose id was used before: answered from the book if it is done, else queued behind the first."""
        assert exchange.req_id is not None
        with suppress(JetStreamFault):
            record = await self.book.read(exchange.req_id)
            if record is not None and record.state in ("running", "done") and record.body != exchange.fingerprint:
                raise self._conflict(exchange)
            if record is not None and record.state == "done":
                await self._exchanges.repeat(exchange, answer_of(record, exchange.req_id))
                return
        await self._store(exchange, headers)

    def _conflict(self, exchange: Exchange) -> Conflict:
        error = Conflict(exchange.req_id or "")
        self._service.refused(exchange.inference(queued=True), error)
        return error

    async def _store(self, exchange: Exchange, headers: dict[str, str]) -> Stored:
        """Publishes into the queue, where there is room."""
        async with self._depth.place():
            return await self._publish(exchange, headers)

    async def _publish(self, exchange: Exchange, headers: dict[str, str]) -> Stored:
        """Without an answer it is tried again: the id makes that harmless."""
        for n_left in reversed(range(_N_TRIES)):
            again = n_left < _N_TRIES - 1
            try:
                stored = await self._js.publish(exchange.queue_subject, exchange.data, headers)
            except JetStreamFault as fault:
                if fault.err_code == FULL:
                    raise self._depth.full(self.worker.settings.queue_max_msgs) from None
                if fault.err_code == TOO_LARGE or "payload" in str(fault).lower():
                    raise TooLarge(self._bus.max_payload - HEADERS_BYTES) from None
                if not fault.unanswered or not n_left:
                    raise QueueUnavailable(f"the broker did not take the request: {fault}") from None
                await asyncio.sleep(_AGAIN_S)
            else:
                own = stored.duplicate and again and await self._is_own(stored.seq, headers)
                return Stored(stored.seq, stored.duplicate and not own)
        raise AssertionError("unreachable")

    async def _is_own(self, seq: int, headers: dict[str, str]) -> bool:
        """Whether the message that has the id is from this exchange's earlier try, and no other's: the spool's answers
        nobody that waits on a reply subject. One that is gone counts as another's, as a second answer does no harm."""
        with suppress(JetStreamFault):
            kept = await self._js.message(self.worker.settings.stream_name, seq)
            return kept is not None and kept.headers.get(subjects.REPLY_HEADER) == headers.get(subjects.REPLY_HEADER)
        return False
