"""The monitor's table as text: a roster's models in rows, columns that fit a width, a headline; pure.

It stands apart because the full-screen monitor and the plain one, which needs no screen library, show the same. A tone
is one of `foreground, muted, success, warning, error`; the text alone carries the meaning.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from infsvc.roster import Roster, Sighting, uptime_ns
from infsvc.types import ServiceDocument

SORTS = ("name", "node", "state", "waiting", "tok/s", "rtt")

# Key → heading, width, right-aligned; in the order shown. One cell of space follows each.
_COLUMNS: dict[str, tuple[str, int, bool]] = {
    "model": ("MODEL", 14, False),
    "node": ("NODE", 8, False),
    "state": ("STATE", 10, False),
    "arch": ("ARCH", 10, False),
    "params": ("PARAMS", 6, True),
    "waiting": ("WAIT", 5, True),
    "active": ("ACT", 4, True),
    "capacity": ("CAP", 5, True),
    "level": ("LEVEL", 8, False),
    "tok/s": ("TOK/S", 6, True),
    "rtt": ("RTT", 7, True),
    "seen": ("SEEN", 5, True),
    "up": ("UP", 6, True),
}
# Added while they fit; the first group is always there.
_GROUPS = (
    ("model", "state", "waiting"),
    ("tok/s",),
    ("node",),
    ("level",),
    ("rtt",),
    ("seen",),
    ("active",),
    ("up",),
    ("params",),
    ("arch",),
    ("capacity",),
)
_MODEL_WIDTH_MAX, _NODE_WIDTH_MAX = 32, 16
_STATES = {
    "online": ("● online", "success"),
    "loading": ("◐ loading", "warning"),
    "draining": ("◌ draining", "warning"),
    "failed": ("✕ failed", "error"),
    "offline": ("○ offline", "muted"),
}
_LEVELS = {"healthy": "muted", "warning": "warning", "critical": "error"}
_STATE_ORDER = ("failed", "silent", "draining", "loading", "online", "offline")
# What steers a terminal, or reorders what stands beside it.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]")

Cell = tuple[str, str]


@dataclass(frozen=True)
class Row:
    """One model of one node. `cells` by column key: text and tone."""

    key: tuple[str, str, str]
    service: ServiceDocument
    silent: bool
    cells: dict[str, Cell]


def rows(roster: Roster, now_s: float, *, sort_by: str = SORTS[0], filter_text: str = "") -> list[Row]:
    """The rows of this moment, filtered and sorted."""
    found = [_row(sighting, now_s) for sighting in roster.sightings()]
    words = filter_text.lower().split()
    kept = [row for row in found if all(word in _searched(row) for word in words)]
    queue = {row.key: row.service.queue_metrics for row in kept}
    order = {
        "name": lambda row: (0.0, row.key),
        "node": lambda row: (0.0, (row.service.node, *row.key)),
        "state": lambda row: (_STATE_ORDER.index(_state_word(row)), row.key),
        "waiting": lambda row: (-queue[row.key].pending_messages, row.key),
        "tok/s": lambda row: (-(row.service.tokens_per_s or 0.0), row.key),
        "rtt": lambda row: (-(row.service.response_time_ms or 0.0), row.key),
    }[sort_by]
    return sorted(kept, key=order)


def headline(roster: Roster, now_s: float) -> str:
    """Nodes, models, tokens a second and waiting requests of all that is not silent."""
    services = [sighting.service(now_s) for sighting in roster.sightings() if not sighting.is_silent(now_s)]
    up = sum(service.status == "online" for service in services)
    pace = sum(service.tokens_per_s or 0.0 for service in services)
    waiting = sum(service.queue_metrics.pending_messages for service in services)
    n_nodes = len(roster.nodes())
    return f"{n_nodes} node{'' if n_nodes == 1 else 's'}  {up}/{len(services)} up  {pace:,.0f} tok/s  queue {waiting:,}"


def dead_line(roster: Roster) -> str:
    """What could not be answered, and where to look; "" when there is nothing."""
    n = roster.n_dead
    if not n:
        return ""
    said = "1 request could not be answered" if n == 1 else f"{n:,} requests could not be answered"
    return f"✕ {said}: `infsvc queue dead`, or Queue in the app"


def layout(width: int) -> dict[str, int]:
    """Column → width of what it shows in `width` cells, in the order shown."""
    chosen: set[str] = set()
    used = 0
    for group in _GROUPS:
        need = sum(_COLUMNS[key][1] + 1 for key in group)
        if chosen and used + need > width:
            break
        chosen |= set(group)
        used += need
    widths = {key: spec[1] for key, spec in _COLUMNS.items() if key in chosen}
    if used > width:
        widths["model"] = max(4, widths["model"] - (used - width))
    for key, most in (("model", _MODEL_WIDTH_MAX), ("node", _NODE_WIDTH_MAX)):
        if key in widths and width > used:
            wider = min(width - used, most - widths[key])
            widths[key] += wider
            used += wider
    return widths


def heading(key: str, width: int) -> str:
    """A column's heading in its place."""
    return fit(_COLUMNS[key][0], width, right=_COLUMNS[key][2])


def cell(row: Row, key: str, width: int) -> Cell:
    """A cell's text in its place, and its tone."""
    text, tone = row.cells[key]
    return fit(text, width, right=_COLUMNS[key][2]), tone


def detail(row: Row) -> list[tuple[str, str]]:
    """Everything known of a model, as names and values."""
    service, info = row.service, row.service.model_info
    pressure, queue = service.backpressure_status, service.queue_metrics
    facts = [
        ("model", service.model_name),
        ("node", f"{service.node}, up {row.cells['up'][0]}, version {service.version}"),
        ("state", row.cells["state"][0] + (f": {service.reason}" if service.reason else "")),
        ("capabilities", ", ".join(service.capabilities) or "none"),
    ]
    if info is not None:
        facts += [
            ("file", f"{info.architecture}, {info.parameter_count} parameters, {info.quantization}"),
            ("context", f"{info.context_size:,} tokens, embeddings of {info.embedding_size:,}"),
        ]
    facts += [
        ("queue", f"{queue.pending_messages:,} of {queue.queue_capacity:,} waiting, {queue.active_processing} active"),
        ("level", f"{pressure.level}, {pressure.utilization:.1%} used, threshold {pressure.threshold}"),
        ("processed", f"{queue.total_processed:,}, last {service.last_activity or 'never'}"),
        ("http", service.endpoint or "–"),
        ("nats", service.nats_topic),
        ("seen", f"first {service.first_seen}, last {service.last_seen}"),
    ]
    return [(name, clean(value)) for name, value in facts]


def clean(text: str) -> str:
    """Foreign text without what steers a terminal."""
    return _CONTROL.sub("", text)


def fit(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly `width` cells; what is too long ends in `…`."""
    if _cells(text) > width:
        while text and _cells(text) > width - 1:
            text = text[:-1]
        text += "…"
    padding = " " * (width - _cells(text))
    return padding + text if right else text + padding


def _cells(text: str) -> int:
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def _row(sighting: Sighting, now_s: float) -> Row:
    service, silent = sighting.service(now_s), sighting.is_silent(now_s)
    info, queue = service.model_info, service.queue_metrics
    state, tone = ("✕ silent", "error") if silent else _STATES.get(service.status, (service.status, "foreground"))
    if service.progress is not None and service.status == "loading":
        state = f"◐ load {service.progress:>3.0%}"
    # Figures of a model that is away are those of another time.
    away = silent or service.status == "offline"
    level = service.backpressure_status.level
    up_s = uptime_ns(service.start_time, now_s) / 1e9
    cells: dict[str, Cell] = {
        "model": (clean(service.model_name), "foreground"),
        "node": (clean(service.node), "foreground"),
        "state": (clean(state), tone),
        "arch": (clean(info.architecture) if info else "–", "foreground"),
        "params": (clean(info.parameter_count) if info else "–", "foreground"),
        "waiting": (f"{queue.pending_messages}", _LEVELS[level] if queue.pending_messages else "foreground"),
        "active": (f"{queue.active_processing}", "foreground"),
        "capacity": (f"{queue.queue_capacity}", "muted"),
        "level": (level, _LEVELS[level]),
        "tok/s": (_rate(service.tokens_per_s), "foreground"),
        "rtt": (_milliseconds(service.response_time_ms), "foreground"),
        "seen": (age(now_s - sighting.last_seen_s), "error" if silent else "muted"),
        "up": (age(up_s), "muted"),
    }
    if away:
        cells |= dict.fromkeys(("waiting", "active", "capacity", "level", "tok/s", "rtt", "up"), ("–", "muted"))
    return Row(sighting.key, service, silent, cells)


def _searched(row: Row) -> str:
    service = row.service
    arch = service.model_info.architecture if service.model_info else ""
    return " ".join(
        (service.model_name, f"@{service.node}", _state_word(row), row.cells["level"][0], arch, *service.capabilities)
    ).lower()


def _state_word(row: Row) -> str:
    return "silent" if row.silent else row.service.status if row.service.status in _STATES else "offline"


def _rate(tokens_per_s: float | None) -> str:
    if not tokens_per_s:
        return "–"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 10 else f"{tokens_per_s:.0f}"


def _milliseconds(ms: float | None) -> str:
    if ms is None:
        return "–"
    return f"{ms:.1f} ms" if ms < 10 else f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1000:.0f} s"


def age(seconds: float) -> str:
    """A time span in five cells: 0.4s, 42s, 12m, 2h11m, 3d4h."""
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    if seconds < 100:
        return f"{seconds:.0f}s"
    minutes = int(seconds // 60)
    if minutes < 100:
        return f"{minutes}m"
    hours = minutes // 60
    return f"{hours}h{minutes % 60:02}m" if hours < 48 else f"{hours // 24}d{hours % 24}h"
