"""Screen 5, Logs: what happens on the node, a line each, with a least level, a search, and following the end or not."""

from __future__ import annotations

from collections import deque
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Input, Static

from tui.context import Context
from tui.screens.base import NodeScreen
from tui.widgets.log_view import MAX_LINES, LogView
from tui.wording import LEVELS, LogRecord, plural, record_of

ALIGNED_COLUMNS = 110


class LogsScreen(NodeScreen):
    NAME = "logs"
    LOOK_EVERY_S = 0.2
    CSS_PATH = "logs.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("v", "level", "level", id="logs.level", tooltip="Show from debug, info, warning or error on, in turn"),
        Binding(
            "slash",
            "search",
            "search",
            key_display="/",
            id="logs.search",
            tooltip="Show only lines that contain a text",
        ),
        Binding("f", "follow", "follow", id="logs.follow", tooltip="Follow the newest line, or stay where you are"),
        Binding("escape", "back", "back", show=False, id="logs.back", tooltip="Close the search"),
    ]

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        # Read from the start on, so that nothing is missed before the screen is first seen.
        self._subscription = self.node.events.subscribe(size=MAX_LINES, replay=True)
        self._records: deque[LogRecord] = deque(maxlen=MAX_LINES)
        self._level, self._wanted, self._follow = "info", "", True
        self._n_hidden = 0
        self._aligned = True

    def compose_body(self) -> ComposeResult:
        with Vertical(id="lines", classes="-empty"):
            yield LogView()
            yield Static("", id="nothing")
        yield Input(placeholder="text to look for", id="search", compact=True)

    def on_mount(self) -> None:
        self.query_one("#search", Input).cursor_blink = self.context.animate
        self.query_one(LogView).focus()

    def on_unmount(self) -> None:
        self._subscription.close()

    def on_resize(self, event: events.Resize) -> None:
        aligned = event.size.width >= ALIGNED_COLUMNS
        if aligned != self._aligned:
            self._aligned = aligned
            self._refilter()

    def look(self) -> None:
        records = [record_of(event) for event in self._subscription.drain()]
        if records:
            self._records.extend(records)
            self._write(records)
        self._tell()

    def _shows(self, record: LogRecord) -> bool:
        return LEVELS.index(record.level) >= LEVELS.index(self._level) and (
            not self._wanted or self._wanted in record.searched
        )

    def _write(self, records: list[LogRecord]) -> None:
        lines = [record.line(aligned=self._aligned) for record in records if self._shows(record)]
        self._n_hidden += len(records) - len(lines)
        if lines:
            # Before the pane is seen for the first time it has no size and would not scroll by itself.
            self.query_one("#lines").remove_class("-empty")
            self.query_one(LogView).write_lines(lines, scroll_end=self._follow)

    def _refilter(self) -> None:
        view = self.query_one(LogView)
        view.clear()
        view.search(self._wanted)
        self._n_hidden = 0
        self.query_one("#lines").add_class("-empty")
        self._write(list(self._records))
        if self._follow:
            view.scroll_end(animate=False)
        self._tell()

    def _tell(self) -> None:
        n_shown = self.query_one(LogView).line_count
        self._say_when_empty(n_shown)
        # What matters most comes first: a narrow screen shows only that.
        parts = ["following" if self._follow else "not following"]
        if self._subscription.n_lost:
            parts.append(f"{self._subscription.n_lost:,} lost")
        parts += [f"from {self._level} on", plural(n_shown, "line")]
        if self._n_hidden:
            parts.append(f"{self._n_hidden:,} hidden")
        self.tell(" · ".join(parts))

    def _say_when_empty(self, n_shown: int) -> None:
        if n_shown:
            return
        if self._records:
            of_text = f" and “{self._wanted}” in it" if self._wanted else ""
            hidden = plural(len(self._records), "line")
            told = f"No line from {self._level} on{of_text}; {hidden} hidden.\n\nv shows other levels, esc clears."
        else:
            told = (
                "Nothing has been logged yet.\n\n"
                "Models that load, requests that end, the broker's state and llama.cpp's own lines will appear here."
            )
        self.query_one("#nothing", Static).update(Content(told))

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "search":
            event.stop()
            self._wanted = event.value.strip().lower()
            self._refilter()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id == "search":
            event.stop()
            self.query_one("#search").set_class(bool(event.value.strip()), "-open")
            self.query_one(LogView).focus()

    def action_level(self) -> None:
        self._level = LEVELS[(LEVELS.index(self._level) + 1) % len(LEVELS)]
        self._refilter()

    def action_search(self) -> None:
        field = self.query_one("#search", Input)
        field.add_class("-open")
        field.focus()

    def action_back(self) -> None:
        field = self.query_one("#search", Input)
        field.value = ""
        field.remove_class("-open")
        self.query_one(LogView).focus()

    def action_follow(self) -> None:
        self._follow = not self._follow
        if self._follow:
            self.query_one(LogView).scroll_end(animate=False)
        self._tell()
