"""How states, figures and events read on the screen: pure functions from values to short text and a tone.

A tone is one of `foreground, muted, accent, success, warning, error`; widgets turn it into a colour. The text alone
carries the meaning, so that nothing is lost without colour.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from infsvc.events import (
    Alert,
    BrokerStateChanged,
    DeadLettersChanged,
    Event,
    LogLine,
    ModelProgress,
    ModelStateChanged,
    QueueReported,
    RequestFinished,
    RequestStarted,
    ServiceHealth,
)
from infsvc.types import ModelState, ServiceDocument, human_count
from tui.node_view import WorkerView

# C0 without tab and newline, DEL and C1: text of models, files and brokers must not steer the terminal. Bidirectional
# overrides would reorder what stands beside them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_BARS = "▁▂▃▄▅▆▇█"

LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Shown:
    """A glyph, a word and the tone of both."""

    glyph: str
    word: str
    tone: str

    def __str__(self) -> str:
        return f"{self.glyph} {self.word}"


def clean(text: str) -> str:
    """The text without characters that steer a terminal."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def state_of(worker: WorkerView) -> Shown:
    """A model's state; a ready model with running requests is busy. At most 14 cells."""
    state = worker.state
    if state is ModelState.READY:
        if worker.n_active:
            return Shown("●", f"busy {worker.n_active}/{worker.n_slots}", "success")
        return Shown("●", "ready", "success")
    if state in (ModelState.LOADING, ModelState.DOWNLOADING, ModelState.VERIFYING):
        word = {ModelState.LOADING: "loading", ModelState.DOWNLOADING: "pull"}.get(state, "verify")
        percent = "" if worker.progress is None else f" {min(99, int(worker.progress * 100)):>2} %"
        return Shown("◐", word + percent, "warning")
    if state is ModelState.FAILED:
        return Shown("✕", "failed", "error")
    if state is ModelState.DRAINING:
        return Shown("◌", "draining", "warning")
    return Shown("○", "absent" if state is ModelState.ABSENT else "on disk", "muted")


def far_state(service: ServiceDocument) -> Shown:
    """The same of a model of another node, as far as that tells it."""
    if service.status == "online":
        n_active = service.queue_metrics.active_processing
        if n_active:
            return Shown("●", f"busy {n_active}/{service.worker_count or '?'}", "success")
        return Shown("●", "ready", "success")
    if service.status == "loading":
        percent = "" if service.progress is None else f" {min(99, int(service.progress * 100)):>2} %"
        return Shown("◐", "loading" + percent, "warning")
    known = {"draining": Shown("◌", "draining", "warning"), "failed": Shown("✕", "failed", "error")}
    return known.get(service.status, Shown("○", "offline", "muted"))


def pull_pace(worker: WorkerView) -> str:
    """Rate and time left of a download, or "": 48.0 MiB/s 2 min. At most 18 cells."""
    pull = worker.pull
    if pull is None or pull.bytes_per_s is None:
        return ""
    left = f" {time_left(pull.eta_s)}" if pull.eta_s is not None else ""
    return f"{size(pull.bytes_per_s)}/s{left}"


def time_left(seconds: float) -> str:
    """A time that is left: 8 s, 4 min, 2 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{min(999, seconds / 3600):.0f} h"


def level_mark(level: str) -> Shown:
    """The backpressure level: `▲` warning, `■` critical, nothing while healthy."""
    marks = {"warning": Shown("▲", "warning", "warning"), "critical": Shown("■", "critical", "error")}
    return marks.get(level, Shown(" ", "healthy", "muted"))


def sparkline(values: Sequence[float], width: int, *, ceiling: float = 0.0) -> str:
    """The last `width` values as bars, the highest at the larger of their maximum and `ceiling`."""
    last = list(values[-width:])
    top = max([*last, ceiling])
    if not last:
        return " " * width
    bars = "".join(_BARS[min(7, round(value / top * 7))] if top else _BARS[0] for value in last)
    return bars.rjust(width)


def rate(tokens_per_s: float) -> str:
    """Tokens a second, with as many digits as say something: 0.8, 31, 1,980."""
    if tokens_per_s < 0.05:
        return "0"
    return f"{tokens_per_s:.1f}" if tokens_per_s < 10 else f"{tokens_per_s:,.0f}"


def duration(ms: float) -> str:
    """A time span: 4 ms, 1.2 s, 3 min."""
    if ms < 1000:
        return f"{ms:.0f} ms"
    return f"{ms / 1000:.1f} s" if ms < 60_000 else f"{ms / 60_000:.0f} min"


def span(values: Iterable[float]) -> str:
    """Percentiles as one figure with one unit: 120/210 ms, 1.2/2.9 s."""
    numbers = list(values)
    if max(numbers) < 1000:
        return "/".join(f"{value:.0f}" for value in numbers) + " ms"
    return "/".join(f"{value / 1000:.1f}" for value in numbers) + " s"


def size(n_bytes: float) -> str:
    """A size in bytes: 3.1 GiB, 640.0 MiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 1000 * 2**20 else f"{n_bytes / 2**20:.1f} MiB"


def gauge(fraction: float, width: int = 8) -> str:
    """A bar such as ▓▓░░░░░░; anything above nothing shows one block."""
    full = min(width, max(1 if fraction > 0 else 0, round(fraction * width)))
    return "▓" * full + "░" * (width - full)


def hang(text: str, indent: int, width: int) -> str:
    """The text wrapped to `width` cells, its further lines set under its beginning `indent` cells in."""
    room = max(12, width - indent)
    lines = [piece for line in text.splitlines() for piece in (textwrap.wrap(line, room) or [""])]
    return ("\n" + " " * indent).join(lines)


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def params_of(worker: WorkerView) -> str:
    return human_count(worker.info.n_params) if worker.info else "–"


@dataclass(frozen=True)
class LogRecord:
    """One line of the log as it is shown, filtered and coloured. `ts` is seconds since the epoch."""

    ts: float
    level: str
    model: str
    code: str
    msg: str

    @property
    def at(self) -> str:
        """The time of day on the reader's own clock."""
        return datetime.fromtimestamp(self.ts).strftime("%H:%M:%S")  # noqa: DTZ006

    def line(self, *, aligned: bool) -> str:
        """The whole line; aligned in columns where there is room for that."""
        model, code = self.model or "–", self.code
        if aligned:
            model, code = f"{model:<16}", f"{code:<16}"
        return f"{self.at} {self.level:<7} {model} {code} {self.msg}"

    @property
    def searched(self) -> str:
        """What a search looks into: the line as it reads, in lower case."""
        return f"{self.level} {self.model} {self.code} {self.msg}".lower()


def record_of(event: Event) -> LogRecord:
    """Any event as a line of the log. What repeats by the second is `debug`."""
    level, code, msg = _told(event)
    level = "warning" if level in ("warn", "critical") else level if level in LEVELS else "info"
    # One event is one line: a line break inside would make the rest look like another event.
    return LogRecord(event.ts, level, clean(event.model or ""), clean(code), " ⏎ ".join(clean(msg).splitlines()))


def _told(event: Event) -> tuple[str, str, str]:
    match event:
        case LogLine():
            figures = " ".join(f"{key}={value}" for key, value in (event.meta or {}).items())
            return event.level, event.code, f"{event.msg}  {figures}" if figures else event.msg
        case ModelStateChanged():
            word = event.state.value.replace("_", " ")
            # The node writes a line of its own for each change; this one is for those who want every event.
            return "debug", event.type, f"{word}: {event.reason}" if event.reason else word
        case ModelProgress():
            percent = 100 * event.done_bytes / event.total_bytes if event.total_bytes else 0
            pace = f"  {size(event.bytes_per_s)}/s" if event.bytes_per_s else ""
            return "debug", event.type, f"{percent:.0f} % of {size(event.total_bytes)}{pace}"
        case RequestStarted():
            return "debug", event.type, f"{event.req_id}  {event.source}  {event.tokens_in} tokens in"
        case RequestFinished():
            first = f"  first {duration(event.ttft_ms)}" if event.ttft_ms is not None else ""
            level = "warning" if event.finish_reason == "error" else "info"
            return (
                level,
                event.type,
                (
                    f"{event.req_id}  {event.source}  {event.finish_reason}  {event.tokens_in} in  "
                    f"{event.tokens_out} out{first}  {duration(event.duration_ms)}"
                ),
            )
        case BrokerStateChanged():
            owner = " embedded" if event.embedded else ""
            reason = f": {event.reason}" if event.reason else ""
            retry = f", retry in {event.retry_in_s:.0f} s" if event.retry_in_s is not None else ""
            return (
                "error" if event.state == "down" else "info",
                event.type,
                f"{event.state}{owner} {event.url}{reason}{retry}",
            )
        case Alert():
            return event.level, event.type, event.msg
        case QueueReported():
            report = event.report
            return (
                "debug",
                event.type,
                f"{report.get('pending_messages')} waiting, {report.get('active_processing')} active",
            )
        case DeadLettersChanged():
            return "debug", event.type, plural(event.n_kept, "dead letter")
        case ServiceHealth():
            return "debug", event.type, str(event.document.get("status", ""))
        case _:
            return "debug", event.type, json.dumps(event.wire(), default=str)
