"""The second line: the numbered screens, this one marked, and at the right what the screen has to say of itself."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

SCREENS = (("1", "fleet", "Fleet"), ("2", "chat", "Chat"), ("4", "models", "Models"), ("5", "logs", "Logs"))


class TabLine(Horizontal):
    """`active` is the name of the screen it stands on; a click on another goes there."""

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

    def compose(self) -> ComposeResult:
        tabs = " ".join(
            f"[$accent bold reverse] {digit} {title} [/]"
            if name == self._active
            else f"[@click=app.go('{name}')][$accent] {digit}[/] {title} [/]"
            for digit, name, title in SCREENS
        )
        yield Static(" " + tabs, classes="tabs")
        yield Static("", classes="note")

    def tell(self, note: Content | str) -> None:
        """What stands at the right."""
        self.query_one(".note", Static).update(note if isinstance(note, Content) else Content(note))
