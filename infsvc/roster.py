"""Who is on the bus: every node's models as their heartbeats, reports and health replies tell of them.

Pure: bytes and clock in, service documents out. It stands apart because a node's registry, the client and the monitor
keep the same book, two of them without a server installed. What is heard is foreign: a message that is no document is
counted and passed over, and the book has a limit.

    heard of → online, loading, … as it says itself → silent after `SILENT_S` → forgotten after `FORGOTTEN_S`

A node that ends well says so (`offline`); one that was killed is told by its silence. A row is one model of one start
of one node, so two nodes with one name stay two rows, and a restarted one leaves none behind.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from infsvc.types import BackpressureReport, HealthDocument, ServiceDocument

HEARTBEAT_S = 30.0
"""How often a node speaks of each model when nothing changes."""

SILENT_S = 2.5 * HEARTBEAT_S
FORGOTTEN_S = 600.0
PROBE_S = 10.0
"""How often an onlooker asks each model, for its response time."""

_REPLACED_S = 1.5 * PROBE_S
"""An earlier start of a node that is not heard of for this long has been replaced by the later one."""
_LIMIT = 4096

Key = tuple[str, str, str]


@dataclass
class Sighting:
    """One model of one node. Times are seconds since the epoch, by the onlooker's clock."""

    document: HealthDocument
    first_seen_s: float
    last_seen_s: float
    report: BackpressureReport | None = None
    response_time_ms: float | None = None
    report_is_newer: bool = False

    @property
    def key(self) -> Key:
        document = self.document
        return (document.model_name, document.node, document.start_time)

    def is_silent(self, now_s: float) -> bool:
        """Whether it has said nothing for two and a half heartbeats, and no farewell before."""
        return self.document.status != "offline" and now_s - self.last_seen_s > SILENT_S

    def service(self, now_s: float) -> ServiceDocument:
        """The service document. Of a silent model the status is `offline` with the silence as its reason."""
        document, report = self.document, self.report
        fields = document.model_dump()
        if report is not None:
            fields["worker_count"] = report.worker_count
            fields["tokens_per_s"] = report.tokens_per_s
            if self.report_is_newer:
                capacity = max(1, report.queue_capacity)
                fields["queue_metrics"] |= {
                    "pending_messages": report.pending_messages,
                    "active_processing": report.active_processing,
                    "queue_capacity": report.queue_capacity,
                }
                fields["backpressure_status"] |= {
                    "level": report.status,
                    "utilization": round(report.pending_messages / capacity, 4),
                }
        if self.is_silent(now_s):
            fields |= {
                "status": "offline",
                "reason": f"{document.node} has been silent for {now_s - self.last_seen_s:.0f} s",
                "tokens_per_s": None,
            }
        return ServiceDocument(
            **fields,
            first_seen=iso(self.first_seen_s),
            last_seen=iso(self.last_seen_s),
            uptime=uptime_ns(document.start_time, now_s),
            response_time_ms=self.response_time_ms,
        )


class Roster:
    """The book. One thread at a time.

    Args:
        ignore: node name and start time whose models are not noted: the onlooker's own.
        clock: seconds since the epoch.

    Attributes:
        n_ignored: messages that were no document, or came when the book was full.
    """

    def __init__(self, *, ignore: tuple[str, str] | None = None, clock: Callable[[], float] = time.time) -> None:
        self._ignore, self._clock = ignore, clock
        self._sightings: dict[Key, Sighting] = {}
        self._dead: tuple[int, float] | None = None
        self.n_ignored = 0

    def hear_health(self, data: bytes, *, response_time_ms: float | None = None) -> Sighting | None:
        """Notes a health document; the sighting, or None when it is none or the onlooker's own."""
        try:
            document = HealthDocument.model_validate_json(data)
        except ValidationError:
            self.n_ignored += 1
            return None
        if (document.node, document.start_time) == self._ignore:
            return None
        now_s = self._clock()
        found = self._sightings.get((document.model_name, document.node, document.start_time))
        if found is None:
            self._tidy(now_s)
            if len(self._sightings) >= _LIMIT:
                self.n_ignored += 1
                return None
            found = Sighting(document, now_s, now_s)
            self._sightings[found.key] = found
        found.document, found.last_seen_s, found.report_is_newer = document, now_s, False
        if response_time_ms is not None:
            found.response_time_ms = response_time_ms
        return found

    def hear_report(self, data: bytes) -> Sighting | None:
        """Notes a backpressure report of a model that is known; the sighting, or None."""
        try:
            report = BackpressureReport.model_validate_json(data)
        except ValidationError:
            self.n_ignored += 1
            return None
        same = [
            sighting
            for (model, node, _), sighting in self._sightings.items()
            if model == report.model_name and node == report.node
        ]
        if not same:
            return None
        # A report names no start: it is the latest one's.
        found = max(same, key=lambda sighting: sighting.document.start_time)
        found.report, found.report_is_newer, found.last_seen_s = report, True, self._clock()
        return found

    def hear_totals(self, data: bytes) -> None:
        """Notes a node's totals, for what it says of the whole broker."""
        try:
            n_dead = json.loads(data).get("dead_letters")
        except (ValueError, AttributeError):
            self.n_ignored += 1
            return
        if type(n_dead) is int and n_dead >= 0:
            self._dead = n_dead, self._clock()

    @property
    def n_dead(self) -> int | None:
        """Dead letters that the broker keeps, as a node last told; None when none has for long."""
        if self._dead is None or self._clock() - self._dead[1] > SILENT_S:
            return None
        return self._dead[0]

    def sightings(self) -> list[Sighting]:
        """Every model that is not forgotten, by name and node."""
        self._tidy(self._clock())
        return [self._sightings[key] for key in sorted(self._sightings)]

    def services(self) -> list[ServiceDocument]:
        """The same as service documents of this moment."""
        now_s = self._clock()
        return [sighting.service(now_s) for sighting in self.sightings()]

    def models(self) -> list[str]:
        """The names of all models, each once."""
        return sorted({model for model, _, _ in self._sightings})

    def nodes(self) -> list[str]:
        """The names of all nodes that are heard of, each once."""
        now_s = self._clock()
        return sorted({each.document.node for each in self._sightings.values() if not each.is_silent(now_s)})

    def namesakes(self) -> set[str]:
        """Names that several nodes go by at this moment."""
        starts: dict[str, set[str]] = {}
        for sighting in self.sightings():
            if not sighting.is_silent(self._clock()) and sighting.document.status != "offline":
                starts.setdefault(sighting.document.node, set()).add(sighting.document.start_time)
        return {node for node, known in starts.items() if len(known) > 1}

    def _tidy(self, now_s: float) -> None:
        latest: dict[tuple[str, str], str] = {}
        for model, node, start in self._sightings:
            latest[model, node] = max(start, latest.get((model, node), ""))
        for (model, node, start), sighting in list(self._sightings.items()):
            quiet_s = now_s - sighting.last_seen_s
            gone = quiet_s > _REPLACED_S or sighting.document.status == "offline"
            if quiet_s > FORGOTTEN_S or (gone and start < latest[model, node]):
                del self._sightings[model, node, start]


def busy(service: ServiceDocument, n_more: int = 0) -> float:
    """Running and waiting requests for each sequence that the model decodes at once; `n_more` are not reported yet."""
    queue = service.queue_metrics
    return (queue.pending_messages + queue.active_processing + n_more) / max(1, service.worker_count or 1)


def least_loaded(services: list[ServiceDocument], *, capability: str) -> ServiceDocument | None:
    """The model that has the most room: online, with that capability, and the least `busy`. Equal ones by the shortest
    response time, then by name."""
    able = [each for each in services if each.status == "online" and capability in each.capabilities]

    def load(service: ServiceDocument) -> tuple[float, float, str]:
        return (busy(service), service.response_time_ms or 0.0, service.model_name)

    return min(able, key=load, default=None)


def roomiest(
    services: Iterable[ServiceDocument], *, n_more: Callable[[ServiceDocument], int] = lambda _: 0
) -> list[ServiceDocument]:
    """Those that are online, the least `busy` first, equal ones in an order that is drawn anew each time: whoever asks
    at the same moment should not all ask the same node.

    Args:
        n_more: how many requests a node has been sent since it last told of itself.
    """
    online = [each for each in services if each.status == "online"]
    random.shuffle(online)
    return sorted(online, key=lambda each: busy(each, n_more(each)))


def iso(ts: float) -> str:
    """Seconds since the epoch as RFC 3339, in UTC and milliseconds."""
    return datetime.fromtimestamp(ts, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def uptime_ns(start_time: str, now_s: float) -> int:
    """Nanoseconds since a node's start; 0 when its clock is ahead or its time is none."""
    try:
        started_s = datetime.fromisoformat(start_time).timestamp()
    except (ValueError, OverflowError):
        return 0
    return max(0, round((now_s - started_s) * 1e9))
