"""Fetches one model file: resumed where an earlier try ended, verified, and only then put where it belongs.

Bytes go to `<file>.part`; `<file>.part.json` says of which remote file they are, so that a restart goes on and a file
that has changed on the server begins anew. A lock beside them keeps a second process from the same file. The size and
the SHA-256 (MODEL_SHA256, else the hub's etag) are checked over what lies on the disk; a file that fails is removed.

A download has a thread of its own with a small event loop in it, so that a stop takes effect at once, also while a
server stalls, and the node's loop never waits for disk or network. Callbacks come from that thread.

Fetching by hand, over huggingface_hub's addresses and tokens: its own download resumes within one call only, verifies
the size alone, and cannot be stopped while it waits.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import httpx2
from filelock import Timeout

from engine.model_file import facts_of, forget_part, lock_of, part_of
from engine.model_source import RemoteFile, Source, may_ask, refusal, source_of
from infsvc import __version__
from infsvc.errors import DiskFull, DownloadError, DownloadStopped, NoSource, human_bytes
from infsvc.settings import WorkerSettings

_MAGIC = b"GGUF"
_BLOCK_BYTES = 4 * 2**20
_TELL_S = 0.25
_RATE_S = 5.0
_LOCK_POLL_S = 0.5
_SPARE_BYTES = 32 * 2**20
"""What a download leaves free on its disk, for the audit log beside it."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long a download bears with its server, in seconds.

    Attributes:
        connect_s: for a connection.
        stall_s: without a byte, before the connection is given up.
        first_wait_s: before the second try; each further one waits twice as long.
        max_wait_s: at most.
        n_tries: in a row that bring nothing, before the download fails.
    """

    connect_s: float = 10.0
    stall_s: float = 20.0
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0
    n_tries: int = 6


@dataclass(frozen=True)
class Progress:
    """How far it is. `total_bytes` is 0 while unknown; `bytes_per_s` is of the last five seconds."""

    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None = None
    eta_s: float | None = None
    verifying: bool = False


@dataclass(frozen=True)
class Fetched:
    """What was fetched. `verified` says by what: `sha256`, `size`, or `nothing` but its first bytes."""

    path: Path
    total_bytes: int
    resumed_bytes: int
    verified: str
    sha256: str


class _Interrupted(Exception):
    """Something that another try may mend."""

    def __init__(self, reason: str, *, retry_after_s: float = 0.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(reason)


class Download:
    """One file on its way. `start()`, then `done` resolves to a `Fetched`, or raises `DownloadError`.

    Args:
        settings: the worker file, which names the source.
        target: where the file belongs.
        on_progress: called about four times a second.
        on_note: called with a level, a word and a sentence when something is worth logging.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        target: Path,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_note: Callable[[str, str, str], None] = lambda *_: None,
        patience: Patience | None = None,
    ) -> None:
        self.name, self.target = settings.model_name, target
        self.done: Future[Fetched] = Future()
        self._settings = settings
        self._on_progress, self._on_note = on_progress, on_note
        self._patience = patience or Patience()
        self._thread = threading.Thread(target=self._run, name=f"download-{self.name}", daemon=True)
        self._stopped = False
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Fetched] | None = None
        self._remote = RemoteFile(None, None)
        self._resumed_bytes = 0
        self._received: deque[tuple[float, int]] = deque()
        self._have = 0

    def start(self) -> None:
        """Begins, in its own thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it soon, with `DownloadStopped`; what has come is kept. Any thread; safe to call twice."""
        with self._lock:
            self._stopped = True
            if self._loop is not None and self._task is not None:
                with suppress(RuntimeError):  # its loop has just closed
                    self._loop.call_soon_threadsafe(self._task.cancel)

    def join(self, timeout_s: float) -> bool:
        """Waits for its thread. False when that still runs."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            fetched = asyncio.run(self._main())
        except (asyncio.CancelledError, DownloadStopped):
            self.done.set_exception(DownloadStopped())
        except DownloadError as error:
            self.done.set_exception(error)
        except OSError as error:
            self.done.set_exception(self._disk_error(error))
        except BaseException as error:
            self.done.set_exception(DownloadError(f"the download broke: {type(error).__name__}: {error}"))
        else:
            self.done.set_result(fetched)

    async def _main(self) -> Fetched:
        with self._lock:
            if self._stopped:
                raise DownloadStopped
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        source = source_of(self._settings)
        if source is None:
            raise NoSource(str(self.target))
        self.target.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_of(self.target)
        waited = False
        while True:
            try:
                lock.acquire()
                break
            except Timeout:
                if not waited:
                    self._on_note("info", "model.download_waits", "another process downloads this file: waiting for it")
                    waited = True
                await asyncio.sleep(_LOCK_POLL_S)
        try:
            if self.target.is_file():
                return Fetched(self.target, self.target.stat().st_size, 0, "nothing", "")
            return await self._fetch(source)
        finally:
            lock.release()

    async def _fetch(self, source: Source) -> Fetched:
        headers = {"User-Agent": f"infsvc/{__version__}", "Accept-Encoding": "identity"}
        patience = self._patience
        timeout = httpx2.Timeout(patience.stall_s, connect=patience.connect_s)

        async def check(request: httpx2.Request) -> None:
            if not may_ask(str(request.url), anyhow=source.anyhow):
                raise DownloadError(f"{source.shown} leads to an address that is not https: use another source")

        client = httpx2.AsyncClient(headers=headers, timeout=timeout, follow_redirects=True, max_redirects=8,
                                    event_hooks={"request": [check]})  # fmt: skip
        n_idle, best_bytes = 0, self._part_bytes()
        async with client:
            while True:
                try:
                    await self._attempt(client, source)
                    break
                except (httpx2.TransportError, _Interrupted) as fault:
                    have = self._part_bytes()
                    n_idle = 1 if have > best_bytes else n_idle + 1
                    best_bytes = max(best_bytes, have)
                    told = _told(fault)
                    if n_idle >= patience.n_tries or isinstance(fault, httpx2.UnsupportedProtocol):
                        raise DownloadError(
                            f"{source.shown}: {told}; {human_bytes(have)} have come and are kept: "
                            "look at the network and pull again"
                        ) from None
                    wait_s = min(patience.max_wait_s, patience.first_wait_s * 2 ** (n_idle - 1))
                    wait_s = max(wait_s, min(fault.retry_after_s, 300.0) if isinstance(fault, _Interrupted) else 0.0)
                    self._on_note("warning", "model.download_retry", f"{told}; the next try in {wait_s:g} s")
                    await asyncio.sleep(wait_s)
                except httpx2.TooManyRedirects:
                    raise DownloadError(f"{source.shown} is redirected without end: use another source") from None
                except httpx2.InvalidURL:
                    raise DownloadError(f"{source.shown} is no address: check MODEL_URL and HF_ENDPOINT") from None
        return await self._verified(source)

    def _part_bytes(self) -> int:
        try:
            return part_of(self.target).stat().st_size
        except FileNotFoundError:
            return 0

    async def _attempt(self, client: httpx2.AsyncClient, source: Source) -> None:
        """Asks for what is missing and writes it, to the end of the file. Raises `_Interrupted` before that end."""
        if source.on_hub:
            self._remote = await self._ask(client, source)
            expected = self._remote.sha256
            if source.sha256 and expected and expected != source.sha256:
                raise DownloadError(
                    f"{source.shown} has the SHA-256 {expected}, and MODEL_SHA256 says {source.sha256}: "
                    "the hub's file has changed, or MODEL_SHA256 is of another"
                )
        facts = self._facts(source)
        have = self._part_bytes() if facts else 0
        total = self._remote.total_bytes
        if total is not None and have == total and have:
            return
        if total is not None:
            if have > total:
                have = 0
            self._check_room(total - have)
        headers = _authorization(source)
        if have:
            headers["Range"] = f"bytes={have}-"
            # A hub's etag was compared already; a plain server is asked to do so.
            if not source.on_hub and facts.get("etag"):
                headers["If-Range"] = facts["etag"]
        async with client.stream("GET", source.url, headers=headers) as response:
            if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{have}":
                self._remote = RemoteFile(have, facts.get("etag"))
                return  # nothing is missing
            start = self._begin(source, response, have, facts.get("total_bytes"))
            with part_of(self.target).open("r+b" if start else "wb") as part:
                part.truncate(start)
                part.seek(start)
                self._resumed_bytes = start
                await self._receive(source, response, part, start)

    async def _ask(self, client: httpx2.AsyncClient, source: Source) -> RemoteFile:
        """Asks a hub about the file. Redirects inside the hub are followed, the one to the content is not."""
        from huggingface_hub import constants

        url = httpx2.URL(source.url)
        for _ in range(8):
            response = await client.head(url, headers=_authorization(source), follow_redirects=False)
            if response.is_redirect:
                target = url.join(response.headers["location"])
                if target.host == url.host and constants.HUGGINGFACE_HEADER_X_LINKED_ETAG not in response.headers:
                    url = target
                    continue
            elif not response.is_success:
                raise self._refused(source, response)
            size = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE) or (
                None if response.is_redirect else response.headers.get("Content-Length")
            )
            etag = response.headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or response.headers.get("ETag")
            return RemoteFile(
                int(size) if size and size.isdigit() else None,
                etag.removeprefix("W/").strip('"') if etag else None,
            )
        raise httpx2.TooManyRedirects("the hub redirects without end")

    def _refused(self, source: Source, response: httpx2.Response) -> Exception:
        """The fault behind a status: one that passes, or a final one."""
        status = response.status_code
        elsewhere = response.url.host != httpx2.URL(source.url).host
        if status in _TRANSIENT or (elsewhere and status in (401, 403)):
            # Where a hub's content lies is signed for a while only: the next try asks for a fresh address.
            after = response.headers.get("Retry-After", "")
            return _Interrupted(
                f"the server answered {status}", retry_after_s=float(after) if after.isdecimal() else 0.0
            )
        return refusal(source, status, response.headers)

    def _begin(self, source: Source, response: httpx2.Response, have: int, known_bytes: int | None) -> int:
        """Reads the answer's head; the offset at which its body belongs. `known_bytes` is the size that an earlier try
        was told."""
        status = response.status_code
        if status == 416:
            forget_part(self.target)
            raise _Interrupted("what had come was longer than the file: it begins anew")
        if status not in (200, 206):
            raise self._refused(source, response)
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in ("text/html", "application/xhtml+xml"):
            raise _no_model(source, "a web page")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(f"{source.shown} is sent compressed, though that was not asked for: use another source")
        length = response.headers.get("Content-Length", "")
        start, total = 0, int(length) if length.isdecimal() else None
        if status == 206:
            first, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            start = int(first.partition("-")[0]) if first.partition("-")[0].isdecimal() else -1
            total = int(whole) if whole.isdecimal() else None
            if start != have or (total is not None and known_bytes not in (None, total)):
                forget_part(self.target)
                raise _Interrupted("the server sent another part than was asked for: it begins anew")
        if not source.on_hub:
            etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
            self._remote = RemoteFile(total, None if etag and etag.startswith("W/") else etag)
        elif self._remote.total_bytes is None:
            self._remote = RemoteFile(total, self._remote.etag)
        if self._remote.total_bytes is not None:
            self._check_room(self._remote.total_bytes - start)
        self._remember(source)
        return start

    async def _receive(self, source: Source, response: httpx2.Response, part: BinaryIO, start: int) -> None:
        self._received.clear()
        self._have = start
        # By the clock and not by the chunk: a server that stalls shows as a rate that falls to nothing.
        ticker = asyncio.create_task(self._tick(), name="progress")
        try:
            await self._write(source, response, part)
        finally:
            ticker.cancel()
        part.flush()
        have, total = self._have, self._remote.total_bytes
        self._tell()
        if total is not None and have < total:
            raise _Interrupted(f"the body ended after {human_bytes(have)} of {human_bytes(total)}")
        if total is not None and have > total:
            forget_part(self.target)
            raise DownloadError(f"{source.shown} sent more than its {human_bytes(total)}: pull again")

    async def _write(self, source: Source, response: httpx2.Response, part: BinaryIO) -> None:
        async for chunk in response.aiter_raw():
            if self._have == 0 and not _MAGIC.startswith(chunk[:4]) and not chunk.startswith(_MAGIC):
                forget_part(self.target)
                raise _no_model(source, "a web page" if chunk.lstrip()[:1] == b"<" else "something else")
            part.write(chunk)
            self._have += len(chunk)

    async def _tick(self) -> None:
        while True:
            self._tell()
            await asyncio.sleep(_TELL_S)

    async def _verified(self, source: Source) -> Fetched:
        """Checks what lies on the disk and puts it where it belongs."""
        part = part_of(self.target)
        total = part.stat().st_size
        expected = source.sha256 or self._remote.sha256 or ""
        digest = hashlib.sha256()
        told_s = 0.0
        with part.open("r+b") as stream:
            os.fsync(stream.fileno())
            magic, done = stream.read(4), 0
            if magic != _MAGIC:
                forget_part(self.target)
                raise _no_model(source, "nothing" if not magic else "something else")
            stream.seek(0)
            while block := stream.read(_BLOCK_BYTES):
                digest.update(block)
                done += len(block)
                if time.monotonic() - told_s >= _TELL_S or done == total:
                    told_s = time.monotonic()
                    self._on_progress(Progress(done, total, verifying=True))
                await asyncio.sleep(0)  # where a stop takes effect
        found = digest.hexdigest()
        if expected and found != expected:
            forget_part(self.target)
            whose = "MODEL_SHA256" if source.sha256 else "the hub"
            raise DownloadError(
                f"{source.shown} arrived damaged: its SHA-256 is {found}, {whose} says {expected}. It was removed: "
                "pull again" + (", or check MODEL_SHA256" if source.sha256 else "")
            )
        part.replace(self.target)
        facts_of(self.target).unlink(missing_ok=True)
        verified = "sha256" if expected else "size" if self._remote.total_bytes is not None else "nothing"
        return Fetched(self.target, total, self._resumed_bytes, verified, found)

    def _tell(self) -> None:
        now, done, total = time.monotonic(), self._have, self._remote.total_bytes or 0
        self._received.append((now, done))
        while now - self._received[0][0] > _RATE_S:
            self._received.popleft()
        since_s, before = self._received[0]
        rate = (done - before) / (now - since_s) if now > since_s else None
        self._on_progress(Progress(done, total, rate, (total - done) / rate if rate and total else None))

    def _identity(self, source: Source) -> str:
        """Names the source in a file without giving away what its address may hold."""
        return hashlib.sha256(source.url.encode()).hexdigest()

    def _facts(self, source: Source) -> dict[str, Any]:
        """What is known of the unfinished download, or nothing when it is of another file."""
        try:
            kept = json.loads(facts_of(self.target).read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(kept, dict) or kept.get("source") != self._identity(source):
            return {}
        if source.on_hub and kept.get("etag") != self._remote.etag:
            return {}
        return kept

    def _remember(self, source: Source) -> None:
        facts = {"source": self._identity(source), "etag": self._remote.etag, "total_bytes": self._remote.total_bytes}
        path = facts_of(self.target)
        fresh = path.with_name(path.name + ".new")
        fresh.write_text(json.dumps(facts))
        fresh.replace(path)

    def _check_room(self, needed_bytes: int) -> None:
        free = shutil.disk_usage(self.target.parent).free
        if needed_bytes + _SPARE_BYTES > free:
            raise DiskFull(folder=str(self.target.parent), needed_bytes=needed_bytes, free_bytes=free)

    def _disk_error(self, error: OSError) -> DownloadError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            missing = max(0, (self._remote.total_bytes or 0) - self._part_bytes())
            free = 0
            with suppress(OSError):
                free = shutil.disk_usage(self.target.parent).free
            return DiskFull(folder=str(self.target.parent), needed_bytes=missing, free_bytes=free)
        return DownloadError(
            f"{self.target} cannot be written ({error.strerror or error}): make its folder writable, "
            "or name another with MODEL_PATH"
        )


def _authorization(source: Source) -> dict[str, str]:
    return {"Authorization": f"Bearer {source.token}"} if source.token else {}


def _no_model(source: Source, what: str) -> DownloadError:
    return DownloadError(f"{source.shown} is {what} and no GGUF model file: check the source in the worker file")


def _told(fault: Exception) -> str:
    """A broken connection in words."""
    if isinstance(fault, _Interrupted):
        return str(fault)
    if isinstance(fault, httpx2.ConnectTimeout | httpx2.ConnectError):
        return f"the server cannot be reached ({fault or type(fault).__name__})"
    if isinstance(fault, httpx2.TimeoutException):
        return "the server sent nothing for a while"
    return f"the connection broke ({fault or type(fault).__name__})"
