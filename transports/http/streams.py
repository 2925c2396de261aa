"""Answers that take a while: notices at once that the client has gone, and frames server-sent events.

uvicorn tells a handler of a lost connection only through `receive()`, so somebody has to listen there while the handler
works. Nothing here knows what is streamed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from infsvc.errors import ClientGone
from transports.http.refusals import dumps


class Presence:
    """Whether the client is still there."""

    def __init__(self) -> None:
        self._gone = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def gone(self) -> bool:
        return self._gone

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Calls `callback` when the client goes, or now when it already has."""
        if self._gone:
            callback()
        else:
            self._callbacks.append(callback)

    async def listen(self, receive: Receive) -> None:
        """Runs until the connection is lost."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        for callback in self._callbacks:
            callback()


@asynccontextmanager
async def present(receive: Receive) -> AsyncIterator[Presence]:
    """Listens for the client's leaving while the block runs. The request's body must have been read before."""
    presence = Presence()
    async with beside(presence.listen(receive), "http-presence"):
        yield presence


class Running(Protocol):
    """Work for one client that ends by itself, or soon after it is cancelled."""

    def cancel(self) -> None: ...

    async def ended(self) -> None: ...


async def while_present(receive: Receive, work: Running) -> None:
    """Waits for the end of work, which is cancelled when the client goes; raises `ClientGone` then."""
    async with present(receive) as client:
        client.when_gone(work.cancel)
        await work.ended()
        if client.gone:
            raise ClientGone("the client went away before its answer was ready")


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` as a task while the block runs; it is cancelled and joined at the block's end."""
    task = asyncio.create_task(work, name=name)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def data(content: object, *, event: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + dumps(content) + b"\n\n"


def comment(text: str) -> bytes:
    """A comment line, which clients pass over."""
    return b": " + text.encode() + b"\n\n"


class EventStream(Response):
    """A `text/event-stream` answer.

    Args:
        frames: whole frames, in order. Its errors must be frames too, for the status is sent by then.
        stop: called when the client goes, and at the end: makes `frames` end soon. Must be idempotent.
        quiet: sent when there was nothing to send for `quiet_s`, so that no proxy takes the connection for dead.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        stop: Callable[[], None],
        quiet: bytes,
        quiet_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._frames, self._stop = frames, stop
        self._quiet, self._quiet_s = quiet, quiet_s
        self._sent_s = 0.0
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | dict(headers or {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._sent_s = time.monotonic()
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] != "HEAD":
                async with (
                    aclosing(self._frames),
                    present(receive) as client,
                    beside(self._keep_alive(send), "http-keep-alive"),
                ):
                    client.when_gone(self._stop)
                    async for frame in self._frames:
                        await self._send(send, frame)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._stop()

    async def _send(self, send: Send, frame: bytes) -> None:
        self._sent_s = time.monotonic()
        await send({"type": "http.response.body", "body": frame, "more_body": True})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            silent_s = time.monotonic() - self._sent_s
            if silent_s >= self._quiet_s:
                await self._send(send, self._quiet)
            else:
                await asyncio.sleep(self._quiet_s - silent_s)
