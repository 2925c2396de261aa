"""The connection to NATS: where it leads, whether it stands, and how it comes back.

It stands apart so that doors never think about connections: they register what to do on each fresh one, publish
through `Bus.publish`, which never raises and never waits long, and read `Bus.state`. Nothing here blocks the node's
start or end.

nats-py's own reconnect is switched off. Every loss brings back the question whose broker it is (one that listens
already, else an embedded one), and that question belongs before each attempt, so one supervising task owns the
whole circle:

    starting → connected ⇄ down (retry in 0.5, 1, 2, 4, 5, 5 … s) → off

`connected` is said after the callbacks of `on_connected` have run: who reads it may send requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoServersError, SlowConsumerError

from infsvc.errors import ConfigError, StartError
from infsvc.events import BrokerStateChanged, EventBus
from infsvc.home import Home
from infsvc.nats_login import NatsLogin
from infsvc.settings import is_loopback
from transports.nats.broker import EmbeddedBroker, Listener, probe

log = logging.getLogger("infsvc.nats")

Status = Literal["starting", "connected", "down", "off"]
T = TypeVar("T")
OnConnected = Callable[[Client], Awaitable[None]]

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 5.0
_STEADY_S = 5.0
"""A connection that stood this long counts as good: the next loss begins again at the first delay."""
_CONNECT_S = 3.0
_HANDSHAKE_S = 2
"""How long one server may take; those of a cluster are tried in turn."""
_SEND_S = 2.0
_CALLBACK_S = 2.0
_CLOSE_S = 0.5
_LOOK_S = 0.5
_PING_S = 5


@dataclass(frozen=True, kw_only=True)
class BusState:
    """What the screen and `/healthz` show. `url` names hosts and ports only; `since` is seconds since the epoch; the
    `reason` of a connected broker is what it cannot do."""

    status: Status
    url: str
    embedded: bool = False
    reason: str | None = None
    retry_in_s: float | None = None
    since: float


async def bounded(work: Coroutine[Any, Any, Any], seconds: float) -> bool:
    """Runs `work` for at most `seconds`; whether it ended in time, in success or not.

    Not `asyncio.wait_for`: that waits for a cancelled task to end, and nats-py swallows a cancel while it flushes.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            task.cancel()
    if not task.done():
        return False
    if not task.cancelled() and (error := task.exception()) is not None:
        log.debug("%s", error, extra={"code": "broker.error"})
    return True


async def heeding(work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`, a call of nats-py's, in a task of its own, so that a cancel of the caller always reaches the caller.

    nats-py waits with `asyncio.wait_for`, which on Python 3.11 loses a cancel that comes in one turn with the answer: a
    loop of calls would go on, and who cancelled it would wait for its end for ever.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task})
    finally:
        task.cancel()
    return task.result()


class Bus:
    """The node's one connection. Loop thread only.

    Args:
        login: the broker and who the node is there, or its URL alone.
        embedded: `auto` starts a broker of one's own when nothing listens at a single address of this machine.
        home: where that broker keeps its store.
        events: gets a `BrokerStateChanged` for each change.
        node: the node's name, shown by the broker's monitoring.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(
        self, login: NatsLogin | str, *, embedded: Literal["auto", "off"], home: Home, events: EventBus, node: str
    ) -> None:
        self._login = NatsLogin.of(login) if isinstance(login, str) else login
        self._node = node
        self.events = events
        self.state = BusState(status="off", url=self._login.shown, since=time.time())
        self.nc: Client | None = None
        self._remark: str | None = None
        self._callbacks: list[OnConnected] = []
        self._task: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._last_error: Exception | None = None
        self._broker: EmbeddedBroker | None = None
        own = self._login.embedded_url if embedded == "auto" else None
        if own is not None and is_loopback(urlsplit(own).hostname or ""):
            self._broker = EmbeddedBroker(home, own)

    async def start(self) -> None:
        """Begins to connect in the background and returns at once."""
        if self._task is None:
            self._set("starting")
            self._task = asyncio.create_task(self._run(), name="nats-bus")

    async def close(self) -> None:
        """Leaves NATS and ends the embedded broker, within about two seconds even if nothing answers."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1.0)
            self._task = None
        await self._drop()
        if self._broker is not None:
            await self._broker.stop(grace_s=1.0)
        self._set("off")

    def on_connected(self, callback: OnConnected) -> None:
        """Has `callback` called with each fresh connection, to subscribe there. Register before `start`."""
        self._callbacks.append(callback)

    @property
    def max_payload(self) -> int:
        """The largest message the broker takes, in bytes."""
        return int(self.nc.max_payload) if self.nc is not None else 2**20

    def remark(self, reason: str | None) -> None:
        """What is wrong with a broker that is connected, or None; shown beside its state."""
        if self.state.status == "connected":
            self._set("connected", embedded=self.state.embedded, reason=reason)
        self._remark = reason

    async def publish(
        self, subject: str, payload: bytes, *, reply: str = "", headers: dict[str, str] | None = None
    ) -> bool:
        """Sends a message; whether the connection took it. Never raises, never waits longer than two seconds."""
        nc = self.nc
        if nc is None or not nc.is_connected:
            return False
        try:
            async with asyncio.timeout(_SEND_S):
                await nc.publish(subject, payload, reply=reply, headers=headers)
        except (NatsError, OSError, TimeoutError) as error:
            log.debug(
                "nothing was sent to %s: %s", subject, error or type(error).__name__, extra={"code": "broker.error"}
            )
            return False
        return True

    async def flush(self, seconds: float = _CLOSE_S) -> bool:
        """Waits until the broker has taken all that was published, for at most `seconds`."""
        nc = self.nc
        return nc is not None and nc.is_connected and await bounded(nc.flush(), seconds)

    async def confirm(self, seconds: float = _SEND_S) -> bool:
        """Whether the broker has taken all that was published over the connection that stands now.

        A publish only fills a buffer: what a dying broker has not read is lost, and nobody is told.
        """
        nc, taken = self.nc, False

        async def round_trip(nc: Client) -> None:
            nonlocal taken
            await nc.flush()
            taken = True

        if nc is None or not nc.is_connected:
            return False
        await bounded(round_trip(nc), seconds)
        return taken and self.nc is nc

    async def _run(self) -> None:
        delay = 0.0
        while True:
            stood_s = 0.0
            try:
                await self._connect()
            except Exception as error:
                reason = self._sentence(error)
            else:
                stood_s = await self._while_connected()
                reason = "the connection was lost"
            was_embedded = self.state.embedded
            await self._drop()
            if stood_s > _STEADY_S:
                # Someone else's broker gets the first delay to come back before an embedded one takes its port. Of a
                # cluster, another server is there already.
                delay = 0.0 if was_embedded or len(self._login.servers) > 1 else _FIRST_RETRY_S
            else:
                delay = min(max(_FIRST_RETRY_S, 2 * delay), _LAST_RETRY_S)
            self._set("down", reason=reason, retry_in_s=delay)
            await asyncio.sleep(delay)

    def _sentence(self, error: Exception) -> str:
        match error:
            case StartError():
                return str(error)
            case ConfigError():
                told = str(error)
            case NoServersError() if self._last_error is not None:
                told = self._login.sentence(self._last_error)
            case TimeoutError():
                told = "no answer"
            case NatsError() | OSError():
                told = self._login.sentence(error)
            case _:
                log.error("the connection to the broker failed", exc_info=error, extra={"code": "broker.error"})
                told = type(error).__name__
        return f"cannot connect to {self.state.url}: {told}"

    async def _connect(self) -> None:
        embedded = await self._have_listener()
        lost = asyncio.Event()

        async def on_error(error: Exception) -> None:
            self._last_error = error
            level = logging.WARNING if isinstance(error, SlowConsumerError) else logging.DEBUG
            log.log(level, "nats: %s", error or type(error).__name__, extra={"code": "broker.error"})

        async def on_end() -> None:
            lost.set()

        servers = list(self._login.servers)
        nc = self._login.client()
        try:
            async with asyncio.timeout(_CONNECT_S + _HANDSHAKE_S * (len(servers) - 1)):
                await nc.connect(
                    servers,
                    name=f"infsvc {self._node}",
                    **self._login.options(),
                    allow_reconnect=False,
                    connect_timeout=_HANDSHAKE_S,
                    reconnect_time_wait=1,
                    max_reconnect_attempts=1,
                    ping_interval=_PING_S,
                    max_outstanding_pings=2,
                    flush_timeout=_SEND_S,
                    error_cb=on_error,
                    disconnected_cb=on_end,
                    closed_cb=on_end,
                )
        except BaseException:
            await bounded(nc.close(), _CLOSE_S)
            raise
        self.nc, self._lost = nc, lost
        self._remark = None
        for callback in self._callbacks:
            await bounded(self._call(callback, nc), _CALLBACK_S)
        await bounded(nc.flush(), _CALLBACK_S)
        self._set("connected", embedded=embedded, reason=self._remark)

    async def _call(self, callback: OnConnected, nc: Client) -> None:
        try:
            await callback(nc)
        except Exception:
            log.exception("a door could not subscribe", extra={"code": "broker.error"})

    async def _have_listener(self) -> bool:
        """Sees to it that something listens, where that is this node's to do; whether that is the embedded broker."""
        broker = self._broker
        if broker is None:
            return False
        listener = await probe(broker.host, broker.port)
        if listener is Listener.NATS:
            return broker.running
        if broker.running:
            # It is there and does not answer: a stuck process keeps port and store.
            await broker.stop(grace_s=1.0)
        await broker.start()
        return True

    async def _while_connected(self) -> float:
        """Returns when the connection is gone: how many seconds it stood.

        nats-py does not call back when the last flush of a dying connection fails, so its state is looked at as well.
        """
        nc, lost, began = self.nc, self._lost, time.monotonic()
        while nc is not None and nc.is_connected and not lost.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await lost.wait()
        return time.monotonic() - began

    async def _drop(self) -> None:
        nc, self.nc = self.nc, None
        if nc is not None and not nc.is_closed:
            await bounded(nc.close(), _CLOSE_S)

    def _set(
        self, status: Status, *, embedded: bool = False, reason: str | None = None, retry_in_s: float | None = None
    ) -> None:
        before = self.state
        state = BusState(
            status=status,
            url=before.url,
            embedded=embedded,
            reason=reason,
            retry_in_s=retry_in_s,
            since=before.since if before.status == status else time.time(),
        )
        if state == before:
            return
        self.state = state
        if (status, reason) != (before.status, before.reason):
            self._log(state)
        self.events.publish(
            BrokerStateChanged(state=status, url=state.url, embedded=embedded, reason=reason, retry_in_s=retry_in_s)
        )

    def _log(self, state: BusState) -> None:
        whose = "the embedded broker" if state.embedded else "the broker"
        beside = f": {state.reason}" if state.reason else ""
        level, text = {
            "starting": (logging.DEBUG, f"connecting to {state.url}"),
            "connected": (
                logging.WARNING if state.reason else logging.INFO,
                f"connected to {whose} at {state.url}{beside}",
            ),
            "down": (logging.WARNING, f"no broker: {state.reason}"),
            "off": (logging.INFO, "left the broker"),
        }[state.status]
        log.log(
            level,
            "%s",
            text,
            extra={"code": f"broker.{state.status}", "meta": {"url": state.url, "embedded": state.embedded}},
        )
