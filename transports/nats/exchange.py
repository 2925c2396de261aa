"""One request that came over NATS, from its bytes to its last answer, whichever way it came: by the front door or out
of the durable queue.

It stands apart so that both ways read, refuse, run and answer alike.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from engine.embedding import EmbeddingRequest
from engine.generation import Generation
from engine.service import InferenceRequest, InferenceService
from engine.worker import Worker
from infsvc import subjects
from infsvc.embedding_types import EmbeddingBody
from infsvc.errors import BadRequest, DeadlineExceeded, RequestError
from infsvc.types import MAX_TRACE_CHARACTERS, CompletionChunk, CompletionRequest
from transports.nats.bus import Bus, bounded
from transports.nats.embedding import embed, validate_embedding
from transports.nats.jetstream import Kept
from transports.nats.messages import check_client, encode, encode_final, is_answerable, named, read_object, validate
from transports.nats.once import body_hash

log = logging.getLogger("infsvc.nats")

NO_RESPONDERS = "503"
"""What the broker says to a message with a reply subject that nobody is there to receive."""

_REQ_ID_CHARACTERS = 200
_RESEND_S = 0.2
_N_SENDS = 3
"""How often an answer is offered to a broker that is there and does not take it."""


@dataclass
class Exchange:
    """One message and where its answers go.

    Attributes:
        reply: where a caller waits, or None; a stream's chunks go there.
        embeds: whether it came on the model's subject for embeddings.
        targets: every subject that gets the final answer.
        body: the JSON object, once it was read.
        request: the request of the model's kind, once it was found valid.
        started: whether the service has it; `generation` is what runs for it then.
    """

    worker: Worker
    data: bytes
    headers: Mapping[str, str]
    reply: str | None
    embeds: bool = False
    req_id: str | None = None
    targets: list[str] = field(default_factory=list)
    body: dict[str, Any] = field(default_factory=dict)
    request: CompletionRequest | EmbeddingBody | None = None
    started: bool = False
    generation: Generation | None = None

    def __post_init__(self) -> None:
        if self.reply:
            self.targets.append(self.reply)

    @property
    def called(self) -> str | None:
        """What the request is called: its `req_id`, or what a header calls one that has none."""
        return self.req_id or self.headers.get(subjects.REQ_ID_HEADER) or None

    @property
    def queue_subject(self) -> str:
        """Where it waits when it waits in the broker."""
        worker = self.worker
        return subjects.queue(worker.name, embedding=True) if self.embeds else worker.settings.queue_subject

    @property
    def fingerprint(self) -> str:
        """The same for every repeat of the request, and for no other one."""
        alien = self.embeds and self.worker.settings.model_format != "embedding"
        return body_hash(self.body | {"": "embedding"} if alien else self.body)

    def read(self) -> None:
        """Reads the body, finds where answers go, and validates; in this order, as a refusal must find its way too.

        Raises:
            BadRequest, TooLarge: with what was found until then.
        """
        if len(self.headers.get(subjects.REQ_ID_HEADER, "")) > _REQ_ID_CHARACTERS:
            raise BadRequest(
                f"the header {subjects.REQ_ID_HEADER} has more than {_REQ_ID_CHARACTERS} characters",
                param=subjects.REQ_ID_HEADER,
            )
        self.body = read_object(self.data)
        self.req_id = named(self.body, "req_id")
        self._address()
        if self.targets:
            check = validate_embedding if self.embeds or self.worker.embeds_only else validate
            self.request = check(self.body, model=self.worker.name, has_reply=bool(self.reply))
            check_client(self.headers.get(subjects.CLIENT_HEADER))

    def _address(self) -> None:
        """Adds where answers go beside the reply subject."""
        reply_to = named(self.body, "reply_to")
        if reply_to is not None and is_answerable(reply_to):
            if reply_to not in self.targets:
                self.targets.append(reply_to)
        elif not self.targets and self.req_id is not None:
            subject = f"{self.worker.settings.response_prefix}.{self.req_id}"
            if is_answerable(subject):
                self.targets.append(subject)

    def check_headers(self) -> None:
        """Raises `DeadlineExceeded` when nobody waits any more, `BadRequest` for a header that is no time or too long a
        trace id."""
        trace_id = self.headers.get(subjects.TRACE_HEADER, "")
        if len(trace_id) > MAX_TRACE_CHARACTERS:
            raise BadRequest(
                f"{subjects.TRACE_HEADER} has {len(trace_id)} characters: {MAX_TRACE_CHARACTERS} are allowed",
                param=subjects.TRACE_HEADER,
            )
        text = self.headers.get(subjects.DEADLINE_HEADER)
        if text is None:
            return
        try:
            late_s = time.time() - float(text)
            if not math.isfinite(late_s):
                raise ValueError
        except ValueError:
            raise BadRequest(
                f"the header {subjects.DEADLINE_HEADER} is not a number of seconds since the epoch",
                param=subjects.DEADLINE_HEADER,
            ) from None
        if late_s > 0:
            raise DeadlineExceeded(f"the caller's deadline passed {late_s:.1f} s ago: nothing was computed")

    @property
    def streams(self) -> bool:
        """Whether the caller waits for chunks."""
        return isinstance(self.request, CompletionRequest) and self.request.stream and self.reply is not None

    def inference(self, *, queued: bool) -> InferenceRequest | EmbeddingRequest:
        """The request as the service takes it; also gives a nameless one its id."""
        assert self.request is not None
        wire = self.request if self.called is None else self.request.model_copy(update={"req_id": self.called})
        trace_id = self.headers.get(subjects.TRACE_HEADER)
        made: InferenceRequest | EmbeddingRequest
        if isinstance(wire, EmbeddingBody):
            made = EmbeddingRequest.from_wire(
                wire, model=self.worker.name, source="nats", trace_id=trace_id, queued=queued
            )
        else:
            made = InferenceRequest.from_wire(
                wire, model=self.worker.name, source="nats", trace_id=trace_id, queued=queued,
                client=self.headers.get(subjects.CLIENT_HEADER) or "",
            )  # fmt: skip
        self.req_id = made.req_id
        return made


def exchange_of(worker: Worker, kept: Kept) -> Exchange:
    """A message that lies in a model's queue, with what can be read of it."""
    embeds = kept.subject == subjects.queue(worker.name, embedding=True)
    exchange = Exchange(worker, kept.data, kept.headers, kept.headers.get(subjects.REPLY_HEADER) or None, embeds)
    with suppress(RequestError):
        exchange.read()
    exchange.req_id = exchange.req_id or kept.headers.get(subjects.REQ_ID_HEADER)
    return exchange


class Exchanges:
    """Runs exchanges and sends their answers. Loop thread only."""

    def __init__(self, bus: Bus, service: InferenceService) -> None:
        self._bus, self._service = bus, service

    async def compute(self, exchange: Exchange, *, queued: bool = False) -> dict[str, Any]:
        """Runs a request that was read; chunks go out on the way. The final answer.

        Raises:
            RequestError: it cannot be served.
        """
        inference = exchange.inference(queued=queued)
        assert exchange.request is not None
        exchange.started = True
        if isinstance(inference, EmbeddingRequest):
            return await embed(self._service, inference)
        async with await self._service.submit(inference) as generation:
            exchange.generation = generation
            if exchange.streams and exchange.reply:
                # A request with an id is finished all the same: its caller may come back and ask for it.
                may_stop = exchange.request.req_id is None and exchange.targets == [exchange.reply]
                async with self._watching(generation) if may_stop else nullcontext("") as watch:
                    await self._stream(generation, exchange.reply, watch)
                return (await generation.result()).wire() | {"done": True}
            return (await generation.result()).wire()

    @asynccontextmanager
    async def _watching(self, generation: Generation) -> AsyncIterator[str]:
        """A reply subject for chunks, on which the broker says so when nobody listens to them any more: then nobody is
        computed for."""
        nc = self._bus.nc

        async def told(message: Msg) -> None:
            if (message.headers or {}).get("Status") == NO_RESPONDERS:
                generation.cancel()

        watch, subscription = "", None
        if nc is not None:
            with suppress(NatsError):
                watch = nc.new_inbox()
                subscription = await nc.subscribe(watch, cb=told)
        try:
            yield watch
        finally:
            if nc is not None and subscription is not None and not nc.is_closed:
                await bounded(subscription.unsubscribe(), _RESEND_S)

    async def _stream(self, generation: Generation, subject: str, watch: str) -> None:
        index = 0
        async for chunk in generation:
            if chunk.text:
                event = CompletionChunk(req_id=generation.req_id, index=index, text=chunk.text)
                await self._bus.publish(subject, encode(event.model_dump()), reply=watch)
                index += 1

    async def repeat(self, exchange: Exchange, answer: dict[str, Any]) -> None:
        """Sends an earlier answer again, in the form that this caller asked for."""
        assert exchange.request is not None
        answer = {key: value for key, value in answer.items() if key != "done"}
        if exchange.streams and exchange.reply and "text" in answer:
            if answer["text"]:
                event = CompletionChunk(req_id=answer["req_id"], index=0, text=answer["text"])
                await self._bus.publish(exchange.reply, encode(event.model_dump()))
            answer["done"] = True
        self._service.answered_again(exchange.inference(queued=True), answer)
        await self.answer(exchange, answer, patiently=True)

    async def answer(self, exchange: Exchange, answer: dict[str, Any], *, patiently: bool = False) -> None:
        """Sends the final answer to every target.

        Args:
            patiently: sends it until the broker has taken it, over a connection that comes back if need be, or until
                this is cancelled. A target may then get it twice, and gets it once at least.
        """
        sent = await self._send(exchange, answer)
        n_left = _N_SENDS
        while patiently and not (await self._bus.confirm() and (sent or not (n_left := n_left - 1))):
            await asyncio.sleep(_RESEND_S)
            sent = await self._send(exchange, answer)
        if not sent:
            log.warning(
                "an answer was lost: %s",
                "the broker does not take it" if patiently else "no connection to the broker",
                extra={"code": "nats.answer_lost", "model": exchange.worker.name, "meta": {"req_id": exchange.req_id}},
            )

    async def _send(self, exchange: Exchange, answer: dict[str, Any]) -> bool:
        data = encode_final(answer, limit_bytes=self._bus.max_payload)
        # All are tried: one that is refused says nothing of the others.
        sent = [await self._bus.publish(target, data) for target in exchange.targets]
        return all(sent)
