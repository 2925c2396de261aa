"""Requests of this node's gateway that another node on the bus answers: which node, and the way there and back.

It stands apart from the gateway's routes because nothing here knows HTTP but as method, path, headers and bytes, and
from the doors of NATS because it asks and does not answer. The owner runs the request as its own gateway would, and
audits it; `transports.nats.forward_door` is that side. Loop thread only.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError

from infsvc import subjects
from infsvc.errors import NodeLost, RequestError
from infsvc.roster import roomiest
from infsvc.types import ServiceDocument
from transports.forward_parts import ASK_S, SILENT_S, Part, pieces
from transports.nats.bus import Bus, bounded, heeding
from transports.nats.exchange import NO_RESPONDERS
from transports.nats.messages import encode, read_object
from transports.nats.registry import Registry

_TICK_S = 0.5
_CANCEL_S = 0.4
_LEAVE_S = 0.5
_BUSY = frozenset({429, 503})
"""Statuses by which a node says that it has not begun: the next one may."""


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An HTTP request as it goes to another node. `headers` are those that mean something there."""

    method: str
    path: str
    headers: Sequence[tuple[str, str]]
    body: bytes


class Forwarded:
    """A request that a node has been sent. `head()` first, then `pieces()`, then `close()`, whatever happens.

    Attributes:
        node: who answers.
        opened_s: when it was sent, in seconds since the epoch.
        absent: whether the broker says that nobody is there.
        status, headers: the answer's, once `head()` has returned.
    """

    def __init__(self, bus: Bus, target: ServiceDocument) -> None:
        self._bus, self._nc = bus, bus.nc
        self.node, self.model = target.node, target.model_name
        self.key = (target.node, target.start_time)
        self._subject = subjects.forward(target.node, target.start_time)
        self._id = secrets.token_hex(8)
        self._answers: Subscription | None = None
        self._asking: asyncio.Task[None] | None = None
        self._n_taken = self._n_asked = 0
        self._ended = self._closed = False
        self.absent = False
        self.opened_s = time.time()
        self.status = 0
        self.headers: list[tuple[str, str]] = []

    async def open(self, request: Outgoing) -> None:
        """Sends the request. Raises `NodeLost` when this node itself has lost the broker."""
        nc = self._connection()
        try:
            inbox = nc.new_inbox()
            self._answers = await nc.subscribe(inbox)
        except (NatsError, OSError):
            raise self._lost("cannot be asked: the broker is gone") from None
        self._inbox = inbox
        cut = list(pieces(request.body, max_payload=self._bus.max_payload))
        for seq, piece in enumerate(cut):
            part = Part(kind="body", id=self._id, seq=seq, more=seq + 1 < len(cut))
            if not seq:
                part = Part(
                    kind="open",
                    id=self._id,
                    more=part.more,
                    method=request.method,
                    path=request.path,
                    headers=[list(pair) for pair in request.headers],
                )
            await self._send(part, piece, reply=inbox if not seq else "")
        self._asking = asyncio.create_task(self._ask(), name=f"forward-ask-{self.node}")

    async def head(self) -> None:
        """Waits for the answer's status and headers.

        Raises:
            NoRespondersError: nobody is there; nothing has been begun.
            NodeLost: the node went before it answered.
        """
        _, part = await self._next()
        if part.kind != "head":
            raise self._lost("sent an answer without its head")
        self.status = part.status
        self.headers = [(name, value) for name, value in part.headers]

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The answer's body, in order and without holes. Raises `NodeLost`."""
        while True:
            message, part = await self._next()
            if part.kind == "end":
                self._ended = True
                return
            yield message.data

    async def body(self) -> bytes:
        """All of it; raises `NodeLost`."""
        return b"".join([piece async for piece in self.pieces()])

    async def close(self) -> None:
        """Listens no more; a request that has not ended is cancelled, as when a client closes its connection."""
        self._closed = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if not self._ended:
            await bounded(self._send(Part(kind="stop", id=self._id), b""), _LEAVE_S)
        if self._answers is not None and self._nc is not None and not self._nc.is_closed:
            await bounded(self._answers.unsubscribe(), _LEAVE_S)

    async def _next(self) -> tuple[Msg, Part]:
        """The next part that is no sign of life."""
        assert self._answers is not None
        heard_s = time.monotonic()
        while True:
            nc = self._connection()
            if self._closed:
                raise self._lost("was told to stop")
            try:
                message = await heeding(self._answers.next_msg(timeout=_TICK_S))
            except TimeoutError:
                if time.monotonic() - heard_s > SILENT_S:
                    raise self._lost(f"has been silent for {SILENT_S:g} s") from None
                continue
            except (NatsError, OSError):
                if nc.is_closed or self._bus.nc is not nc:
                    raise self._lost("cannot be heard: the broker is gone") from None
                raise self._lost("cannot be heard: its answer comes faster than it is read") from None
            heard_s = time.monotonic()
            if (message.headers or {}).get("Status") == NO_RESPONDERS:
                self.absent = True
                if not self._n_taken and not self._n_asked:
                    raise NoRespondersError
                raise self._lost("went in the middle of its answer")
            part = Part.read(message.headers)
            if part is None or part.kind == "alive":
                continue
            if part.kind == "unknown":
                raise self._lost("has forgotten the request: it was cut off from the broker")
            if part.seq != self._n_taken:
                raise self._lost("sent an answer of which a part was lost")
            self._n_taken += 1
            return message, part

    async def _ask(self) -> None:
        while True:
            await asyncio.sleep(ASK_S)
            self._n_asked += 1
            await self._send(Part(kind="ask", id=self._id), b"", reply=self._inbox)

    async def _send(self, part: Part, data: bytes, *, reply: str = "") -> None:
        await self._bus.publish(self._subject, data, reply=reply, headers=part.marks())

    def _connection(self) -> Client:
        nc = self._nc
        if nc is None or nc.is_closed or self._bus.nc is not nc:
            raise self._lost("cannot be heard: the broker is gone")
        return nc

    def _lost(self, why: str) -> NodeLost:
        return NodeLost(self.node, why)


@dataclass(frozen=True)
class Refusal:
    """The whole answer of a node that has not begun, because it is full, or the model has left it."""

    node: str
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Forwarder:
    """Finds the node for a model and sends it requests."""

    def __init__(self, bus: Bus, registry: Registry) -> None:
        self._bus, self._registry = bus, registry
        self._open: set[Forwarded] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._absent_s: dict[tuple[str, str], float] = {}
        self.n_forwarded = 0

    def services(self, model: str | None = None) -> list[ServiceDocument]:
        """Every model of other nodes that this one can reach, or those of one name. One whose node was not there when
        it was asked is `offline` until it is heard of again, whatever it said last."""
        if self._bus.nc is None:
            return []
        now_s = time.time()
        return [
            each.service(now_s).model_copy(
                update={"status": "offline", "reason": f"{each.document.node} does not answer"}
                if each.last_seen_s <= self._absent_s.get(each.key[1:], 0.0)
                else {}
            )
            for each in self._registry.roster.sightings()
            if model in (None, each.document.model_name)
        ]

    def nodes(self, model: str) -> list[ServiceDocument]:
        """The other nodes where the model is online, the one with the most room first."""
        seen_s = {sighting.key: sighting.last_seen_s for sighting in self._registry.roster.sightings()}

        def n_more(service: ServiceDocument) -> int:
            told_s = seen_s.get((service.model_name, service.node, service.start_time), 0.0)
            return sum(
                each.key == (service.node, service.start_time)
                and each.model == service.model_name
                and each.opened_s > told_s
                for each in self._open
            )

        return roomiest(self.services(model), n_more=n_more)

    async def send(self, request: Outgoing, targets: Iterable[ServiceDocument]) -> Forwarded | Refusal:
        """Sends a request to the first of these nodes that takes it; returns when the answer's head is there.

        Returns:
            The answer, whose `close` is the caller's; or what the last node said, when none took the request.

        Raises:
            NodeLost: a node went after it had been sent the request; or no node is there.
        """
        refusal: Refusal | None = None
        unreachable: RequestError | None = None
        for target in targets:
            forwarded = Forwarded(self._bus, target)
            self._open.add(forwarded)
            taken = False
            try:
                await forwarded.open(request)
                await forwarded.head()
                if forwarded.status not in _BUSY:
                    self.n_forwarded += 1
                    taken = True
                    return forwarded
                refusal = Refusal(target.node, forwarded.status, forwarded.headers, await forwarded.body())
            except NoRespondersError:
                unreachable = NodeLost(target.node, "is not there any more")
            finally:
                if not taken:
                    await self.done(forwarded)
        if refusal is not None:
            return refusal
        raise unreachable or NodeLost("the other node", "is not there any more")

    async def done(self, forwarded: Forwarded) -> None:
        """Ends a request that was sent, if it has not ended."""
        self._leave(forwarded)
        await forwarded.close()

    def drop(self, forwarded: Forwarded) -> None:
        """The same for whoever cannot wait. Safe to call twice."""
        if forwarded in self._open:
            self._leave(forwarded)
            task = asyncio.create_task(forwarded.close(), name=f"forward-close-{forwarded.node}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _leave(self, forwarded: Forwarded) -> None:
        self._open.discard(forwarded)
        if forwarded.absent:
            known = {each.key[1:] for each in self._registry.roster.sightings()}
            self._absent_s = {key: told_s for key, told_s in self._absent_s.items() if key in known}
            self._absent_s[forwarded.key] = time.time()

    async def close(self) -> None:
        """Ends what is under way, in a second at most."""
        for forwarded in tuple(self._open):
            self.drop(forwarded)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2 * _LEAVE_S)

    async def cancel(self, req_id: str) -> bool:
        """Cancels a request that runs or waits on another node; whether one says that it did."""
        nc = self._bus.nc
        if nc is None or not self._registry.services():
            return False
        with suppress(TimeoutError, NatsError, OSError, RequestError):
            message = await nc.request(subjects.CANCEL, encode({"req_id": req_id}), timeout=_CANCEL_S)
            return read_object(message.data).get("cancelled") is True
        return False
