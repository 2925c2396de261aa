"""JetStream as this node uses it: publish and be told, read one message, administrate.

It stands apart so that queues, records and dead letters outlive a connection: each call takes the one that the bus has
now, and whatever goes wrong is one `JetStreamFault` with the broker's own error number.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from email.parser import BytesParser
from typing import Any

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

_API = "$JS.API"
_CALL_S = 3.0
_SETTLED = frozenset({"metadata", "name", "durable_name", "num_replicas", "consumer_limits"})
"""Fields of a configuration that the broker fills in or that others may choose."""


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
    """Calls JetStream over the bus. Loop thread only; every call raises `JetStreamFault` and nothing else."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def publish(
        self, subject: str, data: bytes, headers: Mapping[str, str] | None = None, *, timeout_s: float = _CALL_S
    ) -> Stored:
        """Stores a message; returns when the broker has it."""
        answer = _object(await self._request(subject, data, dict(headers) if headers else None, timeout_s))
        return Stored(int(answer["seq"]), bool(answer.get("duplicate")))

    async def send(self, subject: str, data: bytes = b"") -> bool:
        """Publishes without a receipt; whether the connection took it."""
        return await self._bus.publish(subject, data)

    async def confirm(self, ack: str) -> None:
        """Acknowledges a message; returns when the broker has heard it."""
        await self._request(ack, b"+ACK", None, 1.0)

    async def call(self, name: str, body: Any = None) -> dict[str, Any]:
        """One call of the broker's administration, such as `STREAM.INFO.name`."""
        data = b"" if body is None else json.dumps(body).encode()
        return _object(await self._request(f"{_API}.{name}", data, None, _CALL_S))

    async def last(self, stream: str, subject: str) -> Kept | None:
        """The newest message on a subject of a stream that allows direct reads, or None."""
        message = await self._request(f"{_API}.DIRECT.GET.{stream}.{subject}", b"", None, _CALL_S)
        headers = message.headers or {}
        if headers.get("Status"):
            if headers["Status"] == "404":
                return None
            raise JetStreamFault(f"{stream}: {headers.get('Description', headers['Status'])}")
        return Kept(
            subject,
            int(headers["Nats-Sequence"]),
            message.data,
            headers,
            _seconds(headers["Nats-Time-Stamp"]),
        )

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
        return Kept(message["subject"], int(message["seq"]), data, headers, _seconds(message["time"]))

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
        """Creates the stream, or brings one of that name to this shape."""
        wanted = config.as_dict()
        name = str(config.name)
        try:
            there = (await self.call(f"STREAM.INFO.{name}"))["config"]
        except JetStreamFault as fault:
            if fault.err_code != STREAM_NOT_FOUND:
                raise
            await self.call(f"STREAM.CREATE.{name}", wanted)
            return
        if _differs(there, wanted):
            await self.call(f"STREAM.UPDATE.{name}", there | wanted)

    async def have_consumer(self, stream: str, config: ConsumerConfig) -> dict[str, Any]:
        """Creates the durable consumer, or brings one of that name to this shape; its state."""
        body = {"stream_name": stream, "config": config.as_dict()}
        return await self.call(f"CONSUMER.DURABLE.CREATE.{stream}.{config.durable_name}", body)

    async def _request(self, subject: str, data: bytes, headers: dict[str, str] | None, timeout_s: float) -> Msg:
        nc = self._bus.nc
        if nc is None or not nc.is_connected:
            raise JetStreamFault("there is no connection to the broker")
        try:
            return await heeding(nc.request(subject, data, timeout=timeout_s, headers=headers))
        except NoRespondersError:
            raise JetStreamFault(
                "JetStream is switched off on this broker, or the stream is gone", err_code=503
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


def _seconds(timestamp: str) -> float:
    """The broker's RFC 3339 time, of nanoseconds, as seconds since the epoch."""
    whole, _, fraction = timestamp.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{fraction or 0}")
