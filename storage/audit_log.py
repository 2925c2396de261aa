"""The audit log: one SQLite file a model, written by one batching task, read over connections of its own.

A row gets there in two steps. *Written*, it is committed to the write-ahead log and survives the end of this process,
kill -9 included; that takes a fraction of a millisecond. *Flushed*, the disk has it and it survives power loss: a task
beside the writer asks the disk for that, once for all that was written meanwhile, so that nobody's commit waits for it.
Rows are committed in batches of at most 256, or what came within 20 ms if nobody waits for one. When the disk takes no
more, rows are kept in memory and tried again; from `MAX_BACKLOG` on the model refuses new work, and from twice that the
rows of refused requests are lost, and counted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import aiosqlite

from infsvc.audit import EventRow, RequestRow, columns
from infsvc.errors import AuditUnavailable

log = logging.getLogger("infsvc.audit")

MAX_BACKLOG = 20_000
_BATCH_ROWS = 256
# What a row's own content can cause; trying again would stop the log for ever.
_ROW_FAULTS = (
    OverflowError,
    ValueError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.DataError,
    sqlite3.ProgrammingError,
)
_BATCH_S = 0.02
_RETRY_S = 1.0
_READ_WAIT_S = 0.5

# Applied in order; `user_version` says how many a file has. Never edit one that was released: add another.
_MIGRATIONS = (
    """
    CREATE TABLE requests(
        id INTEGER PRIMARY KEY, ts REAL NOT NULL, trace_id TEXT, req_id TEXT NOT NULL, worker_id TEXT, source TEXT,
        reply_to TEXT, raw_input TEXT, formatted_input TEXT, input_len INTEGER, params_json TEXT, grammar_used TEXT,
        response_text TEXT, tokens_in INTEGER, tokens_out INTEGER, dur_ms REAL, status TEXT NOT NULL, error TEXT,
        finish_reason TEXT, ttft_ms REAL, tokens_cached INTEGER, reasoning TEXT
    );
    CREATE INDEX requests_ts ON requests(ts);
    CREATE INDEX requests_req_id ON requests(req_id);
    CREATE TABLE events(
        id INTEGER PRIMARY KEY, ts REAL NOT NULL, level TEXT NOT NULL, code TEXT NOT NULL, msg TEXT NOT NULL, meta TEXT
    );
    CREATE INDEX events_ts ON events(ts);
    """,
)


def _insert(table: str, row: RequestRow | EventRow) -> tuple[str, list[Any]]:
    values = columns(row)
    names = ", ".join(values)
    return f"INSERT INTO {table}({names}) VALUES ({', '.join('?' * len(values))})", list(values.values())


class _Mark:
    """How many rows have come as far as this, and who waits until it is so many. Waiters' numbers never fall."""

    def __init__(self) -> None:
        self.n = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def until(self, n: int) -> None:
        if self.n < n:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.append((n, waiting))
            await waiting

    def reach(self, n: int) -> None:
        self.n = n
        while self._waiting and self._waiting[0][0] <= n:
            _, waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(None)


class AuditLog:
    """Writes one model's audit file. Loop thread; the file is opened at the first row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: deque[tuple[str, list[Any]]] = deque()
        self._n_taken = 0
        self._written, self._flushed = _Mark(), _Mark()
        self._wake = asyncio.Event()
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._closed = False
        self._n_lost = 0
        self._fault: str | None = None

    @property
    def unavailable(self) -> str | None:
        """Why new work must be refused, or None."""
        return self._fault if self._fault is not None and len(self._rows) >= MAX_BACKLOG else None

    def record(self, row: RequestRow) -> None:
        """Takes a request's row over."""
        self._put(_insert("requests", row))

    def event(self, row: EventRow) -> None:
        """Takes an event's row over."""
        self._put(_insert("events", row))

    async def written(self) -> None:
        """Waits until every row taken so far outlives this process."""
        if self._written.n < self._n_taken:
            self._hurry.set()
            await self._written.until(self._n_taken)

    async def flush(self) -> None:
        """Waits until every row taken so far is on disk."""
        await self._flushed.until(self._n_taken)

    async def close(self, *, timeout_s: float = 3.0) -> None:
        """Writes what is left and closes the file; says how many rows a dead disk cost."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._closed = True
        if self._rows or self._n_lost:
            self._say_lost(len(self._rows) + self._n_lost)
        self._rows.clear()
        self._written.reach(self._n_taken)
        self._flushed.reach(self._n_taken)

    def _say_lost(self, n_rows: int) -> None:
        log.error(
            f"{n_rows} audit rows could not be written to {self.path}: {self._fault or 'the log is closed'}",
            extra={"code": "audit.lost", "meta": {"rows": n_rows}},
        )

    def _put(self, row: tuple[str, list[Any]]) -> None:
        if self._closed:
            self._say_lost(1)
            return
        if self._fault is not None and len(self._rows) >= 2 * MAX_BACKLOG:
            self._n_lost += 1
            return
        self._rows.append(row)
        self._n_taken += 1
        self._wake.set()
        if self._task is None and not self._closing:
            self._task = asyncio.create_task(self._write(), name=f"audit-{self.path.stem}")

    async def _write(self) -> None:
        """The writer: opens, batches, commits, and begins anew after a fault."""
        while self._rows or not self._closing:
            try:
                await self._write_until_fault()
            except (sqlite3.Error, OSError) as error:
                if self._fault is None:
                    log.error(
                        f"the audit log {self.path} cannot be written: {error}; rows are kept and tried again",
                        extra={"code": "audit.fault"},
                    )
                self._fault = str(error)
                if self._closing:
                    return
                await asyncio.sleep(_RETRY_S)

    async def _write_until_fault(self) -> None:
        async with _connected(self.path, isolation_level=None) as db:
            await _prepare(db)
            with _opened(Path(f"{self.path}-wal")) as wal:
                flushing = asyncio.create_task(self._keep_flushed(wal), name=f"audit-flush-{self.path.stem}")
                # A disk that fails is the writer's fault to tell and to try again after.
                flushing.add_done_callback(lambda _: self._wake.set())
                try:
                    await self._commit_all(db, flushing)
                    if self._flushed.n < self._written.n and not flushing.done():
                        await self._flushed.until(self._written.n)
                finally:
                    flushing.cancel()
                    await asyncio.gather(flushing, return_exceptions=True)

    async def _commit_all(self, db: aiosqlite.Connection, flushing: asyncio.Task[None]) -> None:
        """Commits what there is until the log is closed."""
        while self._rows or not self._closing:
            if flushing.done():
                flushing.result()
            if not self._rows:
                self._wake.clear()
                self._hurry.clear()
                await self._wake.wait()
                if self._rows and not self._closing:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_BATCH_S):
                            await self._hurry.wait()
                continue
            batch = [self._rows[index] for index in range(min(_BATCH_ROWS, len(self._rows)))]
            # All of it by one way to SQLite's thread and back: on a busy loop each way costs a turn of it.
            for values, fault in await db._execute(_commit, db._conn, batch):  # type: ignore[no-untyped-call]
                log.error(
                    f"a row cannot be kept in {self.path}: {fault}",
                    extra={"code": "audit.bad_row", "meta": {"row": repr(values)[:2000]}},
                )
            for _ in batch:
                self._rows.popleft()
            self._written.reach(self._written.n + len(batch))
            if self._fault is not None:
                self._fault = None
                log.info(f"the audit log {self.path} is written again", extra={"code": "audit.recovered"})

    async def _keep_flushed(self, wal: int) -> None:
        """Brings to the disk what is written, again and again, until it is cancelled; raises `OSError`."""
        while True:
            await self._written.until(self._flushed.n + 1)
            n = self._written.n
            await asyncio.to_thread(_sync, wal)
            self._flushed.reach(n)


def _commit(db: sqlite3.Connection, batch: list[tuple[str, list[Any]]]) -> list[tuple[list[Any], Exception]]:
    """Commits rows in one transaction, on SQLite's thread; those that cannot be kept, and why."""
    bad: list[tuple[list[Any], Exception]] = []
    db.execute("BEGIN")
    try:
        for sql, values in batch:
            try:
                db.execute(sql, values)
            except _ROW_FAULTS as fault:
                bad.append((values, fault))
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return bad


@asynccontextmanager
async def _connected(database: Path | str, **options: Any) -> AsyncIterator[aiosqlite.Connection]:
    """An open database. When it does not open, aiosqlite's thread still has a future to resolve: it is waited for, or
    it would meet a loop that has closed meanwhile."""
    db = aiosqlite.connect(database, **options)
    try:
        await db
    except BaseException:
        await asyncio.to_thread(db._thread.join, _RETRY_S)
        raise
    try:
        yield db
    finally:
        await db.close()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The write-ahead log itself, as a file descriptor; SQLite holds no lock on it that closing this could drop."""
    wal = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # its name must outlive a power loss, too
        finally:
            os.close(folder)
        yield wal
    finally:
        os.close(wal)


_sync = getattr(os, "fdatasync", os.fsync)


async def _prepare(db: aiosqlite.Connection) -> None:
    """Sets the journal up and brings the tables to the newest form."""
    await db.execute("PRAGMA journal_mode=WAL")
    # FULL would have each commit wait for the disk. What must be there `_keep_flushed` sees to; order is kept by both.
    await db.execute("PRAGMA synchronous=NORMAL")
    await db.execute("PRAGMA busy_timeout=5000")
    async with db.execute("PRAGMA user_version") as cursor:
        row = await cursor.fetchone()
    applied = int(row[0]) if row else 0
    for number, migration in enumerate(_MIGRATIONS[applied:], applied + 1):
        await db.executescript(f"BEGIN; {migration} PRAGMA user_version={number}; COMMIT;")


class AuditReader:
    """Reads audit files, each query over its own read-only connection, after what was recorded before it."""

    def __init__(self, logs: dict[str, AuditLog]) -> None:
        self._logs = logs

    async def rows(
        self,
        model: str,
        *,
        limit: int,
        status: str | None = None,
        since: float | None = None,
        after_id: int | None = None,
    ) -> list[dict[str, Any]]:
        """A model's newest requests first. No file yet means no rows; an unknown model is a KeyError. With `after_id`,
        the first `limit` rows that came after that one, the newest of them first."""
        where: list[str] = ["1=1"]
        values: list[Any] = []
        if status is not None:
            where.append("status = ?")
            values.append(status)
        if since is not None:
            where.append("ts >= ?")
            values.append(since)
        if after_id is not None:
            sql = f"SELECT * FROM requests WHERE {' AND '.join(where)} AND id > ? ORDER BY id LIMIT ?"
            return (await self._query(model, sql, [*values, after_id, limit]))[::-1]
        return await self._query(
            model, f"SELECT * FROM requests WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?", [*values, limit]
        )

    async def _query(self, model: str, sql: str, values: list[Any]) -> list[dict[str, Any]]:
        log_of_model = self._logs[model]
        path = log_of_model.path
        with suppress(TimeoutError):
            async with asyncio.timeout(_READ_WAIT_S):
                await log_of_model.flush()
        if not path.is_file():
            return []
        async with _connected(f"{path.absolute().as_uri()}?mode=ro", uri=True) as db:
            db.row_factory = sqlite3.Row
            try:
                async with db.execute(sql, values) as cursor:
                    return [dict(row) for row in await cursor.fetchall()]
            except sqlite3.OperationalError as error:
                # The file is there and its tables are not yet.
                if "no such table" in str(error):
                    return []
                raise AuditUnavailable(f"{path} cannot be read: {error}") from error
            except sqlite3.DatabaseError as error:
                raise AuditUnavailable(f"{path} is no audit file: {error}; move it away") from error
