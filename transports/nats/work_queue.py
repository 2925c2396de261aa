"""One model's durable queue on this node: its requests through the engine, each to its end.

What `Intake` has put in comes out here. Every node that serves the model pulls from the one consumer, only as much as
its engine has room for, and takes each message through these steps:

    read → claimed in the once-book → computed → in the audit log → answered → written down as done → log on disk →
    acknowledged

So what a caller has been told stands in the log, even if this process is killed right after. The broker delivers a
message again when its acknowledgement stays out for ACK_WAIT, so whoever works on one says so every third of that. A
message comes back by itself after a crash, and at once after `hand_over`. What cannot be read and has nobody to be
told, or has failed MAX_DELIVER times, becomes a dead letter.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

from nats.aio.client import Client
from nats.aio.msg import Msg

from engine.service import InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.errors import (
    AuditUnavailable,
    BadRequest,
    Conflict,
    Draining,
    EngineFailed,
    EngineLost,
    GivenUp,
    ModelNotLoaded,
    QueueFull,
    RequestError,
)
from infsvc.types import ModelState
from transports.nats.bus import Bus
from transports.nats.depth import Depth
from transports.nats.exchange import Exchange, Exchanges
from transports.nats.expiry import came_s, expired
from transports.nats.jetstream import JetStream, JetStreamFault, election_s
from transports.nats.once import OnceBook, Overtaken, Record, answer_of
from transports.nats.puller import Puller

log = logging.getLogger("infsvc.nats")

_WRITTEN_S = 2.0
"""How long an answer waits for its audit row; a log that cannot be written must not keep it back."""
_AUDIT_S = 30.0
"""How long an acknowledgement waits for the audit row to be on disk."""
_N_TRIES = 3
_FULL_DELAY_S = 1.0
_NO_DELAY_S = 0.001
_LAST_DELAY_S = 30.0
_WAIT_FIRST_S, _WAIT_LAST_S = 0.05, 1.0
_DEPTH_BUSY_S, _DEPTH_IDLE_S, _DEPTH_SOON_S = 0.5, 2.0, 0.05
_MOST_AT_ONCE = 256
_LATER = (QueueFull, ModelNotLoaded, Draining, AuditUnavailable)
"""What says nothing about the request: it goes back, for this node or another."""
_GOING = frozenset({ModelState.DRAINING, ModelState.ON_DISK, ModelState.ABSENT})

Alive = Callable[[str, str, str], Awaitable[bool]]
Bury = Callable[["Taken", str], Awaitable[None]]


@dataclass
class Taken:
    """A message of the queue that this node works on.

    Attributes:
        ack: where its acknowledgements go; a second delivery brings a new one.
        came_s: when the broker took it, by its clock.
        waits: whether it waits for another message of the same request.
        answered: whether its caller has all it will get.
    """

    exchange: Exchange
    seq: int
    ack: str
    n_delivered: int
    came_s: float
    waits: bool = False
    answered: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def admitted(self) -> bool:
        """Whether the engine counts it."""
        return self.exchange.started

    @property
    def running(self) -> bool:
        """Whether it has a slot. Of an embedding nobody knows: it counts as in line until it ends."""
        return self.exchange.generation is not None and self.exchange.generation.running

    @property
    def waiting(self) -> bool:
        """Whether it counts as waiting here."""
        return not self.admitted and not self.answered


class WorkQueue:
    """A model's queue as this node sees it, over any number of connections. Loop thread only.

    Args:
        instance: this process among all nodes.
        alive: asks a process (by instance, model, req_id) whether it is at work on a request.
        bury: makes a dead letter of a message, with the reason.
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
        instance: str,
        alive: Alive,
        bury: Bury,
    ) -> None:
        self.worker, self.book = worker, book
        self._bus, self._js, self._exchanges, self._service = bus, js, exchanges, service
        self._instance, self._alive, self._bury = instance, alive, bury
        self._taken: dict[int, Taken] = {}
        self._claims: dict[str, Taken] = {}
        self.depth = Depth(worker, js, changed=self.wake)
        self._look, self._woken = asyncio.Event(), asyncio.Event()
        self._leaving = False
        settings = worker.settings
        self._puller = Puller(
            settings.stream_name,
            settings.queue_durable,
            room=self._room,
            take=self._take,
            patience_s=election_s(settings.stream_replicas),
        )

    @property
    def n_taken(self) -> int:
        """Messages that this node holds."""
        return len(self._taken)

    def works_on(self, req_id: str) -> bool:
        """Whether this process is at work on a request."""
        return req_id in self._claims

    def look(self) -> None:
        """Says that the broker's depth has changed."""
        self._look.set()

    def wake(self) -> None:
        """Says that the engine may have room again, or is in another state."""
        self._puller.wake()
        self._woken.set()
        self._count()

    async def run(self, nc: Client) -> None:
        """Serves the queue over one connection until it is cancelled; raises `ConsumerGone`."""
        self._look.set()
        watchers = [
            asyncio.create_task(self._keep_alive(), name=f"queue-alive-{self.worker.name}"),
            asyncio.create_task(self._watch_depth(), name=f"queue-depth-{self.worker.name}"),
        ]
        try:
            await self._puller.run(nc)
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)

    async def hand_over(self) -> None:
        """Takes no more messages and gives back, at once, those that no slot works on; the others go on."""
        self._leaving = True
        self._puller.wake()
        self._woken.set()
        for taken in list(self._taken.values()):
            generation = taken.exchange.generation
            if generation is None:
                if taken.task is not None:
                    taken.task.cancel()
            elif not generation.running:
                generation.cancel()
        self._count()

    def take_up(self) -> None:
        """Takes messages (again)."""
        self._leaving = False
        self._puller.wake()

    async def settled(self, seconds: float) -> None:
        """Waits until nothing is held any more, for at most `seconds`; drops what is left, for the broker to deliver
        again."""
        tasks = [taken.task for taken in self._taken.values() if taken.task is not None]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _room(self) -> int:
        """Messages that may be taken now: the engine's free slots, and half as many on their way, so that none idles.

        Where other doors keep the engine full there is never a free slot. Then as many as would be on their way stand
        in line beside theirs, and the line gives each client its share. Only what waits at the broker in spite of all
        other nodes is taken so: an idle one would have it already.
        """
        worker = self.worker
        if self._leaving or worker.state is not ModelState.READY:
            return 0
        held = [taken for taken in self._taken.values() if not taken.waits and not taken.answered]
        n_coming = sum(not taken.admitted for taken in held)
        n_ahead = max(1, worker.n_slots // 2)
        n_free = worker.n_slots + n_ahead - worker.n_in_flight - n_coming
        n_of_others = worker.n_in_flight - (len(held) - n_coming)
        n_in_line = sum(not taken.running for taken in held)
        n_fair = min(n_ahead - n_in_line, self.depth.n_pending) if n_of_others > 0 else 0
        return min(_MOST_AT_ONCE, max(n_free, n_fair))

    def _take(self, message: Msg) -> None:
        metadata = message.metadata
        seq = metadata.sequence.stream
        self.depth.heard(metadata.num_pending)
        taken = self._taken.get(seq)
        if taken is not None:
            # The broker thought it lost. It is not: acknowledgements now go where the broker waits for them.
            taken.ack, taken.n_delivered = message.reply, metadata.num_delivered
            return
        headers = message.headers or {}
        embeds = message.subject == subjects.queue(self.worker.name, embedding=True)
        exchange = Exchange(self.worker, message.data, headers, headers.get(subjects.REPLY_HEADER) or None, embeds)
        came = came_s(headers, metadata.timestamp.timestamp())
        taken = Taken(exchange, seq, message.reply, metadata.num_delivered, came)
        self._taken[seq] = taken
        taken.task = asyncio.create_task(self._serve(taken), name=f"queue-{self.worker.name}-{seq}")
        taken.task.add_done_callback(lambda _: self._forget(taken))
        self._count()

    def _forget(self, taken: Taken) -> None:
        del self._taken[taken.seq]
        if self._claims.get(taken.exchange.req_id or "") is taken:
            del self._claims[taken.exchange.req_id or ""]
        taken.ended.set()
        self.wake()

    async def _serve(self, taken: Taken) -> None:
        """A message to its end; whatever goes wrong, it is kept by the broker or answered."""
        exchange = taken.exchange
        try:
            if self._leaving:
                await self._give_back(taken)
            else:
                await self._attend(taken)
        except JetStreamFault as fault:
            log.warning(
                "a queued request is left to the broker, which delivers it again: %s",
                fault,
                extra={"code": "queue.left", "model": self.worker.name, "meta": {"req_id": exchange.req_id}},
            )
        except asyncio.CancelledError:
            if not self._leaving:
                raise
            await self._give_back(taken)
        except Exception as error:
            log.exception("a queued request broke", extra={"code": "queue.broke", "model": self.worker.name})
            with suppress(JetStreamFault):
                await self._failed(taken, f"the node failed: {type(error).__name__}: {error}")

    async def _attend(self, taken: Taken) -> None:
        exchange = taken.exchange
        try:
            exchange.read()
            if not exchange.targets:
                raise BadRequest("it names neither reply_to nor req_id, so nobody can be told", param="req_id")
        except RequestError as error:
            if exchange.targets:
                await self._answer(taken, error.native(exchange.req_id))
                await self._acknowledge(taken)
            else:
                await self._end_as_dead(taken, f"{error.code}: {error}")
            return
        if exchange.req_id is None:
            # A number of the stream is the same at each delivery.
            exchange.req_id = exchange.headers.get(subjects.REQ_ID_HEADER) or f"{self.worker.name}-{taken.seq}"
        try:
            exchange.check_headers()
            claim = await self._claim(taken)
        except RequestError as error:
            self._service.refused(exchange.inference(queued=True), error)
            await self._refuse(taken, error)
            return
        if isinstance(claim, Record):
            # Who waited for the message itself knows that its owner has answered.
            if not (taken.waits and claim.seq == taken.seq):
                await self._exchanges.repeat(exchange, answer_of(claim, exchange.req_id))
            self._answered(taken)
            await self._flush()
            await self._acknowledge(taken)
            return
        settings = self.worker.settings
        if self.depth.now_s() - taken.came_s > settings.queue_max_age:
            late = expired(settings)
            self._service.refused(exchange.inference(queued=True), late)
            await self._end_as_dead(taken, str(late), late)
            return
        await self._execute(taken, claim)

    def _answered(self, taken: Taken) -> None:
        """What is answered counts as waiting no more, although the broker still has it for a moment."""
        taken.answered = True
        self._count()

    async def _answer(self, taken: Taken, answer: dict[str, object]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_WRITTEN_S):
                await self.worker.audit.written()
        await self._exchanges.answer(taken.exchange, answer, patiently=True)
        self._answered(taken)

    async def _refuse(self, taken: Taken, error: RequestError) -> None:
        await self._answer(taken, error.native(taken.exchange.req_id))
        await self._flush()
        await self._acknowledge(taken)

    async def _claim(self, taken: Taken) -> int | Record:
        """Makes this process the one that computes the request.

        Returns:
            The revision of its record, 0 when the book takes no records; or the record of who has computed it.

        Raises:
            Conflict: the id belongs to another body.
        """
        exchange, worker = taken.exchange, self.worker
        req_id, body = exchange.req_id or "", exchange.fingerprint
        while (other := self._claims.get(req_id)) is not None:
            taken.waits = True
            self._puller.wake()
            await other.ended.wait()
        self._claims[req_id] = taken
        over, wait_s, before = 0, _WAIT_FIRST_S, None
        while True:
            try:
                revision = await self._write(taken, "running", over=over)
                if before is not None and before.state == "running":
                    worker.note(
                        "warning", "queue.taken_over", f"{req_id} ran on {before.owner} when that ended", req_id=req_id
                    )
                return revision
            except Overtaken:
                record = await self.book.read(req_id)
            except JetStreamFault as fault:
                if fault.unanswered:
                    raise
                # Answering is promised more firmly than answering once.
                log.error(
                    "requests are not written down and may run twice: %s",
                    fault,
                    extra={"code": "queue.unrecorded", "model": worker.name},
                )
                return 0
            if record is None:
                over = 0
                continue
            over, before = record.revision, record
            if record.state == "void":
                continue
            if record.body != body:
                raise Conflict(req_id)
            if record.state == "done":
                return record
            if record.state == "released" or record.owner == self._instance:
                continue
            if not await self._alive(record.owner, worker.name, req_id):
                continue
            taken.waits = True
            self._puller.wake()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, _WAIT_LAST_S)
            over = 0  # the record is read anew: over its last revision this would take the request from who runs it

    async def _write(
        self, taken: Taken, state: str, *, over: int | None, answer: dict[str, object] | None = None
    ) -> int:
        exchange = taken.exchange
        return await self.book.write(
            exchange.req_id or "",
            state,  # type: ignore[arg-type]
            body=exchange.fingerprint,
            owner=self._instance,
            seq=taken.seq,
            answer=answer,
            over=over,
            limit_bytes=self._bus.max_payload,
        )

    async def _execute(self, taken: Taken, revision: int) -> None:
        exchange = taken.exchange
        taken.waits = False
        try:
            answer = await self._exchanges.compute(exchange, queued=True)
        except _LATER as error:
            log.debug("a queued request goes back: %s", error, extra={"code": "queue.back", "model": self.worker.name})
            await self._give_back(taken, delay_s=0 if self._leaving else _FULL_DELAY_S)
            return
        except EngineFailed as error:
            if isinstance(error, EngineLost):
                await self._restarted()
            if self._is_ending:
                await self._give_back(taken)
            else:
                await self._failed(taken, str(error))
            return
        except RequestError as error:
            answer = error.native(exchange.req_id)
        if answer.get("finish_reason") == "cancelled" and self._is_ending:
            await self._give_back(taken)
            return
        await self._answer(taken, answer)
        await self._write_done(taken, answer, revision)
        await self._flush()
        await self._acknowledge(taken)

    async def _restarted(self) -> None:
        """Waits while a lost engine is started again: a request that was delivered sooner would only come back."""
        while self.worker.state is ModelState.LOADING and not self._leaving:
            self._woken.clear()
            await self._woken.wait()

    @property
    def _is_ending(self) -> bool:
        """Whether what ends now was ended by the node or the model leaving, and by nobody's wish."""
        return self._leaving or self._service.draining or self.worker.state in _GOING

    async def _write_done(self, taken: Taken, answer: dict[str, object], revision: int) -> None:
        """Writes the answer down. Whoever took the request over meanwhile has written, or will write, one as good."""
        for _ in range(_N_TRIES):
            try:
                await self._write(taken, "done", over=revision or None, answer=answer)
                return
            except Overtaken:
                return
            except JetStreamFault as fault:
                if not fault.unanswered:
                    log.error(
                        "an answer is not written down: %s",
                        fault,
                        extra={"code": "queue.unrecorded", "model": self.worker.name},
                    )
                    return
                await asyncio.sleep(_WAIT_LAST_S)

    async def _flush(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_AUDIT_S):
                await self.worker.audit.flush()

    async def _acknowledge(self, taken: Taken) -> None:
        """Tells the broker that the message is done with, and waits until it has heard it."""
        for _ in range(_N_TRIES):
            try:
                await self._js.confirm(taken.ack)
                return
            except JetStreamFault as fault:
                if not fault.unanswered:
                    break
                await asyncio.sleep(_WAIT_FIRST_S)
        log.debug("an acknowledgement was not confirmed", extra={"code": "queue.unacked", "model": self.worker.name})

    async def _give_back(self, taken: Taken, *, delay_s: float = 0.0) -> None:
        """Puts a message back for whoever has room. That is no failure, so it does not use up the last delivery."""
        if self._claims.get(taken.exchange.req_id or "") is taken:
            with suppress(JetStreamFault, Overtaken):
                await self._write(taken, "released", over=None)
        if taken.n_delivered >= self.worker.settings.max_deliver:
            headers = {k: v for k, v in taken.exchange.headers.items() if k != subjects.MSG_ID_HEADER}
            try:
                await self._js.publish(taken.exchange.queue_subject, taken.exchange.data, headers)
            except JetStreamFault as fault:
                log.error(
                    "a request cannot be put back: %s", fault, extra={"code": "queue.back", "model": self.worker.name}
                )
            else:
                await self._acknowledge(taken)
                return
        await self._nak(taken, delay_s)

    async def _nak(self, taken: Taken, delay_s: float) -> None:
        # Never without a delay: the broker keeps one over its own restart, and forgets a bare NAK.
        words = json.dumps({"delay": int(max(delay_s, _NO_DELAY_S) * 1e9)})
        await self._js.send(taken.ack, f"-NAK {words}".encode())

    async def _failed(self, taken: Taken, reason: str) -> None:
        """A request that made something break: again later, and at the last delivery a dead letter."""
        if taken.n_delivered < self.worker.settings.max_deliver:
            with suppress(JetStreamFault, Overtaken):
                await self._write(taken, "released", over=None)
            await self._nak(taken, min(2.0 ** (taken.n_delivered - 1), _LAST_DELAY_S))
            return
        words = f"failed {taken.n_delivered} times and is kept as a dead letter: {reason}"
        await self._end_as_dead(taken, reason, GivenUp(words))

    async def _end_as_dead(self, taken: Taken, reason: str, error: RequestError | None = None) -> None:
        """Buries a message; `error` is what its caller is told, if there is one."""
        exchange = taken.exchange
        await self._bury(taken, reason)
        if error is not None and exchange.targets:
            answer = error.native(exchange.req_id)
            await self._answer(taken, answer)
            with suppress(JetStreamFault, Overtaken):
                await self._write(taken, "done", over=None, answer=answer)
        await self._js.send(taken.ack, b"+TERM " + reason.replace("\n", " ").encode(errors="replace"))

    async def _keep_alive(self) -> None:
        """Says of every message held that it is worked on, three times within the broker's patience."""
        while True:
            await asyncio.sleep(self.worker.settings.ack_wait / 3)
            for taken in list(self._taken.values()):
                await self._js.send(taken.ack, b"+WPI")

    async def _watch_depth(self) -> None:
        """Keeps the model's depth true: asks the broker at once after a change, else now and then."""
        while True:
            with suppress(JetStreamFault):
                await self.depth.read()
            self._look.clear()
            await asyncio.sleep(_DEPTH_SOON_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(_DEPTH_BUSY_S if self.depth.n_pending or self._taken else _DEPTH_IDLE_S):
                    await self._look.wait()

    def _count(self) -> None:
        n_here = sum(taken.waiting for taken in self._taken.values())
        self.worker.n_queued_durable = self.depth.n_pending + n_here
