"""Requests that other nodes' gateways forward to this node: run as this node's own gateway would, and answered over
NATS. `transports.forwarder` is the side that asks.

The door knows no route: what a request means is the app's, which here never forwards, so that a request goes one way at
most. A caller that has gone, by its own word, by the broker's ("nobody listens there") or by its silence, is to the app
a client that has closed its connection. Loop thread only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from nats.aio.client import Client
from nats.aio.msg import Msg

from infsvc import subjects
from infsvc.errors import QueueFull
from infsvc.types import MAX_BODY_BYTES
from transports.forward_parts import SILENT_S, Part, pieces
from transports.nats.bus import Bus, bounded
from transports.nats.exchange import NO_RESPONDERS
from transports.nats.messages import encode

log = logging.getLogger("infsvc.nats")

_LIMIT = 4096
"""Forwarded requests at a time; admission itself is each model's queue's."""
_LOOK_S = 1.0
_CLOSE_S = 2.0

App = Callable[[Any, Any, Any], Any]
"""An ASGI app."""


class _Served:
    """One forwarded request, to the app a connection of HTTP."""

    def __init__(self, part: Part, inbox: str, bus: Bus, watch: str) -> None:
        self._part, self._inbox, self._bus, self._watch = part, inbox, bus, watch
        self._incoming: deque[MutableMapping[str, Any]] = deque()
        self._came = asyncio.Event()
        self._gone = asyncio.Event()
        self._n_pieces = self._n_bytes = self._n_sent = 0
        self.heard_s = time.monotonic()
        self.ended = False

    @property
    def scope(self) -> dict[str, Any]:
        part = self._part
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": part.method,
            "scheme": "http",
            "path": unquote(part.path),
            "raw_path": part.path.encode("latin-1", "replace"),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in part.headers],
            "client": None,
            "server": None,
            "state": {},
        }

    def take(self, part: Part, data: bytes) -> None:
        """Takes a piece of the body. A missing one, or more than any body may have, ends the request."""
        self.heard_s = time.monotonic()
        self._n_bytes += len(data)
        if part.seq != self._n_pieces or self._n_bytes > 2 * MAX_BODY_BYTES:
            self.leave()
            return
        self._n_pieces += 1
        self._incoming.append({"type": "http.request", "body": data, "more_body": part.more})
        self._came.set()

    def leave(self) -> None:
        """Says that the caller has gone."""
        self._gone.set()
        self._came.set()

    async def receive(self) -> MutableMapping[str, Any]:
        """ASGI's: pieces of the body, then the caller's leaving."""
        while not self._incoming:
            if self._gone.is_set():
                return {"type": "http.disconnect"}
            self._came.clear()
            await self._came.wait()
        return self._incoming.popleft()

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's: the head, pieces of the answer, its end."""
        if message["type"] == "http.response.start":
            headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in message.get("headers", ())]
            await self._say(Part(kind="head", id=self._part.id, status=message["status"], headers=headers), b"")
            return
        if message["type"] != "http.response.body":
            return
        data = message.get("body", b"")
        if data:
            for piece in pieces(data, max_payload=self._bus.max_payload):
                await self._say(Part(kind="body", id=self._part.id, seq=self._n_sent), piece)
        if not message.get("more_body", False):
            self.ended = True
            await self._say(Part(kind="end", id=self._part.id, seq=self._n_sent), b"")

    async def tell(self, kind: str) -> None:
        await self._bus.publish(self._inbox, b"", headers=Part(kind=kind, id=self._part.id).marks())  # type: ignore[arg-type]

    async def _say(self, part: Part, data: bytes) -> None:
        if self._gone.is_set():
            return
        self._n_sent += 1
        if not await self._bus.publish(self._inbox, data, reply=self._watch, headers=part.marks()):
            # What is lost now cannot be made good: the caller finds the hole.
            self.leave()


class ForwardDoor:
    """Takes forwarded requests.

    Args:
        make_app: builds the ASGI app of a gateway that forwards nothing and asks for no key, when the door opens.
        node, start_time: this node's own; they are its subject.
    """

    def __init__(self, bus: Bus, make_app: Callable[[], App], *, node: str, start_time: str) -> None:
        self._bus, self._make_app = bus, make_app
        self._app: App | None = None
        self._subject = subjects.forward(node, start_time)
        self._served: dict[str, _Served] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Any] = []
        self._watchman: asyncio.Task[None] | None = None
        bus.on_connected(self._subscribe)

    async def start(self) -> None:
        self._app = self._make_app()
        self._watchman = asyncio.create_task(self._watch(), name="nats-forward-watch")

    async def close(self) -> None:
        """Takes no more requests, and gives those under way two seconds to end."""
        if self._bus.nc is not None:
            for subscription in self._subscriptions:
                await bounded(subscription.unsubscribe(), 0.5)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)
        if self._watchman is not None:
            self._watchman.cancel()
        for task in (*self._tasks, *([self._watchman] if self._watchman else [])):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bus.flush()

    async def _subscribe(self, nc: Client) -> None:
        # Whoever asked over the connection before has missed a part.
        for served in self._served.values():
            served.leave()
        self._served.clear()
        self._subscriptions = [
            await nc.subscribe(self._subject, cb=self._receive),
            await nc.subscribe(f"{self._subject}.watch.*", cb=self._told),
        ]

    async def _told(self, message: Msg) -> None:
        """The broker's word that nobody listens to an answer any more."""
        served = self._served.get(message.subject.rpartition(".")[2])
        if served is not None and (message.headers or {}).get("Status") == NO_RESPONDERS:
            served.leave()

    async def _receive(self, message: Msg) -> None:
        part = Part.read(message.headers)
        if part is None:
            return
        served = self._served.get(part.id)
        if part.kind == "open" and served is None and message.reply and self._app is not None:
            await self._open(part, message)
        elif part.kind == "ask" and message.reply:
            if served is None:
                answer = Part(kind="unknown", id=part.id)
            else:
                served.heard_s = time.monotonic()
                answer = Part(kind="alive", id=part.id)
            await self._bus.publish(message.reply, b"", headers=answer.marks())
        elif served is not None and part.kind == "body":
            served.take(part, message.data)
        elif served is not None and part.kind == "stop":
            served.leave()

    async def _open(self, part: Part, message: Msg) -> None:
        served = _Served(part, message.reply, self._bus, f"{self._subject}.watch.{part.id}")
        if len(self._served) >= _LIMIT:
            full = QueueFull(model="this node", n_waiting=_LIMIT, capacity=_LIMIT, retry_after_s=1)
            headers = [(key.encode(), value.encode()) for key, value in full.headers.items()]
            await served.send({"type": "http.response.start", "status": full.status, "headers": headers})
            await served.send({"type": "http.response.body", "body": encode(full.native(None))})
            return
        self._served[part.id] = served
        served.take(part, message.data)
        task = asyncio.create_task(self._serve(part.id, served), name=f"nats-forwarded-{part.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, key: str, served: _Served) -> None:
        assert self._app is not None
        try:
            await self._app(served.scope, served.receive, served.send)
        except Exception:
            log.exception("a forwarded request broke", extra={"code": "nats.forward_broke"})
        finally:
            if self._served.get(key) is served:
                del self._served[key]
            if not served.ended:
                await served.tell("unknown")

    async def _watch(self) -> None:
        """Takes callers for gone that have not asked for long."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for served in self._served.values():
                if time.monotonic() - served.heard_s > SILENT_S:
                    served.leave()
