"""The process that one model runs in: started, spoken to, watched, and ended; what native code may do to it, it does to
nobody else.

The child (`engine.child`) holds the same engine and embedder that a thread would, and tells what they tell. It dies
with this process. One that says nothing for a minute hangs as a whole and is killed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Protocol

from engine.link import Frame, Link, unpacked
from infsvc.errors import EngineLost, LlamaError
from infsvc.home import app_root

log = logging.getLogger("infsvc.engine")

SILENT_AFTER_S = 60.0
"""A child gives a sign of life twenty times in this time, whatever its engine does."""

START_S = 120.0
"""How long it may take, on top, until the first: it imports llama.cpp from a disk that may be slow."""

_CLOSE_S = 2.0
"""How long a child may take to end when it was asked to; nothing is lost in it."""
_REAP_S = 5.0

COMMAND = (sys.executable, "-m", "engine.child")


class Tenant(Protocol):
    """What lives in the process, as this side knows it. Loop thread."""

    def hear(self, kind: str, told: Frame) -> None:
        """Takes what the child tells of it."""

    def bereave(self, reason: str | None) -> None:
        """The process has ended: by itself, and why; or because it was closed (None)."""


class ModelProcess:
    """A model's child process. `start` on the loop's thread; `send`, `call`, `close` and `kill` from any.

    Attributes:
        n_bytes: what the process holds of memory, as it told last.
    """

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.n_bytes = 0
        self._loop = loop
        self._link = Link(loop)
        self._tenants: dict[str, Tenant] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._numbers = itertools.count()
        self._gate = threading.Lock()
        self._popen: subprocess.Popen[bytes] | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_s = 0.0
        self._closing = False
        self._reason: str | None = None
        self._gone = threading.Event()

    @property
    def pid(self) -> int | None:
        """The child's, once it is started."""
        return None if self._popen is None else self._popen.pid

    @property
    def closing(self) -> bool:
        """Whether somebody has asked it to end."""
        return self._closing

    def start(self) -> None:
        """Starts the child; raises `OSError` when the system has no room for one. It has the descriptors 1 and 2 of
        this process, so what llama.cpp prints lies in the one log."""
        ours, theirs = socket.socketpair()
        try:
            self._popen = subprocess.Popen(
                [*COMMAND, str(os.getpid()), str(theirs.fileno()), str(SILENT_AFTER_S / 20)],
                cwd=app_root(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl+C on the terminal is for the node
            )
        except OSError:
            ours.close()
            self._gone.set()
            raise
        finally:
            theirs.close()
        self._task = self._loop.create_task(self._follow(ours), name=f"process-{self.name}")

    def admit(self, part: str, tenant: Tenant) -> None:
        """Names who hears what the child tells of this part."""
        self._tenants[part] = tenant

    def send(self, *frame: Any) -> None:
        """Tells the child something; never waits."""
        self._link.send(*frame)

    def call(self, method: str, *arguments: Any) -> Any:
        """Asks the child and waits for its answer: not on the loop's thread.

        Raises:
            EngineLost: the process is gone, or ends meanwhile, by itself.
            LlamaError: it was closed.
            Exception: what the child's own call has raised.
        """
        answer: Future[Any] = Future()
        number = next(self._numbers)
        with self._gate:
            if self._gone.is_set():
                raise self._lost()
            self._calls[number] = answer
        self.send("call", number, method, arguments)
        return answer.result()

    def close(self) -> None:
        """Has the child end what it does and leave, and kills it where it does not. `join` waits for it."""
        self._closing = True
        self.send("close")
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._loop.call_later, _CLOSE_S, self._kill)

    def kill(self, reason: str) -> None:
        """Ends the child at once: it hangs, or its engine has died."""
        self._reason = self._reason or reason
        self._kill()

    def join(self, timeout_s: float) -> bool:
        """Waits for the end of the process; False when it still runs. Not on the loop's thread."""
        return self._popen is None or self._gone.wait(timeout_s)

    def _kill(self) -> None:
        if self._popen is not None and not self._gone.is_set():
            self._popen.kill()

    async def _follow(self, ours: socket.socket) -> None:
        """Reads what the child tells, to its end, and passes the end on."""
        self._heard_s = time.monotonic() + START_S
        self._loop.call_later(SILENT_AFTER_S / 20, self._watch)
        try:
            await self._link.open(ours)
            async for kind, *told in self._link.frames():
                self._heard_s = time.monotonic()
                self._hear(kind, tuple(told))
        except Exception as error:
            log.exception("a model's process is not understood", extra={"code": "engine.link", "model": self.name})
            self.kill(f"what it told was not understood: {error}")
        finally:
            await self._link.close()
            status = await self._loop.run_in_executor(None, self._reap)
            self._end(status)

    def _hear(self, kind: str, told: Frame) -> None:
        match kind:
            case "answer" | "error":
                number, value = told
                call = self._calls.pop(number)
                if kind == "answer":
                    call.set_result(value)
                else:
                    call.set_exception(unpacked(value))
            case "pulse":
                (self.n_bytes,) = told
            case "log":
                (fields,) = told
                logger = logging.getLogger(fields["name"])
                if logger.isEnabledFor(fields["levelno"]):
                    logger.handle(logging.makeLogRecord(fields))
            case _:
                part, *rest = told
                self._tenants[part].hear(kind, tuple(rest))

    def _watch(self) -> None:
        """Looks now and then whether the child still says anything."""
        if self._gone.is_set():
            return
        if time.monotonic() - self._heard_s > SILENT_AFTER_S:
            self.kill(f"it said nothing for {SILENT_AFTER_S:.0f} s")
        else:
            self._loop.call_later(SILENT_AFTER_S / 20, self._watch)

    def _reap(self) -> int:
        """Waits for the exit status of a child that has hung up; in a thread."""
        assert self._popen is not None
        with suppress(subprocess.TimeoutExpired):
            return self._popen.wait(_REAP_S)
        self._popen.kill()
        return self._popen.wait()

    def _end(self, status: int) -> None:
        if self._reason is None and not self._closing:
            self._reason = f"it ended with {_said(status)}"
        with self._gate:
            self._gone.set()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.set_exception(self._lost())
        self.n_bytes = 0
        for tenant in self._tenants.values():
            tenant.bereave(None if self._closing else self._reason)

    def _lost(self) -> Exception:
        return LlamaError("the model is closed") if self._closing else EngineLost(self.name, self._reason or "")


def _said(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"{name}, as the system ends what takes too much memory" if name == "SIGKILL" else name
