"""The last things that happened, a line each; what repeats by the second is left out."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from infsvc.events import EventBus
from tui.wording import LogRecord, record_of

_TONES = {"info": "$muted", "warning": "$warning", "error": "$error"}


def _is_chatter(record: LogRecord) -> bool:
    """What llama.cpp and the broker say of themselves in passing; the Logs screen has it."""
    return record.level == "info" and record.code in ("llama", "broker.line")


class EventLines(Static):
    """`look()` reads the bus; the newest line stands first."""

    N_KEPT = 2

    def __init__(self, events: EventBus, *, id: str | None = None) -> None:
        super().__init__("", id=id)
        self._subscription = events.subscribe(size=200, replay=True)
        self._kept: list[LogRecord] = []

    def on_unmount(self) -> None:
        self._subscription.close()

    def look(self) -> None:
        records = [record_of(event) for event in self._subscription.drain()]
        told = [record for record in records if record.level != "debug" and not _is_chatter(record)]
        if not told and self._kept:
            return
        self._kept = [*self._kept, *told][-self.N_KEPT :]
        lines = [self._line(record) for record in reversed(self._kept)]
        self.update(
            Content("\n").join(lines) if lines else Content.styled("nothing has happened yet", "$muted"), layout=False
        )

    @staticmethod
    def _line(record: LogRecord) -> Content:
        return Content.assemble(
            (f"{record.at} ", "$muted"),
            (f"{record.level:<7} ", _TONES[record.level]),
            (f"{record.model}  " if record.model else "", "bold"),
            (f"{record.code}  ", "$muted"),
            (record.msg, ""),
        )
