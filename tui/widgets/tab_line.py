"""The second line: the numbered screens, this one marked, and at the right what the screen has to say of itself."""

from __future__ import annotations

import re

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

SCREENS = (
    ("1", "fleet", "Fleet"),
    ("2", "chat", "Chat"),
    ("4", "models", "Models"),
    ("5", "logs", "Logs"),
    ("6", "queue", "Queue"),
)
NARROW = 60
_BETWEEN = re.compile(" · |   ")


class TabLine(Horizontal):
    """`active` is the name of the screen it stands on; a click on another goes there. Behind Queue stands how many dead
    letters there are, if any; on narrow screens the other tabs are their digits."""

    DEFAULT_CSS = """
    TabLine {
        height: 1;
        & > .tabs { width: auto; link-style: none; link-color: $foreground; link-background-hover: $panel; }
        & > .note { width: 1fr; text-align: right; color: $muted; padding: 0 1; }
        & > .note { text-overflow: ellipsis; text-wrap: nowrap; }
    }
    """

    def __init__(self, active: str) -> None:
        super().__init__()
        self._active = active
        self._n_dead = 0
        self._note = Content()

    def compose(self) -> ComposeResult:
        yield Static(self._tabs(), classes="tabs")
        yield Static("", classes="note")

    def on_resize(self) -> None:
        self._show()

    def _show(self) -> None:
        tabs = self._tabs()
        self.query_one(".tabs", Static).update(tabs)
        room = self.size.width - Content.from_markup(tabs).cell_length - 2
        self.query_one(".note", Static).update(fitted(self._note, room))

    def count_dead(self, n_dead: int) -> None:
        """How many dead letters there are."""
        if n_dead != self._n_dead:
            self._n_dead = n_dead
            self._show()

    def _tabs(self) -> str:
        narrow = 0 < self.size.width < NARROW
        tabs = []
        for digit, name, title in SCREENS:
            dead = f"✕{self._n_dead}" if name == "queue" and self._n_dead else ""
            if name == self._active:
                tabs.append(f"[$accent bold reverse] {digit} {title}{f' {dead}' if dead else ''} [/]")
                continue
            shown = "" if narrow else f" {title}"
            mark = f" [$error bold]{dead}[/]" if dead else ""
            tabs.append(f"[@click=app.go('{name}')][$accent] {digit}[/]{shown}{mark} [/]")
        return " " + ("" if narrow else " ").join(tabs)

    def tell(self, note: Content | str) -> None:
        """What stands at the right: parts with ` · ` or three spaces between them; where there is no room the last go
        first."""
        self._note = note if isinstance(note, Content) else Content(note)
        self._show()


def fitted(note: Content, room: int) -> Content:
    """As many whole parts of the note as have room, at least the first."""
    ends = [found.start() for found in _BETWEEN.finditer(note.plain)]
    while ends and note.cell_length > room:
        note = note[: ends.pop()]
    return note
