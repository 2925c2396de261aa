"""The audit log on a real file: no row that was flushed is lost, whatever dies."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from infsvc.audit import EventRow, RequestRow
from infsvc.errors import AuditUnavailable
from storage import audit_log
from storage.audit_log import AuditLog, AuditReader

SEED_SQL = (
    "SELECT req_id, worker_id, raw_input, formatted_input, dur_ms, status, datetime(ts, 'unixepoch') as time "
    "FROM requests ORDER BY ts DESC LIMIT 5",
    "SELECT worker_id, COUNT(*) as request_count, AVG(dur_ms) as avg_latency FROM requests GROUP BY worker_id",
    "SELECT datetime(ts, 'unixepoch') as time, dur_ms, tokens_out FROM requests ORDER BY ts DESC LIMIT 20",
    "SELECT datetime(ts, 'unixepoch') as time, level, code, msg FROM events ORDER BY ts DESC LIMIT 10",
)

CONTRACT_REQUESTS = [
    "id",
    "ts",
    "trace_id",
    "req_id",
    "worker_id",
    "source",
    "reply_to",
    "raw_input",
    "formatted_input",
    "input_len",
    "params_json",
    "grammar_used",
    "response_text",
    "tokens_in",
    "tokens_out",
    "dur_ms",
    "status",
    "error",
]
CONTRACT_EVENTS = ["id", "ts", "level", "code", "msg", "meta"]


def request(req_id: str = "r1", **fields: Any) -> RequestRow:
    given: dict[str, Any] = {
        "trace_id": None,
        "req_id": req_id,
        "worker_id": "here-0",
        "source": "http",
        "reply_to": None,
        "raw_input": "hello é\x00",
        "formatted_input": "<user>hello",
        "input_len": 5,
        "params_json": "{}",
        "response_text": "hi",
        "tokens_in": 3,
        "tokens_out": 2,
        "dur_ms": 12.5,
        "status": "ok",
        "error": None,
    }
    return RequestRow(**given | fields)


def rows(path: Path, sql: str = "SELECT * FROM requests ORDER BY id") -> list[dict[str, Any]]:
    with closing(sqlite3.connect(path)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute(sql)]


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[AuditLog]:
    log = AuditLog(tmp_path / "a.sqlite")
    yield log
    await log.close()


@pytest.fixture
def quick_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_RETRY_S", 0.01)


async def fault(log: AuditLog) -> str:
    """Waits until the writer has met a fault."""
    while log._fault is None:
        await asyncio.sleep(0.001)
    return log._fault


async def test_rows_are_on_disk_after_flush(log: AuditLog) -> None:
    log.record(request("r1", ts=1000.25, reasoning="why", ttft_ms=3.5, finish_reason="stop"))
    log.event(EventRow(level="info", code="startup", msg="begun", meta='{"a": 1}'))
    await log.flush()
    (row,) = rows(log.path)
    assert row == {
        "id": 1,
        "ts": 1000.25,
        "trace_id": None,
        "req_id": "r1",
        "worker_id": "here-0",
        "source": "http",
        "reply_to": None,
        "raw_input": "hello é\x00",
        "formatted_input": "<user>hello",
        "input_len": 5,
        "params_json": "{}",
        "grammar_used": None,
        "response_text": "hi",
        "tokens_in": 3,
        "tokens_out": 2,
        "dur_ms": 12.5,
        "status": "ok",
        "error": None,
        "finish_reason": "stop",
        "ttft_ms": 3.5,
        "tokens_cached": 0,
        "reasoning": "why",
    }
    (event,) = rows(log.path, "SELECT level, code, msg, meta FROM events")
    assert event == {"level": "info", "code": "startup", "msg": "begun", "meta": '{"a": 1}'}


async def test_what_is_written_outlives_the_process_before_the_disk_has_it(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = threading.Event()
    monkeypatch.setattr(audit_log, "_BATCH_S", 3600.0)
    monkeypatch.setattr(audit_log, "_sync", lambda _: disk.wait())
    try:
        for n in range(3):
            log.record(request(f"r{n}"))
            await log.written()
            assert len(rows(log.path)) == n + 1
        flushed = asyncio.create_task(log.flush())
        await log.written()
        assert not flushed.done()
    finally:
        disk.set()
    await flushed


async def test_one_flush_is_for_all_that_was_written_meanwhile(log: AuditLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_BATCH_S", 0.0)
    n_syncs, may_end = 0, threading.Event()

    def sync(_: int) -> None:
        nonlocal n_syncs
        n_syncs += 1
        may_end.wait()

    monkeypatch.setattr(audit_log, "_sync", sync)
    for n in range(20):
        log.record(request(f"r{n}"))
        await log.written()
    may_end.set()
    await log.flush()
    assert n_syncs == 2


async def test_a_disk_that_fails_is_a_fault_that_passes(
    log: AuditLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit_log, "_RETRY_S", 0.0)
    faults = [OSError(5, "Input/output error")]

    def sync(_: int) -> None:
        if faults:
            raise faults.pop()

    monkeypatch.setattr(audit_log, "_sync", sync)
    log.record(request())
    async with asyncio.timeout(10):
        await log.flush()
    assert "cannot be written: [Errno 5] Input/output error" in caplog.text
    assert len(rows(log.path)) == 1
    log.record(request("r2"))
    await log.flush()
    assert log._fault is None


async def test_the_columns_are_the_contracts_and_the_journal_is_wal(log: AuditLog) -> None:
    log.record(request())
    await log.flush()
    requests = rows(log.path, "SELECT name, type FROM pragma_table_info('requests')")
    assert [row["name"] for row in requests][: len(CONTRACT_REQUESTS)] == CONTRACT_REQUESTS
    types = {row["name"]: row["type"] for row in requests}
    assert (types["ts"], types["dur_ms"]) == ("REAL", "REAL")
    assert [row["name"] for row in rows(log.path, "SELECT name FROM pragma_table_info('events')")] == CONTRACT_EVENTS
    assert rows(log.path, "PRAGMA journal_mode") == [{"journal_mode": "wal"}]


@pytest.mark.parametrize("sql", SEED_SQL)
async def test_the_documented_sql_runs_as_printed(log: AuditLog, sql: str) -> None:
    for n in range(7):
        log.record(request(f"r{n}", ts=1_700_000_000.0 + n, dur_ms=float(n), worker_id=f"w{n % 2}"))
        log.event(EventRow(level="info", code="startup", msg=f"e{n}", ts=1_700_000_000.0 + n))
    await log.flush()
    found = rows(log.path, sql)
    if "GROUP BY" in sql:
        assert found == [
            {"worker_id": "w0", "request_count": 4, "avg_latency": 3.0},
            {"worker_id": "w1", "request_count": 3, "avg_latency": 3.0},
        ]
    else:
        assert found[0]["time"] == "2023-11-14 22:13:26"
        assert len(found) == (5 if "LIMIT 5" in sql else 7)


async def test_thousands_of_rows_keep_their_order(log: AuditLog) -> None:
    for n in range(1500):
        log.record(request(f"r{n}"))
    await log.flush()
    assert [row["req_id"] for row in rows(log.path)] == [f"r{n}" for n in range(1500)]


async def test_flush_with_nothing_to_do_returns(log: AuditLog) -> None:
    await log.flush()
    assert not log.path.exists()


async def test_close_writes_the_rest(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.sqlite")
    for n in range(700):
        log.record(request(f"r{n}"))
    await log.close()
    assert len(rows(log.path)) == 700
    await log.close()


async def test_a_row_after_close_is_told_and_nobody_waits_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog(tmp_path / "a.sqlite")
    log.record(request("r1"))
    await log.close()
    log.record(request("late"))
    await log.flush()
    assert [row["req_id"] for row in rows(log.path)] == ["r1"]
    assert [record.code for record in caplog.records] == ["audit.lost"]  # type: ignore[attr-defined]


async def test_migrations_are_applied_once(tmp_path: Path) -> None:
    for n in range(3):
        log = AuditLog(tmp_path / "a.sqlite")
        log.record(request(f"r{n}"))
        await log.close()
    assert [row["req_id"] for row in rows(tmp_path / "a.sqlite")] == ["r0", "r1", "r2"]
    assert rows(tmp_path / "a.sqlite", "PRAGMA user_version") == [{"user_version": len(audit_log._MIGRATIONS)}]


CHILD = """
import asyncio, sys
from pathlib import Path
from storage.audit_log import AuditLog
from tests.storage.test_audit_log import request

async def main() -> None:
    log = AuditLog(Path(sys.argv[1]))
    for batch in range(4):
        for n in range(50):
            log.record(request(f"r{batch * 50 + n}"))
        await log.flush()
        print((batch + 1) * 50, flush=True)
    log.record(request("perhaps"))
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_kill_9_loses_no_row_that_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout as told:
        for line in told:
            if int(line) == 200:
                break
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30)
    found = [row["req_id"] for row in rows(path)]
    assert found[:200] == [f"r{n}" for n in range(200)]
    assert rows(path, "PRAGMA integrity_check") == [{"integrity_check": "ok"}]


async def test_a_disk_that_takes_nothing_keeps_the_rows_until_it_does(
    log: AuditLog, quick_retry: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log.path.mkdir()
    for n in range(20):
        log.record(request(f"r{n}"))
    assert "unable to open" in await fault(log)
    assert log.unavailable is None
    log.record(request("r20"))
    log.path.rmdir()
    await log.flush()
    assert [row["req_id"] for row in rows(log.path)] == [f"r{n}" for n in range(21)]
    assert log.unavailable is None
    codes = [record.code for record in caplog.records if hasattr(record, "code")]
    assert codes == ["audit.fault", "audit.recovered"]


async def test_a_file_that_is_no_database_is_a_fault(log: AuditLog, quick_retry: None) -> None:
    log.path.write_bytes(b"this is not a database" * 100)
    log.record(request())
    assert "not a database" in await fault(log)
    log.path.unlink()
    await log.flush()
    assert len(rows(log.path)) == 1


async def test_a_full_backlog_refuses_new_work_and_a_flood_has_an_end(
    log: AuditLog, quick_retry: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit_log, "MAX_BACKLOG", 10)
    log.path.mkdir()
    log.record(request("r0"))
    await fault(log)
    for n in range(1, 10):
        assert log.unavailable is None
        log.record(request(f"r{n}"))
    assert "unable to open" in (log.unavailable or "")
    for n in range(10, 40):
        log.record(request(f"r{n}", status="rejected"))
    log.path.rmdir()
    await log.flush()
    assert log.unavailable is None
    assert [row["req_id"] for row in rows(log.path)] == [f"r{n}" for n in range(20)]
    await log.close()
    assert "20 audit rows" in caplog.text


async def test_close_on_a_dead_disk_says_what_it_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path / "a.sqlite")
    log.path.mkdir()
    for n in range(3):
        log.record(request(f"r{n}"))
    await log.close(timeout_s=0.2)
    assert "3 audit rows could not be written" in caplog.text
    await log.flush()


@pytest.mark.parametrize(
    "bad",
    [{"tokens_in": 2**70}, {"raw_input": "lone \ud800"}, {"req_id": None}, {"params_json": {"no": "text"}}],
    ids=["too large", "no UTF-8", "null", "type"],
)
async def test_a_row_that_no_table_takes_stops_no_other(
    log: AuditLog, bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    log.record(request("before"))
    log.record(request(**{"req_id": "bad"} | bad))
    log.record(request("after"))
    await log.flush()
    assert [row["req_id"] for row in rows(log.path)] == ["before", "after"]
    assert [record.code for record in caplog.records] == ["audit.bad_row"]  # type: ignore[attr-defined]


# -- reading -------------------------------------------------------------------------------------------------------


async def test_the_newest_come_first_and_can_be_chosen(log: AuditLog) -> None:
    for n in range(6):
        log.record(request(f"r{n}", ts=100.0 + n, status="error" if n % 2 else "ok"))
    await log.flush()
    reader = AuditReader({"a": log})
    assert [row["req_id"] for row in await reader.rows("a", limit=3)] == ["r5", "r4", "r3"]
    assert [row["req_id"] for row in await reader.rows("a", limit=9, status="ok")] == ["r4", "r2", "r0"]
    assert [row["req_id"] for row in await reader.rows("a", limit=9, since=103.0, status="error")] == ["r5", "r3"]
    assert await reader.rows("a", limit=9, status="'; DROP TABLE requests; --") == []
    assert json.dumps(await reader.rows("a", limit=9))


async def test_what_came_after_a_row_is_read_on_from_it(log: AuditLog) -> None:
    for req_id in "abcde":
        log.record(request(req_id))
    reader = AuditReader({"m": log})
    first = (await reader.rows("m", limit=10))[-2]
    assert first["req_id"] == "b"
    assert [each["req_id"] for each in await reader.rows("m", limit=2, after_id=first["id"])] == ["d", "c"]
    assert await reader.rows("m", limit=2, after_id=99) == []


async def test_a_file_that_is_no_audit_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "m.sqlite").write_bytes(b"no database at all " * 200)
    with pytest.raises(AuditUnavailable, match="no audit file"):
        await AuditReader({"m": AuditLog(tmp_path / "m.sqlite")}).rows("m", limit=1)


async def test_a_reader_sees_rows_while_the_writer_goes_on_and_after_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a.sqlite")
    reader = AuditReader({"a": log})
    log.record(request("r0"))
    assert len(await reader.rows("a", limit=9)) == 1
    log.record(request("r1"))
    assert len(await reader.rows("a", limit=9)) == 2
    await log.close()
    assert len(await reader.rows("a", limit=9)) == 2


async def test_no_file_and_no_table_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.sqlite").touch()
    reader = AuditReader({"a": AuditLog(tmp_path / "missing.sqlite"), "b": AuditLog(tmp_path / "empty.sqlite")})
    assert await reader.rows("a", limit=9) == []
    assert await reader.rows("b", limit=9) == []
    assert not (tmp_path / "missing.sqlite").exists()
    with pytest.raises(KeyError):
        await reader.rows("nobody", limit=9)


async def test_a_dead_disk_does_not_hold_the_reader(
    log: AuditLog, quick_retry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "_READ_WAIT_S", 0.01)
    log.path.mkdir()
    log.record(request())
    await fault(log)
    assert await AuditReader({"a": log}).rows("a", limit=9) == []
    log.path.rmdir()


async def test_a_path_with_signs_of_an_address(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "a?b#c %20.sqlite")
    log.record(request())
    await log.close()
    assert len(await AuditReader({"a": log}).rows("a", limit=9)) == 1
