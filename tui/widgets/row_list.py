"""A list of any length, of which only the rows in sight are drawn: ten thousand rows cost as much as twenty.

It stands beside `CapabilityMatrix`, whose rows are few and whose cells change by the second: here the rows are given
anew and the cursor stays on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.messages import RowHighlighted, RowOpened
from tui.themes import Palette

Row = TypeVar("Row")
Cell = tuple[str, str]
"""A text and its tone."""


@dataclass(frozen=True)
class Column:
    """A heading above `width` cells; `grows` takes what is left of the line."""

    key: str
    heading: str
    width: int
    right: bool = False
    grows: bool = False


class RowList(ScrollView, Generic[Row], can_focus=True):
    """Posts `RowHighlighted` and `RowOpened`; `show()` gives it its rows.

    Args:
        columns: those that fit a width in cells.
        key: what tells a row from another, also when it comes again.
        cells: column key → text and tone of a row.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", show=False),
        Binding("down,j", "move(1)", show=False),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("home", "move(-1_000_000)", show=False),
        Binding("end", "move(1_000_000)", show=False),
    ]
    COMPONENT_CLASSES: ClassVar[set[str]] = {"row-list--header", "row-list--cursor"}
    ALLOW_SELECT = False
    DEFAULT_CSS = """
    RowList {
        background: $background;
        color: $foreground;
        scrollbar-size-vertical: 1;
        scrollbar-size-horizontal: 0;
        overflow-x: hidden;
        & > .row-list--header { color: $muted; background: $background; }
        & > .row-list--cursor {
            background: $block-cursor-blurred-background;
            color: $block-cursor-blurred-foreground;
        }
        &:focus > .row-list--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    }
    """

    def __init__(
        self,
        columns: Callable[[int], Sequence[Column]],
        *,
        key: Callable[[Row], Hashable],
        cells: Callable[[Row], dict[str, Cell]],
        id: str,
    ) -> None:
        super().__init__(id=id)
        self._columns_of, self._key, self._cells = columns, key, cells
        self._rows: Sequence[Row] = ()
        self._columns: list[tuple[Column, int]] = []
        self.cursor = 0

    @property
    def rows(self) -> Sequence[Row]:
        return self._rows

    @property
    def chosen(self) -> Row | None:
        """The row under the cursor."""
        return self._rows[self.cursor] if self._rows else None

    def show(self, rows: Sequence[Row]) -> None:
        """Takes new rows; the cursor stays on its row, or where that was."""
        before = self.chosen
        wanted = None if before is None else self._key(before)
        self._rows = rows
        self.virtual_size = Size(self.size.width, len(rows) + 1)
        # Most often it has not moved: the whole list is searched only when it has.
        if wanted is not None and not (self.cursor < len(rows) and self._key(rows[self.cursor]) == wanted):
            self.cursor = next((n for n, row in enumerate(rows) if self._key(row) == wanted), self.cursor)
        self.cursor = max(0, min(self.cursor, len(rows) - 1))
        self._keep_in_sight()
        self.refresh()
        if (None if self.chosen is None else self._key(self.chosen)) != wanted:
            self.post_message(RowHighlighted(self.id or ""))

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda _: self.refresh())

    def on_resize(self) -> None:
        self._columns = []
        self.virtual_size = Size(self.size.width, len(self._rows) + 1)
        self._keep_in_sight()
        self.refresh()

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def _keep_in_sight(self) -> None:
        # The heading stays in the first line, so a row has one line less.
        region = Region(0, self.cursor, 1, 2)
        if self.size.height > 1 and not self.window_region.contains_region(region):
            self.scroll_to_region(region, animate=False, immediate=True, force=True)

    def action_move(self, n: int) -> None:
        cursor = max(0, min(self.cursor + n, len(self._rows) - 1))
        if cursor != self.cursor:
            self.cursor = cursor
            self._keep_in_sight()
            self.refresh()
            self.post_message(RowHighlighted(self.id or ""))

    def action_page(self, direction: int) -> None:
        self.action_move(direction * max(1, self.size.height - 2))

    def on_click(self, event: events.Click) -> None:
        event.stop()
        index = int(self.scroll_y) + event.y - 1
        if event.y > 0 and index < len(self._rows):
            if index == self.cursor:
                self.post_message(RowOpened(self.id or ""))
            else:
                self.action_move(index - self.cursor)

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        base = self.rich_style
        columns = self._fitted(width)
        if y == 0:
            style = self.get_component_rich_style("row-list--header")
            shown = [(column, cells, (column.heading, "")) for column, cells in columns]
            return self._line(shown, style, None, width)
        index = int(self.scroll_y) + y - 1
        if index >= len(self._rows):
            return Strip.blank(width, base)
        told = self._cells(self._rows[index])
        shown = [(column, cells, told[column.key]) for column, cells in columns]
        if index == self.cursor:
            return self._line(shown, self.get_component_rich_style("row-list--cursor"), None, width)
        return self._line(shown, base, Palette.of(self.app.theme_variables), width)

    def _fitted(self, width: int) -> list[tuple[Column, int]]:
        if not self._columns and width:
            columns = self._columns_of(width)
            spare = width - sum(column.width + 1 for column in columns)
            growing = [column for column in columns if column.grows]
            self._columns = [
                (column, max(1, column.width + (spare // len(growing) if column.grows else 0))) for column in columns
            ]
        return self._columns

    @staticmethod
    def _line(shown: Sequence[tuple[Column, int, Cell]], style: Style, palette: Palette | None, width: int) -> Strip:
        segments = []
        for column, cells, (text, tone) in shown:
            colour = Style(color=palette.colour(tone)) if palette is not None and tone else Style.null()
            segments.append(Segment(_fitting(text, cells, right=column.right) + " ", style + colour))
        return Strip(segments).adjust_cell_length(width, style)


def _fitting(text: str, width: int, *, right: bool) -> str:
    """The text in exactly `width` cells."""
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…"
    return " " * (width - cell_len(text)) + text if right else set_cell_size(text, width)
