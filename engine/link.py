"""Frames between a node and the process that one of its models runs in: pickled tuples, each behind its length, over a
pair of sockets that nobody else holds.

Both ends are this program, started by the same user, so what comes in is trusted as far as that.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

_LENGTH_BYTES = 4
_MAX_BYTES = 2**32 - 1
_READ_AHEAD_BYTES = 2**20

Frame = tuple[Any, ...]
"""What is told first, then with what."""


class Link:
    """One end. Made, opened and read on the loop's thread; `send` may be called from any thread and never waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._thread = loop, threading.get_ident()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._early: list[bytes] = []
        self._closed = False

    def send(self, *frame: Any) -> None:
        """Hands a frame over. What is sent before `open` goes out then; after the end nothing does."""
        data = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"a frame of {len(data)} bytes is too long")
        data = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        if threading.get_ident() == self._thread:
            self._write(data)
            return
        with suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(self._write, data)

    def _write(self, data: bytes) -> None:
        if self._closed:
            return
        if self._writer is None:
            self._early.append(data)
        elif not self._writer.is_closing():
            self._writer.write(data)

    async def open(self, end: socket.socket) -> None:
        """Takes the socket over."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=end, limit=_READ_AHEAD_BYTES)
        for data in self._early:
            self._writer.write(data)
        self._early.clear()

    async def frames(self) -> AsyncIterator[Frame]:
        """Each frame as it comes, until the other end is gone."""
        assert self._reader is not None
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
                yield pickle.loads(await self._reader.readexactly(length))

    async def close(self) -> None:
        """Sends what is still to be sent, if the other end takes it, and closes."""
        self._closed = True
        if self._writer is not None:
            with suppress(ConnectionError):
                self._writer.close()
                await self._writer.wait_closed()


def packed(error: BaseException) -> tuple[type[BaseException], tuple[Any, ...], dict[str, Any]]:
    """An error as a frame can hold it: ours make their sentences from figures, so they are not built anew."""
    return type(error), error.args, dict(vars(error))


def unpacked(parts: tuple[type[BaseException], tuple[Any, ...], dict[str, Any]]) -> BaseException:
    """The error that `packed` took apart."""
    kind, args, fields = parts
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(fields)
    return error
