"""Requests that could not be answered, kept with the reason until somebody replays or deletes them.

A node that gives up on a message puts it here itself. What ended without a node's word, because the process that ran
it died each time, is told by the broker's advisories: a stream keeps those, and whichever node is up moves the message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg

from infsvc import subjects
from infsvc.errors import BadRequest, NotFound, QueueFull, QueueUnavailable
from infsvc.types import new_req_id
from transports.nats.bus import bounded
from transports.nats.jetstream import (
    FULL,
    SIZE_HEADER,
    STREAM_NOT_FOUND,
    JetStream,
    JetStreamFault,
    Kept,
    election_s,
)
from transports.nats.messages import named, read_object
from transports.nats.puller import Puller
from transports.nats.streams import (
    ADVISORIES,
    DEAD,
    UNDERTAKERS,
    advisory_consumer,
    advisory_stream,
    dead_stream,
    model_of_queue,
)

log = logging.getLogger("infsvc.nats")

_N_AT_ONCE = 16
_DELETED = "Unacknowledged message was deleted"
"""The broker's reason where a message left its stream by itself or by another's hand."""
_MODEL, _REASON, _STREAM = "Infsvc-Dead-Model", "Infsvc-Dead-Reason", "Infsvc-Dead-Stream"
_SEQ, _DELIVERIES, _SUBJECT = "Infsvc-Dead-Seq", "Infsvc-Dead-Deliveries", "Infsvc-Dead-Subject"
_REQ_ID = "Infsvc-Dead-Req-Id"
_KEPT_HEADERS = (subjects.REPLY_HEADER, subjects.TRACE_HEADER, subjects.REQ_ID_HEADER, subjects.CLIENT_HEADER)
_LEAVE_S = 0.5
_SOON_S, _LOOK_S = 0.1, 30.0
"""Letters that come or go together are counted together; what nobody told of is found at the latest then."""


@dataclass(frozen=True, kw_only=True)
class DeadHead:
    """A dead letter without its body, as a list shows it.

    Attributes:
        id: its number, which replay and delete name.
        reason: what went wrong the last time.
        n_delivered: how often it was tried.
        died_ts: when, in seconds since the epoch.
        n_bytes: the size of its body.
    """

    id: int
    model: str
    req_id: str | None
    reason: str
    n_delivered: int
    died_ts: float
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class DeadLetter(DeadHead):
    """One request that could not be answered.

    Attributes:
        subject: the queue it lay in.
        body: the message as it came.
    """

    subject: str
    body: bytes
    headers: dict[str, str]

    def wire(self) -> dict[str, Any]:
        """The letter as JSON; the body as an object when it is one, else as text."""
        try:
            body: Any = read_object(self.body)
        except Exception:
            body = self.body.decode(errors="replace")
        died = datetime.fromtimestamp(self.died_ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "id": self.id,
            "model": self.model,
            "req_id": self.req_id,
            "reason": self.reason,
            "deliveries": self.n_delivered,
            "subject": self.subject,
            "died": died,
            "body": body,
        }


class DeadLetters:
    """The dead letters of every model on the broker. Loop thread only.

    Args:
        tell: called with each new letter of this node's making.
        close_case: called before a message that the broker gave up on is moved (model, body, headers, reason): answers
            its caller; whether the message is dead indeed.
        reopen: called before a replay (model, req_id): lets the request be executed again.
        n_replicas: copies of the streams in a cluster.
        counted: called with how many there are, each time a letter came or went on any node.
    """

    def __init__(
        self,
        js: JetStream,
        *,
        tell: Callable[[DeadLetter], Awaitable[None]],
        close_case: Callable[[str, Kept, str], Awaitable[bool]],
        reopen: Callable[[str, str], Awaitable[None]],
        n_replicas: int = 1,
        counted: Callable[[int], None],
    ) -> None:
        self._n_replicas = n_replicas
        self._js, self._tell, self._close_case, self._reopen, self._counted = js, tell, close_case, reopen, counted
        self.n_kept: int | None = None
        self._state: tuple[int, ...] | None = None
        self._moved = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._puller = Puller(
            ADVISORIES,
            UNDERTAKERS,
            room=lambda: _N_AT_ONCE - len(self._tasks),
            take=self._take_advisory,
            patience_s=election_s(n_replicas),
        )

    async def prepare(self) -> None:
        """Makes the streams; raises `JetStreamFault`."""
        await self._js.have_stream(dead_stream(self._n_replicas))
        await self._js.have_stream(advisory_stream(self._n_replicas))
        await self._js.have_consumer(ADVISORIES, advisory_consumer())

    async def run(self, nc: Client) -> None:
        """Reads advisories, and counts, over one connection until it is cancelled; raises `ConsumerGone`."""
        # The stream's own subject tells of what any node buries; nobody but the nodes tells of what goes.
        heard = [await nc.subscribe(subject, cb=self._hear) for subject in (subjects.dead("*"), subjects.DEAD_GONE)]
        counter = asyncio.create_task(self._count_forever(), name="dead-letters-count")
        try:
            await self._puller.run(nc)
        finally:
            counter.cancel()
            await asyncio.gather(counter, return_exceptions=True)
            if not nc.is_closed:
                for subscription in heard:
                    await bounded(subscription.unsubscribe(), _LEAVE_S)

    async def _hear(self, message: Msg) -> None:
        self._moved.set()

    async def _count_forever(self) -> None:
        while True:
            self._moved.clear()
            with suppress(JetStreamFault):
                state = (await self._js.call(f"STREAM.INFO.{DEAD}"))["state"]
                now = (int(state["messages"]), int(state["first_seq"]), int(state["last_seq"]))
                if now != self._state:
                    self._state, self.n_kept = now, now[0]
                    self._counted(now[0])
            await asyncio.sleep(_SOON_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._moved.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def bury(
        self,
        *,
        model: str,
        reason: str,
        stream: str,
        seq: int,
        subject: str,
        n_delivered: int,
        body: bytes,
        headers: dict[str, str],
    ) -> None:
        """Keeps a message as a dead letter; the same one twice is kept once. Raises `JetStreamFault`."""
        marks = {key: headers[key] for key in _KEPT_HEADERS if key in headers} | {
            _MODEL: model,
            _REASON: " ".join(reason.split())[:2000],
            _STREAM: stream,
            _SEQ: str(seq),
            _DELIVERIES: str(n_delivered),
            _SUBJECT: subject,
            subjects.MSG_ID_HEADER: f"dead:{stream}:{seq}",
        }
        req_id = _letter(Kept(subject, seq, body, marks, 0.0)).req_id
        if req_id is not None and _is_plain(req_id):
            marks[_REQ_ID] = req_id
        stored = await self._js.publish(subjects.dead(model), body, marks)
        if stored.duplicate:
            return
        letter = _letter(Kept(subjects.dead(model), stored.seq, body, marks, time.time()))
        log.error(
            "a request for %s is dead: %s",
            model,
            letter.reason,
            extra={"code": "queue.dead", "model": model, "meta": {"id": letter.id, "req_id": letter.req_id}},
        )
        await self._tell(letter)

    async def page(self, *, model: str | None = None, after: int = 0, limit: int = 100) -> list[DeadLetter]:
        """Letters in order of their death.

        Args:
            after: the id behind which the page begins.

        Raises:
            QueueUnavailable: the broker cannot be asked.
        """
        subject = ">" if model is None else subjects.dead(model)
        letters: list[DeadLetter] = []
        with _plainly():
            while len(letters) < limit:
                kept = await self._js.next_message(DEAD, after + 1, subject)
                if kept is None:
                    break
                after = kept.seq
                letter = _letter(kept)
                if model is None or letter.model == model:
                    letters.append(letter)
        return letters

    async def heads(self, *, after: int = 0) -> AsyncIterator[list[DeadHead]]:
        """Every letter behind an id, in order of death and some hundred at a time, without bodies.

        Raises:
            QueueUnavailable: the broker cannot be asked.
        """
        with _plainly():
            async for batch in self._js.heads(DEAD, after):
                yield [_head(kept) for kept in batch]

    async def letter(self, number: int) -> DeadLetter:
        """One letter with its body; raises `NotFound`, `QueueUnavailable`."""
        with _plainly():
            kept = await self._js.message(DEAD, number)
        if kept is None:
            raise _no_letter(number)
        return _letter(kept)

    async def count(self) -> int:
        """How many there are; raises `QueueUnavailable`."""
        with _plainly():
            return int((await self._js.call(f"STREAM.INFO.{DEAD}"))["state"]["messages"])

    async def delete(self, number: int) -> None:
        """Forgets a letter; raises `NotFound`, `QueueUnavailable`."""
        with _plainly():
            if not await self._js.delete(DEAD, number):
                raise _no_letter(number)
            await self._js.send(subjects.DEAD_GONE)

    async def replay(self, number: int) -> DeadLetter:
        """Puts a letter's request back into its queue, to be answered where it says.

        Raises:
            NotFound: there is no such letter.
            BadRequest: its message is not there any more.
            QueueFull, QueueUnavailable: it stays a letter.
        """
        with _plainly():
            kept = await self._js.message(DEAD, number)
            if kept is None:
                raise _no_letter(number)
            letter = _letter(kept)
            if not letter.body:
                raise BadRequest(f"dead letter {number} has no message any more: delete it", param="id")
            if letter.req_id is not None:
                await self._reopen(letter.model, letter.req_id)
            headers = {key: kept.headers[key] for key in _KEPT_HEADERS if key in kept.headers}
            # A new id: the first one's may still be within the broker's window.
            headers[subjects.MSG_ID_HEADER] = f"replay:{number}:{new_req_id()}"
            try:
                await self._js.publish(letter.subject, letter.body, headers)
            except JetStreamFault as fault:
                if fault.err_code == FULL:
                    raise QueueFull(model=letter.model, n_waiting=0, capacity=0, retry_after_s=5) from None
                raise
            await self._js.delete(DEAD, number)
            await self._js.send(subjects.DEAD_GONE)
            return letter

    def _take_advisory(self, message: Msg) -> None:
        task = asyncio.create_task(self._heed(message), name="dead-letters")
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._puller.wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an advisory broke", exc_info=error, extra={"code": "queue.advisory"})

    async def _heed(self, message: Msg) -> None:
        try:
            advisory = json.loads(message.data)
            stream, seq = str(advisory["stream"]), int(advisory["stream_seq"])
        except (ValueError, KeyError, TypeError):
            await self._js.send(message.reply, b"+TERM not an advisory")
            return
        try:
            await self._move(stream, seq, advisory)
        except JetStreamFault as fault:
            log.debug("an advisory waits: %s", fault, extra={"code": "queue.advisory"})
            await self._js.send(message.reply, b'-NAK {"delay": 2000000000}')
            return
        await self._js.send(message.reply, b"+ACK")

    async def _move(self, stream: str, seq: int, advisory: dict[str, Any]) -> None:
        """Moves the message that an advisory tells of; one of another program's streams is none of ours."""
        try:
            config = (await self._js.call(f"STREAM.INFO.{stream}"))["config"]
        except JetStreamFault as fault:
            if fault.err_code == STREAM_NOT_FOUND:
                return
            raise
        model = model_of_queue(config)
        if model is None:
            return
        kept = await self._js.message(stream, seq)
        if kept is None and self._n_replicas > 1 and advisory.get("reason") == _DELETED:
            # A cluster's consumer finds a message gone that was acknowledged to the leader before it.
            log.info("message %d of %s is gone, and was worked on", seq, stream, extra={"code": "queue.gone"})
            return
        if "reason" in advisory or kept is None:
            # A node that terminates a message has buried it first; then this finds it there and adds nothing.
            if kept is None and "reason" in advisory:
                await self._bury_kept(model, stream, seq, advisory, Kept(str(config["subjects"][0]), seq, b"", {}, 0.0))
            return
        reason = (
            f"delivered {advisory.get('deliveries')} times and never finished: the process that ran it died, or stood "
            "still, each time"
        )
        if await self._close_case(model, kept, reason):
            await self._bury_kept(model, stream, seq, advisory | {"reason": reason}, kept)
        await self._js.delete(stream, seq)

    async def _bury_kept(self, model: str, stream: str, seq: int, advisory: dict[str, Any], kept: Kept) -> None:
        await self.bury(
            model=model,
            reason=str(advisory["reason"]),
            stream=stream,
            seq=seq,
            subject=kept.subject,
            n_delivered=int(advisory.get("deliveries", 0)),
            body=kept.data,
            headers=kept.headers,
        )


def _letter(kept: Kept) -> DeadLetter:
    headers = kept.headers
    req_id = None
    with suppress(Exception):
        req_id = named(read_object(kept.data), "req_id")
    return DeadLetter(
        id=kept.seq,
        model=headers.get(_MODEL, kept.subject.rpartition(".")[2]),
        req_id=req_id or headers.get(subjects.REQ_ID_HEADER),
        reason=headers.get(_REASON, ""),
        n_delivered=int(headers.get(_DELIVERIES, "0")),
        died_ts=kept.stored_s,
        n_bytes=len(kept.data),
        subject=headers.get(_SUBJECT, ""),
        body=kept.data,
        headers=headers,
    )


def _head(kept: Kept) -> DeadHead:
    headers = kept.headers
    return DeadHead(
        id=kept.seq,
        model=headers.get(_MODEL, kept.subject.rpartition(".")[2]),
        req_id=headers.get(_REQ_ID) or headers.get(subjects.REQ_ID_HEADER),
        reason=headers.get(_REASON, ""),
        n_delivered=int(headers.get(_DELIVERIES, "0")),
        died_ts=kept.stored_s,
        n_bytes=int(headers.get(SIZE_HEADER, "0")),
    )


def _is_plain(text: str) -> bool:
    """Whether a header can carry it."""
    return len(text) <= 255 and text.isprintable() and text == text.strip()


def _no_letter(number: int) -> NotFound:
    return NotFound(f"there is no dead letter {number}: GET /api/dead lists them", param="id")


class _plainly:
    """Turns a broker's fault into the error that a door shows."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, JetStreamFault):
            raise QueueUnavailable(f"the broker's dead letters cannot be reached: {error}") from error
