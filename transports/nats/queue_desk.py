"""What operators and callers do to what waits in the durable queues: look, take one request out, empty one.

It stands apart from `Durable`, which serves the queues, because nothing here is on a request's way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from engine.fleet import Fleet
from engine.service import InferenceService
from engine.worker import Worker
from infsvc.errors import QueueUnavailable, Removed
from infsvc.types import CompletionReply
from transports.nats.durable import Durable
from transports.nats.exchange import Exchanges, exchange_of
from transports.nats.jetstream import JetStreamFault, Kept, seconds_of
from transports.nats.streams import spool_stream
from transports.nats.subscriptions import is_served

log = logging.getLogger("infsvc.nats")


class QueueDesk:
    """Loop thread only."""

    def __init__(self, durable: Durable, fleet: Fleet, service: InferenceService, exchanges: Exchanges) -> None:
        self._durable, self._fleet, self._service, self._exchanges = durable, fleet, service, exchanges
        self._cancelling = asyncio.Lock()

    def _served(self) -> list[Worker]:
        return [worker for worker in self._fleet.workers.values() if is_served(worker)]

    async def overview(self) -> list[dict[str, Any]]:
        """What `/api/queue` shows: each served model's queue as the broker has it."""
        shown = []
        for worker in self._served():
            settings = worker.settings
            problem = await self._durable.reason(worker)
            entry: dict[str, Any] = {
                "model": worker.name,
                "subject": settings.queue_subject,
                "stream": settings.stream_name,
                "capacity": settings.queue_max_msgs,
                "max_age_s": settings.queue_max_age,
                "max_deliver": settings.max_deliver,
                "max_ack_pending": settings.max_ack_pending,
                "durable": problem is None,
            }
            if problem is None:
                try:
                    entry |= await self._figures(worker)
                except JetStreamFault as fault:
                    problem = str(fault)
                    entry["durable"] = False
            if problem is not None:
                entry["reason"] = problem
            if self._durable.foreign(worker.name):
                entry["foreign_streams"] = list(self._durable.foreign(worker.name))
            shown.append(entry)
        return shown

    async def _figures(self, worker: Worker) -> dict[str, Any]:
        settings, call = worker.settings, self._durable.js.call
        info = await call(f"CONSUMER.INFO.{settings.stream_name}.{settings.queue_durable}")
        figures = {"waiting": info["num_pending"], "taken": info["num_ack_pending"]}
        figures["redelivered"] = info["num_redelivered"]
        queue = await call(f"STREAM.INFO.{settings.stream_name}")
        if queue["state"]["messages"]:
            # Both by the broker's clock.
            oldest_s = seconds_of(queue["ts"]) - seconds_of(queue["state"]["first_ts"])
            figures["oldest_s"] = round(max(0.0, oldest_s), 3)
        with suppress(JetStreamFault):  # where an operator's own stream has the subject there is none
            spool = await call(f"STREAM.INFO.{spool_stream(settings).name}")
            figures["spooled"] = spool["state"]["messages"]
        return figures

    async def cancel(self, req_id: str) -> bool:
        """Takes a request that no node has taken yet out of its queue; its caller is told. Whether this node did: of
        several that are asked, one does. Looks through all that waits."""
        async with self._cancelling:
            for worker in self._served():
                if worker.n_queued_durable:
                    with suppress(JetStreamFault):
                        if await self._withdraw(worker, req_id):
                            return True
        return False

    async def _withdraw(self, worker: Worker, req_id: str) -> bool:
        async for kept in self._waiting(worker):
            exchange = exchange_of(worker, kept)
            if exchange.req_id != req_id or not await self._durable.js.delete(worker.settings.stream_name, kept.seq):
                continue
            reply = CompletionReply(
                req_id=req_id, text="", tokens_in=0, tokens_out=0, finish_reason="cancelled", duration_ms=0, ms=0
            ).wire()
            if exchange.request is not None:
                self._service.withdrawn(exchange.inference(queued=True))
                if exchange.streams:
                    reply["done"] = True
            await self._exchanges.answer(exchange, reply)
            return True
        return False

    async def _waiting(self, worker: Worker) -> AsyncIterator[Kept]:
        """The messages of a model's queue that were never given to a node, oldest first."""
        settings = worker.settings
        info = await self._durable.js.call(f"CONSUMER.INFO.{settings.stream_name}.{settings.queue_durable}")
        seq = int(info["delivered"]["stream_seq"])
        while (kept := await self._durable.js.next_message(settings.stream_name, seq + 1)) is not None:
            seq = kept.seq
            yield kept

    async def purge(self, model: str) -> int:
        """Removes what waits in a model's queue and was never given to a node; each caller is told. How many.

        Raises:
            UnknownModel, QueueUnavailable.
        """
        worker = self._fleet.get(model)
        problem = await self._durable.reason(worker)
        if problem is not None:
            raise QueueUnavailable(f"the queue of {model} cannot be purged: {problem}")
        settings, n = worker.settings, 0
        try:
            async for kept in self._waiting(worker):
                if await self._durable.js.delete(settings.stream_name, kept.seq):
                    n += 1
                    exchange = exchange_of(worker, kept)
                    error = Removed("an operator removed the request from the queue before it ran")
                    await self._exchanges.answer(exchange, error.native(exchange.req_id))
        except JetStreamFault as fault:
            raise QueueUnavailable(f"the queue of {model} cannot be purged: {fault}") from None
        log.warning("%d requests were removed from the queue of %s", n, model, extra={"code": "queue.purged"})
        return n
