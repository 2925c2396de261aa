"""What the numbered screens and the dialogs have in common: the frame, and the style classes that follow the size."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from tui.context import Context
from tui.terminal import MIN_COLUMNS, MIN_ROWS
from tui.widgets.header import StatusHeader
from tui.widgets.key_line import KeyLine
from tui.widgets.tab_line import TabLine

Result = TypeVar("Result")


def classes_of(width: int, height: int) -> dict[str, bool]:
    """The style classes of a size: `-tiny` shows one line only, `-narrow` and `-low` leave out what has no room."""
    return {
        "-tiny": width < MIN_COLUMNS or height < MIN_ROWS,
        "-narrow": width < 110,
        "-low": height < 30,
        "-flat": height < 18,
        "-tall": height >= 40,
    }


class TooSmall(Static):
    """The one line that a screen shows where nothing else has room."""

    def __init__(self) -> None:
        super().__init__("", classes="too-small")

    def on_resize(self) -> None:
        width, height = self.app.size
        text = f"needs {MIN_COLUMNS}×{MIN_ROWS}, this is {width}×{height}"
        self.update(Content(text), layout=False)


class NodeScreen(Screen[None]):
    """A numbered screen. Subclasses give `NAME`, `compose_body` and `look`."""

    NAME: ClassVar[str] = ""
    LOOK_EVERY_S: ClassVar[float] = 0.5

    def __init__(self, context: Context) -> None:
        super().__init__(id=self.NAME)
        self.context = context
        self.node = context.node

    def compose(self) -> ComposeResult:
        yield StatusHeader(self.context)
        yield TabLine(self.NAME)
        with Vertical(classes="body"):
            yield from self.compose_body()
        yield KeyLine()
        yield TooSmall()

    def compose_body(self) -> ComposeResult:
        """What stands between the tabs and the footer."""
        yield from ()

    def look(self) -> None:
        """Reads the node and shows what has changed."""

    def on_mount(self) -> None:
        self.set_interval(self.LOOK_EVERY_S, self._look_if_seen, name=f"look-{self.NAME}")

    def on_screen_resume(self) -> None:
        self._look_if_seen()

    def _look_if_seen(self) -> None:
        if self.app.current_mode == self.NAME:
            self.query_one(TabLine).count_dead(self.node.durable.dead.n_kept or 0)
            self.look()

    def on_resize(self, event: events.Resize) -> None:
        for name, on in classes_of(event.size.width, event.size.height).items():
            self.set_class(on, name)

    def tell(self, note: Content | str) -> None:
        """What the tab line says at the right."""
        self.query_one(TabLine).tell(note)


class Dialog(ModalScreen[Result]):
    """A box above the screen; Esc closes it with no result. Subclasses compose inside `compose_box`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "close", id="dialog.close", tooltip="Close without doing anything"),
    ]
    CSS_PATH = "dialogs.tcss"
    HEADING: ClassVar[str] = ""

    def compose(self) -> ComposeResult:
        with Vertical(classes="box") as box:
            box.border_title = self.HEADING
            yield from self.compose_box()
        yield TooSmall()

    def compose_box(self) -> ComposeResult:
        """What stands in the box."""
        yield from ()

    def on_resize(self, event: events.Resize) -> None:
        for name, on in classes_of(event.size.width, event.size.height).items():
            self.set_class(on, name)

    def action_leave(self) -> None:
        self.dismiss(None)
