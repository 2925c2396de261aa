"""One row of the audit log, as the engine's service writes it and storage keeps it.

The first columns are the wire contract's, in its order; those after `error` are additions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

AuditStatus = Literal["ok", "error", "cancelled", "rejected", "replayed"]


@dataclass(frozen=True, kw_only=True)
class RequestRow:
    """One request. `ts` is when it came, in seconds since the epoch; durations are milliseconds, `input_len`
    characters."""

    ts: float = field(default_factory=time.time)
    trace_id: str | None
    req_id: str
    worker_id: str
    source: str
    reply_to: str | None
    raw_input: str
    formatted_input: str | None
    input_len: int
    params_json: str
    grammar_used: str | None = None
    response_text: str | None
    tokens_in: int
    tokens_out: int
    dur_ms: float
    status: AuditStatus
    error: str | None
    finish_reason: str | None = None
    ttft_ms: float | None = None
    tokens_cached: int = 0
    reasoning: str | None = None


@dataclass(frozen=True, kw_only=True)
class EventRow:
    """One operational event. `meta` is JSON text."""

    ts: float = field(default_factory=time.time)
    level: str
    code: str
    msg: str
    meta: str | None = None


class AuditSink(Protocol):
    """Where the service puts its rows. Loop thread; neither call blocks or raises for a slow disk."""

    @property
    def unavailable(self) -> str | None:
        """Why new work must be refused (the disk takes no more rows), or None."""

    def record(self, row: RequestRow) -> None:
        """Takes a row over; it is on disk soon after, in order."""

    def event(self, row: EventRow) -> None:
        """Takes an event over."""

    async def written(self) -> None:
        """Waits until every row taken so far outlives this process."""

    async def flush(self) -> None:
        """Waits until every row taken so far is on disk; for ever while the disk takes none."""


def columns(row: RequestRow | EventRow) -> dict[str, Any]:
    """The row as column → value."""
    return {name: getattr(row, name) for name in row.__dataclass_fields__}
