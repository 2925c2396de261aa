"""The log's lines, the last ten thousand of them, with the level and what is searched for picked out in colour."""

from __future__ import annotations

import re

from rich.highlighter import Highlighter
from rich.text import Text
from textual.geometry import Size
from textual.widgets import Log

from tui.themes import Palette

MAX_LINES = 10_000
_MODEL_AND_CODE = re.compile(r"(\S+)\s+(\S+)")


class LevelHighlighter(Highlighter):
    """Colours a line by the level that stands in it at a fixed place."""

    def __init__(self) -> None:
        self.palette: Palette | None = None
        self.searched = ""

    def highlight(self, text: Text) -> None:
        palette = self.palette
        if palette is None:
            return
        text.stylize(palette.muted, 0, 8)
        level = text.plain[9:16].strip()
        colour = {"error": palette.error, "warning": palette.warning, "debug": palette.muted}.get(level)
        text.stylize(colour or palette.muted, 9, 16)
        if where := _MODEL_AND_CODE.match(text.plain, 17):
            text.stylize(palette.accent, *where.span(1))
            text.stylize(palette.muted, *where.span(2))
            if level == "error":
                text.stylize(palette.error, where.end())
        if self.searched:
            plain, start = text.plain.lower(), 0
            while (at := plain.find(self.searched, start)) >= 0:
                start = at + len(self.searched)
                text.stylize("reverse", at, start)


class LogView(Log):
    """A `Log` that measures new lines at once: they come in small batches, and a thread for each would cost more."""

    def __init__(self) -> None:
        super().__init__(highlight=True, max_lines=MAX_LINES)
        self._levels = LevelHighlighter()
        self.highlighter = self._levels

    def on_mount(self) -> None:
        self._repaint()
        self.app.theme_changed_signal.subscribe(self, lambda _: self._repaint())

    def _repaint(self) -> None:
        self._levels.palette = Palette.of(self.app.theme_variables)
        self._render_line_cache.clear()
        self.refresh()

    def _prune_max_lines(self) -> None:
        """Drops the oldest lines; what somebody reads further up stays where it is."""
        n_before, reads = self.line_count, not self.is_vertical_scroll_end
        super()._prune_max_lines()
        n_gone = n_before - self.line_count
        if n_gone and reads:
            self.scroll_to(y=max(0, self.scroll_y - n_gone), animate=False, immediate=True, force=True)

    def search(self, text: str) -> None:
        """Marks the text, given in lower case, wherever it stands."""
        self._levels.searched = text

    def _update_size(self, updates: int, lines: list[str]) -> None:  # type: ignore[override]
        if lines:
            self._width = max(self._width, max(len(line) for line in lines))
            self.virtual_size = Size(self._width, self.line_count)
