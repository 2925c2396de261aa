"""The models of other nodes on the broker, a line each, below the node's own; nothing while there are none.

They are only heard of, so no key works on them: what they can do is asked over NATS.
"""

from __future__ import annotations

import time

from rich.text import Text
from textual.widgets import Static

from infsvc import board
from tui.node_view import RegistryView
from tui.themes import Palette

MAX_LINES = 6


class OtherNodes(Static):
    """`look()` brings it up to date."""

    DEFAULT_CSS = """
    OtherNodes { height: auto; color: $muted; text-wrap: nowrap; }
    """

    def __init__(self, registry: RegistryView, *, id: str | None = None) -> None:
        super().__init__("", id=id)
        self._registry = registry
        self.display = False

    def look(self, *, filter_text: str = "") -> None:
        """Shows who is there now, those that match first in order of name."""
        now_s = time.time()
        rows = board.rows(self._registry.roster, now_s, filter_text=filter_text)
        self.display = bool(rows)
        width = self.size.width or self.app.size.width
        if not rows or not width:
            return
        palette = Palette.of(self.app.theme_variables)
        fitting = rows if len(rows) <= MAX_LINES else rows[: MAX_LINES - 1]
        text = Text(no_wrap=True)
        for row in fitting:
            if text:
                text.append("\n")
            self._line(text, row, width, palette)
        if len(fitting) < len(rows):
            text.append(f"\n… {len(rows) - len(fitting)} more on other nodes: infsvc monitor", style=palette.muted)
        self.update(text)

    @staticmethod
    def _line(text: Text, row: board.Row, width: int, palette: Palette) -> None:
        """`model @node` in place of two columns, then what fits."""
        widths = board.layout(width)
        room = widths.pop("model") + widths.pop("node", -1) + 1
        name = f"{row.cells['model'][0]} @{row.cells['node'][0]}"
        text.append(board.fit(name, room) + " ")
        for key, cells in widths.items():
            shown, tone = board.cell(row, key, cells)
            text.append(shown + " ", style=palette.colour(tone))
