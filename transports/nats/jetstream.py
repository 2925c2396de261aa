"""JetStream as this node uses it: publish and be told, read one message, administrate.

It stands apart so that queues, records and dead letters outlive a connection: each call takes the one that the bus has
now, and whatever goes wrong is one `JetStreamFault` with the broker's own error number.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from email.parser import BytesParser
from typing import Any, TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.api import ConsumerConfig, StreamConfig

from transports.nats.bus import Bus, heeding

FULL = 10077
"""The broker's error number for a stream that takes no more messages or bytes."""

WRONG_REVISION = 10071
STREAM_NOT_FOUND = 10059
MESSAGE_NOT_FOUND = 10037
SUBJECT_OVERLAP = 10065
DELETE_FAILED = 10057
TOO_LARGE = 10054
NOBODY = 503
"""What a call ends with when no server takes it."""

ELECTION_S = 15.0
"""How long the servers of a cluster may take to agree on a new leader for a stream; seen: 2 to 10 s."""

_TOO_SMALL = frozenset({10005, 10023, 10074})
"""No suitable peers for placement; insufficient resources; replicas without a cluster."""
_NO_LEADER = frozenset({NOBODY, 10006, 10008, 10009, 10158})
"""The last one: a message of that id has been proposed to the copies, and is not yet, or never will be, in them."""
_RETRY_S = 0.2

T = TypeVar("T")

SIZE_HEADER = "Nats-Msg-Size"
"""Beside a head: the bytes of the body that was left out."""

_API = "$JS.API"
_CALL_S = 3.0
_N_HEADS = 500
_HEADS_IDLE_S = 30.0
_SETTLED = frozenset({"metadata", "name", "durable_name", "consumer_limits"})
"""Fields of a configuration that the broker fills in or that others may choose."""


def election_s(n_replicas: int) -> float:
    """How long a stream of so many copies may be without a leader; a single copy is there or is not."""
    return ELECTION_S if n_replicas > 1 else 0.0


class JetStreamFault(Exception):
    """A call that JetStream refused or did not answer.

    Attributes:
        err_code: the broker's number for it, 0 when there was no answer.
    """

    def __init__(self, words: str, *, err_code: int = 0) -> None:
        self.err_code = err_code
        super().__init__(words)

    @property
    def unanswered(self) -> bool:
        """Whether nobody can know if the call took effect."""
        return self.err_code == 0

    @property
    def leaderless(self) -> bool:
        """Whether it is a cluster's answer between two leaders. It did nothing then."""
        return self.err_code in _NO_LEADER


@dataclass(frozen=True)
class Stored:
    """The broker's receipt: the message's number in its stream, and whether it was there before."""

    seq: int
    duplicate: bool


@dataclass(frozen=True)
class Kept:
    """A message as its stream keeps it. `stored_s` is the broker's clock, in seconds since the epoch."""

    subject: str
    seq: int
    data: bytes
    headers: dict[str, str]
    stored_s: float


class JetStream:
    """Calls JetStream over the bus. Loop thread only; every call raises `JetStreamFault` and nothing else.

    Attributes:
        patience_s: how long what a cluster refuses between two leaders is tried again; 0 with a single broker, where
            nobody will come.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.patience_s = 0.0

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, *, timeout_s: float = _CALL_S
    ) -> Stored:
        """Stores a message; returns when the broker has it."""
        answer = await self._told(subject, data, dict(headers) if headers else None, timeout_s)
        return Stored(int(answer["seq"]), bool(answer.get("duplicate")))

    async def send(self, subject: str, data: bytes = b"") -> bool:
        """Publishes without a receipt; whether the connection took it."""
        return await self._bus.publish(subject, data)

    async def confirm(self, ack: str) -> None:
        """Acknowledges a message; returns when the broker has heard it."""
        await self._patiently(lambda: self._request(ack, b"+ACK", None, 1.0))

    async def call(self, name: str, body: Any = None) -> dict[str, Any]:
        """One call of the broker's administration, such as `STREAM.INFO.name`."""
        data = b"" if body is None else json.dumps(body).encode()
        return await self._told(f"{_API}.{name}", data, None, _CALL_S)

    async def last(self, stream: str, subject: str) -> Kept | None:
        """The newest message on a subject, or None. Asks the stream's leader: of a cluster's other servers one may be
        behind."""
        return await self._get(stream, {"last_by_subj": subject})

    async def message(self, stream: str, seq: int) -> Kept | None:
        """A stream's message by its number, or None when it is gone."""
        return await self._get(stream, {"seq": seq})

    async def next_message(self, stream: str, from_seq: int, subject: str = ">") -> Kept | None:
        """The first message from that number on, or None."""
        return await self._get(stream, {"seq": from_seq, "next_by_subj": subject})

    async def _get(self, stream: str, which: dict[str, Any]) -> Kept | None:
        try:
            message = (await self.call(f"STREAM.MSG.GET.{stream}", which))["message"]
        except JetStreamFault as fault:
            if fault.err_code == MESSAGE_NOT_FOUND:
                return None
            raise
        lines = base64.b64decode(message.get("hdrs", "")).partition(b"\r\n")[2]
        headers = {key: str(value) for key, value in BytesParser().parsebytes(lines).items()}
        data = base64.b64decode(message.get("data", ""))
        return Kept(message["subject"], int(message["seq"]), data, headers, seconds_of(message["time"]))

    async def heads(self, stream: str, after: int) -> AsyncIterator[list[Kept]]:
        """The messages behind a number, oldest first and in batches, without their bodies: those may be megabytes each.
        A head's size in bytes stands in its header `SIZE_HEADER`."""
        nc = self._connected()
        config = {
            "ack_policy": "none",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": after + 1,
            "headers_only": True,
            "mem_storage": True,
            "inactive_threshold": int(_HEADS_IDLE_S * 1e9),
        }
        made = await self.call(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})
        inbox = nc.new_inbox()
        try:
            subscription = await nc.subscribe(inbox)
            try:
                n_left = int(made["num_pending"])
                while n_left:
                    await nc.publish(
                        f"{_API}.CONSUMER.MSG.NEXT.{stream}.{made['name']}",
                        json.dumps({"batch": _N_HEADS, "no_wait": True}).encode(),
                        reply=inbox,
                    )
                    heads: list[Kept] = []
                    while n_left and len(heads) < _N_HEADS:
                        message = await subscription.next_msg(timeout=_CALL_S)
                        if (message.headers or {}).get("Status"):
                            n_left = 0  # what was there at the beginning went meanwhile
                            break
                        told = message.metadata
                        n_left = told.num_pending
                        stored_s = told.timestamp.timestamp()
                        heads.append(Kept(message.subject, told.sequence.stream, b"", message.headers or {}, stored_s))
                    yield heads
            finally:
                if not nc.is_closed:
                    await subscription.unsubscribe()
        except TimeoutError:
            raise JetStreamFault(f"the broker did not answer within {_CALL_S:g} s") from None
        except (NatsError, OSError) as error:
            raise JetStreamFault(str(error) or type(error).__name__) from None
        finally:
            with suppress(JetStreamFault):
                await self.call(f"CONSUMER.DELETE.{stream}.{made['name']}")

    async def delete(self, stream: str, seq: int) -> bool:
        """Removes one message; whether it was there."""
        try:
            await self.call(f"STREAM.MSG.DELETE.{stream}", {"seq": seq})
        except JetStreamFault as fault:
            if fault.err_code in (MESSAGE_NOT_FOUND, DELETE_FAILED):
                return False
            raise
        return True

    async def have_stream(self, config: StreamConfig) -> None:
        """Creates the stream, or brings one of that name to this shape; it keeps the replicas that it has beyond this,
        as two nodes may differ."""
        wanted = config.as_dict()
        name, n_replicas = str(config.name), int(config.num_replicas or 1)
        try:
            there = (await self.call(f"STREAM.INFO.{name}"))["config"]
        except JetStreamFault as fault:
            if fault.err_code != STREAM_NOT_FOUND:
                raise
            await self._shape("CREATE", wanted, n_replicas)
            return
        wanted["num_replicas"] = max(n_replicas, int(there.get("num_replicas") or 1))
        if _differs(there, wanted):
            await self._shape("UPDATE", there | wanted, n_replicas)

    async def _shape(self, verb: str, config: dict[str, Any], n_replicas: int) -> None:
        try:
            await self.call(f"STREAM.{verb}.{config['name']}", config)
        except JetStreamFault as fault:
            if n_replicas > 1 and fault.err_code in _TOO_SMALL:
                words = f"STREAM_REPLICAS={n_replicas} needs as many servers with JetStream in the broker's cluster"
                raise JetStreamFault(f"{words}: {fault}", err_code=fault.err_code) from None
            raise

    async def have_consumer(self, stream: str, config: ConsumerConfig) -> dict[str, Any]:
        """Creates the durable consumer, or brings one of that name to this shape; its state."""
        body = {"stream_name": stream, "config": config.as_dict()}
        return await self.call(f"CONSUMER.DURABLE.CREATE.{stream}.{config.durable_name}", body)

    async def _told(
        self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float
    ) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            return _object(await self._request(subject, data, headers, timeout_s))

        return await self._patiently(ask)

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Asks again while a cluster has no leader for what is asked; nothing was done then, so that is harmless."""
        until_s = time.monotonic() + self.patience_s
        while True:
            try:
                return await ask()
            except JetStreamFault as fault:
                if not fault.leaderless or time.monotonic() >= until_s:
                    raise
            await asyncio.sleep(_RETRY_S)

    def _connected(self) -> Client:
        nc = self._bus.nc
        if nc is None or not nc.is_connected:
            raise JetStreamFault("there is no connection to the broker")
        return nc

    async def _request(self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float) -> Msg:
        nc = self._connected()
        try:
            return await heeding(nc.request(subject, data, timeout=timeout_s, headers=headers))
        except NoRespondersError:
            raise JetStreamFault(
                "JetStream is switched off on this broker, or the stream is gone", err_code=NOBODY
            ) from None
        except TimeoutError:
            raise JetStreamFault(f"the broker did not answer within {timeout_s:g} s") from None
        except (NatsError, OSError) as error:
            raise JetStreamFault(str(error) or type(error).__name__) from None


def _object(message: Msg) -> dict[str, Any]:
    try:
        answer = json.loads(message.data)
    except ValueError:
        raise JetStreamFault(f"not JetStream's answer: {message.data[:80]!r}") from None
    if not isinstance(answer, dict):
        raise JetStreamFault(f"not JetStream's answer: {message.data[:80]!r}")
    error = answer.get("error")
    if error is not None:
        raise JetStreamFault(str(error.get("description", error)), err_code=int(error.get("err_code") or error["code"]))
    return answer


def _differs(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return any(there.get(key) != value for key, value in wanted.items() if key not in _SETTLED and value)


def seconds_of(timestamp: str) -> float:
    """The broker's RFC 3339 time, of nanoseconds, as seconds since the epoch."""
    whole, _, fraction = timestamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
