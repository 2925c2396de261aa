"""What becomes of a queued request that is given up: kept as a dead letter first, then its caller is told; and opened
again when it is replayed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from engine.fleet import Fleet
from engine.service import InferenceService
from engine.worker import Worker
from infsvc.errors import GivenUp, RequestError
from infsvc.events import DeadLettersChanged
from transports.nats.bus import Bus
from transports.nats.dead_letters import DeadLetter, DeadLetters
from transports.nats.exchange import Exchanges, exchange_of
from transports.nats.expiry import expired
from transports.nats.jetstream import JetStream, Kept
from transports.nats.once import OnceBook, Overtaken, answer_of, body_hash
from transports.nats.streams import once_bucket
from transports.nats.work_queue import Taken

Alarm = Callable[[str | None, str, str], Awaitable[None]]


class Undertaker:
    """Loop thread only.

    Args:
        instance: this process among all nodes.
        alert: tells operators (model, level, sentence).
        n_replicas: servers of a cluster that keep each dead letter.
    """

    def __init__(
        self,
        bus: Bus,
        js: JetStream,
        fleet: Fleet,
        service: InferenceService,
        exchanges: Exchanges,
        *,
        instance: str,
        alert: Alarm,
        n_replicas: int,
    ) -> None:
        self._bus, self._js, self._fleet, self._service, self._exchanges = bus, js, fleet, service, exchanges
        self._instance, self._alert = instance, alert
        self.dead = DeadLetters(
            js,
            tell=self._tell,
            close_case=self._close_case,
            reopen=self._reopen,
            counted=lambda n: bus.events.publish(DeadLettersChanged(n_kept=n)),
            n_replicas=n_replicas,
        )

    async def bury(self, taken: Taken, reason: str) -> None:
        """Keeps a message of the queue as a dead letter."""
        settings = taken.exchange.worker.settings
        await self.dead.bury(
            model=settings.model_name,
            reason=reason,
            stream=settings.stream_name,
            seq=taken.seq,
            subject=taken.exchange.queue_subject,
            n_delivered=taken.n_delivered,
            body=taken.exchange.data,
            headers=dict(taken.exchange.headers),
        )

    async def expire(self, worker: Worker, kept: Kept) -> None:
        """Ends a message that no node was given in time: kept as a dead letter first, then taken out of the queue; the
        one node that took it out tells the caller. A repeat of what was answered is answered so."""
        settings, late = worker.settings, expired(worker.settings)
        exchange = exchange_of(worker, kept)
        if exchange.req_id is not None and exchange.request is not None:
            record = await OnceBook(self._js, once_bucket(settings)).read(exchange.req_id)
            if record is not None and record.state == "done" and record.body == body_hash(exchange.body):
                if await self._js.delete(settings.stream_name, kept.seq):
                    await self._exchanges.repeat(exchange, answer_of(record, exchange.req_id))
                return
        await self.dead.bury(
            model=worker.name,
            reason=str(late),
            stream=settings.stream_name,
            seq=kept.seq,
            subject=settings.queue_subject,
            n_delivered=0,
            body=kept.data,
            headers=kept.headers,
        )
        if await self._js.delete(settings.stream_name, kept.seq):
            if exchange.request is not None:
                self._service.refused(exchange.inference(queued=True), late)
            await self._close_case(worker.name, kept, str(late), late)

    async def _tell(self, letter: DeadLetter) -> None:
        of = f" {letter.req_id}" if letter.req_id else ""
        await self._alert(letter.model, "critical", f"request{of} for {letter.model} is a dead letter: {letter.reason}")

    async def _close_case(self, model: str, kept: Kept, reason: str, error: RequestError | None = None) -> bool:
        """Answers the caller of a message that was given up; False when it was answered after all."""
        worker = self._fleet.workers.get(model)
        if worker is None:
            return True
        exchange = exchange_of(worker, kept)
        req_id = exchange.req_id
        error = error or GivenUp(f"the request is kept as a dead letter: {reason}")
        if req_id is not None:
            book = OnceBook(self._js, once_bucket(worker.settings))
            record = await book.read(req_id)
            if record is not None and record.state == "done" and record.body == exchange.fingerprint:
                return False
            await book.write(
                req_id,
                "done",
                body=exchange.fingerprint,
                owner=self._instance,
                seq=kept.seq,
                answer=error.native(req_id),
                over=None,
                limit_bytes=self._bus.max_payload,
            )
        await self._exchanges.answer(exchange, error.native(req_id))
        return True

    async def _reopen(self, model: str, req_id: str) -> None:
        worker = self._fleet.workers.get(model)
        if worker is None:
            return
        book = OnceBook(self._js, once_bucket(worker.settings))
        record = await book.read(req_id)
        if record is not None and record.state == "done":
            with suppress(Overtaken):
                await book.write(
                    req_id, "released", body=record.body, over=record.revision, limit_bytes=self._bus.max_payload
                )
