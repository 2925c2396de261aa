"""Takes messages of a pull consumer, never more than there is room for.

It stands apart because of its bookkeeping: a pull stays open at the broker until it is filled or expires, so what was
asked for and has not come counts as taken. One connection's worth: the next one begins anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import Header

from transports.nats.bus import bounded

log = logging.getLogger("infsvc.nats")

_EXPIRES_S = 20.0
_LATE_S = 5.0
_IDLE_S = 1.0
_LEAVE_S = 0.5
_HEARTBEAT_S = 1.0
_N_HEARTBEATS = 3
_LEADERLESS_S = 0.25


class ConsumerGone(Exception):
    """The consumer or its stream is not there (any more)."""


class Puller:
    """Pulls for as long as one connection stands.

    In a cluster the server that leads the consumer may go while the connection stays, and takes what was asked of it
    along. So it is asked to say now and then that a pull is still open, and nobody there is no end at once.

    Args:
        room: how many messages may be taken now; read on the loop before each pull.
        take: gets each message; it hands off and returns at once.
        patience_s: for how long a consumer may be without a leader; 0 for a broker that has one always.
    """

    def __init__(
        self,
        stream: str,
        consumer: str,
        *,
        room: Callable[[], int],
        take: Callable[[Msg], None],
        patience_s: float = 0.0,
    ) -> None:
        self.stream = stream
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._room, self._take = room, take
        self._wake = asyncio.Event()
        self._pulls: dict[str, tuple[int, float]] = {}
        self._gone: str | None = None
        self._patience_s = patience_s
        self._leaderless_s: float | None = None

    @property
    def n_asked(self) -> int:
        """Messages that were asked for and have not come."""
        return sum(n for n, _ in self._pulls.values())

    def wake(self) -> None:
        """Says that there may be room again."""
        self._wake.set()

    async def run(self, nc: Client) -> None:
        """Pulls until it is cancelled.

        Raises:
            ConsumerGone: there is nothing to pull from.
        """
        self._pulls.clear()
        self._gone = self._leaderless_s = None
        inbox = nc.new_inbox()
        subscription = await nc.subscribe(f"{inbox}.*", cb=self._receive)
        n_pulls = 0
        try:
            while True:
                self._wake.clear()
                self._forget_late()
                if self._leaderless_s is not None:
                    await asyncio.sleep(_LEADERLESS_S)
                n = self._room() - self.n_asked
                if n > 0:
                    n_pulls += 1
                    token = f"{inbox}.{n_pulls}"
                    body = {"batch": n, "expires": int(_EXPIRES_S * 1e9)}
                    if self._patience_s:
                        body["idle_heartbeat"] = int(_HEARTBEAT_S * 1e9)
                    self._pulls[token] = (n, time.monotonic() + self._silence_s)
                    await nc.publish(self._next, json.dumps(body).encode(), reply=token)
                if not self._wake.is_set():
                    try:
                        async with asyncio.timeout(_IDLE_S):
                            await self._wake.wait()
                    except TimeoutError:
                        pass
                if self._gone is not None:
                    raise ConsumerGone(self._gone)
        finally:
            # Drained, not dropped: what is on its way is still taken, and can be given back at once.
            if not nc.is_closed:
                await bounded(subscription.drain(), _LEAVE_S)  # type: ignore[no-untyped-call]

    async def _receive(self, message: Msg) -> None:
        status = (message.headers or {}).get("Status") if not message.data else None
        token = message.subject
        if self._patience_s:
            self._heard(token, status)
        if status is None:
            # A delivered message carries its queue's subject, so it counts against the oldest pull.
            self._count_down()
            self._take(message)
        elif status == "100":
            return
        else:
            self._pulls.pop(token, None)
            deleted = status == "409" and "Deleted" in _description(message)
            if deleted or (status == "503" and not self._waits_for_a_leader()):
                self._gone = f"{self.stream}: {_description(message) or 'no such consumer'}"
        self._wake.set()

    @property
    def _silence_s(self) -> float:
        """After how long without a word a pull is lost."""
        return _HEARTBEAT_S * _N_HEARTBEATS if self._patience_s else _EXPIRES_S + _LATE_S

    def _heard(self, token: str, status: str | None) -> None:
        """Somebody leads the consumer: this pull is open, and all are when it gives out messages."""
        if status == "503":
            return
        self._leaderless_s = None
        until_s = time.monotonic() + self._silence_s
        for each in list(self._pulls) if status is None else [token] if token in self._pulls else []:
            self._pulls[each] = (self._pulls[each][0], until_s)

    def _waits_for_a_leader(self) -> bool:
        now_s = time.monotonic()
        if self._leaderless_s is None:
            self._leaderless_s = now_s
        return now_s - self._leaderless_s < self._patience_s

    def _count_down(self) -> None:
        for token, (n, until_s) in self._pulls.items():
            if n > 1:
                self._pulls[token] = (n - 1, until_s)
            else:
                del self._pulls[token]
            return

    def _forget_late(self) -> None:
        now_s = time.monotonic()
        for token in [token for token, (_, until_s) in self._pulls.items() if until_s < now_s]:
            del self._pulls[token]


def _description(message: Msg) -> str:
    # nats-py files it under a member of an enumeration, which hashes unlike its value.
    headers = message.headers or {}
    return str(headers.get(Header.DESCRIPTION) or headers.get("Description", ""))
