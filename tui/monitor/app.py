"""The monitor: every model of every node on a broker, live, in one table.

It redraws four times a second from the roster that an onlooker keeps; what has not changed is not written again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Input, Static

from infsvc import board
from infsvc.onlooker import Onlooker
from tui.themes import DARK, LIGHT, Palette
from tui.widgets.key_line import KeyLine

_REDRAW_S = 0.25


class Detail(ModalScreen[None]):
    """Everything known of one model; any of the usual keys closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,enter,q", "dismiss", "back", id="detail.back")]
    DEFAULT_CSS = """
    Detail { align: center middle; }
    Detail > VerticalScroll {
        width: 90%; max-width: 90; height: auto; max-height: 90%;
        border: round $border; background: $panel; padding: 0 1;
    }
    Detail Static { width: 1fr; height: auto; }
    """

    def __init__(self, look: Callable[[], list[tuple[str, str]]]) -> None:
        super().__init__()
        self._look = look

    def compose(self) -> ComposeResult:
        with VerticalScroll():
            yield Static()

    def on_mount(self) -> None:
        self._redraw()
        self.set_interval(1.0, self._redraw)

    def _redraw(self) -> None:
        palette = Palette.of(self.app.theme_variables)
        text = Text()
        for name, value in self._look():
            text.append(f"{name:<13}", style=palette.muted)
            text.append(f"{value}\n")
        self.query_one(Static).update(text)


class Board(DataTable[Text]):
    """The table; Enter opens the model under the cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "select_cursor", "detail", id="monitor.detail")]


class MonitorApp(App[None]):
    """The table of all models on a broker.

    Args:
        onlooker: keeps the roster; the app runs it.
        shown_url: the broker's URL without user and password.
        clock: seconds since the epoch.
    """

    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit", id="app.quit"),
        Binding("ctrl+q,ctrl+c", "quit", show=False, priority=True, id="app.quit.always"),
        Binding("s", "sort", "sort", id="monitor.sort"),
        Binding("slash", "filter", "filter", key_display="/", id="monitor.filter"),
        Binding("t", "theme", "theme", id="monitor.theme"),
        Binding("escape", "leave_filter", show=False, id="monitor.back"),
    ]
    CSS = """
    Screen { background: $background; color: $foreground; }
    #head { height: 1; padding: 0 1; background: $panel; }
    #dead { height: 1; padding: 0 1; color: $error; display: none; }
    #note { height: 1fr; padding: 1 2; color: $muted; }
    DataTable { height: 1fr; background: $background; scrollbar-size-horizontal: 0; }
    DataTable > .datatable--header { background: $background; color: $muted; text-style: none; }
    #filter { height: 1; border: none; padding: 0 1; background: $panel; }
    """

    def __init__(self, onlooker: Onlooker, *, shown_url: str, clock: Callable[[], float] = time.time) -> None:
        super().__init__()
        self._onlooker, self._shown_url, self._clock = onlooker, shown_url, clock
        self._rows: list[board.Row] = []
        self._widths: dict[str, int] = {}
        self._written: dict[tuple[int, int], board.Cell] = {}
        self._keys: list[tuple[str, str, str]] = []
        self._dead = ""
        self.sort_by = board.SORTS[0]
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Board(cursor_type="row", cell_padding=0)
        yield Static(id="note")
        yield Static(id="dead")
        yield Input(placeholder="filter: model, @node, state, level, capability", id="filter")
        yield KeyLine()

    def on_mount(self) -> None:
        self.query_one("#filter").display = False
        self.query_one(DataTable).focus()
        self.run_worker(self._onlooker.run(), name="onlooker", group="bus", exclusive=True, exit_on_error=True)
        self.set_interval(_REDRAW_S, self.redraw)
        self.redraw()

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self.redraw)

    def redraw(self) -> None:
        """Shows the roster as it is now."""
        table, now_s = self._table, self._clock()
        width = self.size.width
        if not width:
            return
        self._head(now_s, width)
        filter_text = self._filter.value
        self._rows = board.rows(self._onlooker.roster, now_s, sort_by=self.sort_by, filter_text=filter_text)
        note = self._note(filter_text)
        self._static("#note").update(note)
        self._static("#note").display = bool(note)
        table.display = not note
        if (dead := board.dead_line(self._onlooker.roster)) != self._dead:
            self._dead = dead
            self._static("#dead").update(Text(dead, no_wrap=True))
            self._static("#dead").display = bool(dead)
        # One cell is the scrollbar's, so that it does not change the columns when it comes.
        widths = board.layout(width - 2)
        keys = [row.key for row in self._rows]
        if widths != self._widths or keys != self._keys:
            self._lay_out(table, widths, keys)
        palette = Palette.of(self.theme_variables)
        for line, row in enumerate(self._rows):
            for column, (key, room) in enumerate(widths.items()):
                cell = board.cell(row, key, room)
                if self._written.get((line, column)) != cell:
                    self._written[line, column] = cell
                    table.update_cell_at((line, column), _text(cell, palette))  # type: ignore[arg-type]

    def _lay_out(self, table: DataTable[Text], widths: dict[str, int], keys: list[tuple[str, str, str]]) -> None:
        """Builds columns and rows anew; the cursor stays on its model."""
        chosen = self._keys[table.cursor_row] if table.cursor_row < len(self._keys) else None
        table.clear(columns=True)
        for key, room in widths.items():
            table.add_column(Text(board.heading(key, room) + " ", no_wrap=True), width=room + 1, key=key)
        for each in keys:
            table.add_row(*(Text("") for _ in widths), key="\0".join(each))
        self._widths, self._keys, self._written = widths, keys, {}
        if chosen in keys:
            table.move_cursor(row=keys.index(chosen), animate=False)

    def _head(self, now_s: float, width: int) -> None:
        palette, onlooker = Palette.of(self.theme_variables), self._onlooker
        marks = {"connected": ("●", "success"), "connecting": ("◐", "warning"), "down": ("✕", "error")}
        mark, tone = marks[onlooker.state]
        left = Text(no_wrap=True)
        left.append("infsvc monitor  ", style=f"bold {palette.accent}")
        left.append(f"{self._shown_url} ")
        left.append(mark if onlooker.state == "connected" else f"{mark} {onlooker.state}", style=palette.colour(tone))
        left.append(f"  {board.headline(onlooker.roster, now_s)}")
        if self.sort_by != board.SORTS[0]:
            left.append(f"  by {self.sort_by}", style=palette.muted)
        told = datetime.fromtimestamp(now_s).astimezone().strftime("%H:%M:%S")
        room = width - 2 - left.cell_len - len(told)
        if room >= 1:
            left.append(" " * room + told, style=palette.muted)
        self._static("#head").update(left)

    def _note(self, filter_text: str) -> str:
        if self._rows:
            return ""
        if self._onlooker.state == "down":
            return f"{board.clean(self._onlooker.reason)}\n\nTrying again."
        if self._onlooker.state == "connecting":
            return "Connecting."
        if filter_text:
            return f"No model matches {board.clean(filter_text)}. Esc clears the filter."
        return "No node is on this broker. Start one with `infsvc serve` or `infsvc-tui`; it shows here by itself."

    @property
    def _table(self) -> DataTable[Text]:
        return self.screen_stack[0].query_one(DataTable)

    @property
    def _filter(self) -> Input:
        return self.screen_stack[0].query_one("#filter", Input)

    def _static(self, selector: str) -> Static:
        return self.screen_stack[0].query_one(selector, Static)

    def action_sort(self) -> None:
        self.sort_by = board.SORTS[(board.SORTS.index(self.sort_by) + 1) % len(board.SORTS)]
        self.redraw()

    def action_filter(self) -> None:
        self._filter.display = True
        self._filter.focus()

    def action_leave_filter(self) -> None:
        """Clears the filter and goes back to the table."""
        self._filter.value = ""
        self._filter.display = False
        self._table.focus()
        self.redraw()

    def action_theme(self) -> None:
        self.theme = LIGHT.name if self.theme == DARK.name else DARK.name
        self._written = {}
        self.redraw()

    def open_detail(self) -> None:
        line = self._table.cursor_row
        if not 0 <= line < len(self._keys):
            return
        key = self._keys[line]

        def look() -> list[tuple[str, str]]:
            found = [row for row in board.rows(self._onlooker.roster, self._clock()) if row.key == key]
            return board.detail(found[0]) if found else [("", "it has been forgotten")]

        self.push_screen(Detail(look))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        event.stop()
        self.open_detail()

    def on_input_changed(self, event: Input.Changed) -> None:
        self.redraw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._table.focus()


def _text(cell: board.Cell, palette: Palette) -> Text:
    text, tone = cell
    return Text(text + " ", style=palette.colour(tone), no_wrap=True, end="")
