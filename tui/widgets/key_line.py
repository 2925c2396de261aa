"""The last line: the keys that work here. One line of text, where Textual's footer builds a widget for each key.

What does not fit is left out from the end, before help and quit; `?` lists everything. In an input, where `?` is text,
help is shown with its other key.
"""

from __future__ import annotations

from rich.cells import cell_len
from textual.app import RenderResult
from textual.content import Content
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input, TextArea

LAST = ("app.quit", "app.help")


class KeyLine(Widget):
    """Shows the bindings that are meant to be shown; a click presses the key."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    KeyLine {
        height: 1;
        background: $panel;
        link-style: none;
        link-style-hover: none;
        link-color: $foreground;
        link-background-hover: $border;
    }
    """

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._change)

    def _change(self, screen: Screen[object]) -> None:
        self.refresh()

    def render(self) -> RenderResult:
        keys: dict[str, tuple[str, str, str]] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            if binding.show and active.enabled:
                shown = self.app.get_key_display(binding)
                keys.setdefault(binding.id or binding.action, (binding.key, shown, binding.description))
        if isinstance(self.screen.focused, Input | TextArea) and "app.help" in keys:
            keys["app.help"] = ("f12", "F12", keys["app.help"][2])
        last = [keys.pop(name) for name in LAST if name in keys]
        room = self.size.width - sum(_width(key) for key in last)
        fitting: list[tuple[str, str, str]] = []
        for key in keys.values():
            room -= _width(key)
            if room < 0:
                break
            fitting.append(key)
        return Content("").join(
            Content.from_markup(
                f"[@click=app.simulate_key('{key}')] [$accent bold]$shown[/] [$muted]$told[/] [/]",
                shown=shown,
                told=told,
            )
            for key, shown, told in [*fitting, *last]
        )


def _width(key: tuple[str, str, str]) -> int:
    return cell_len(key[1]) + len(key[2]) + 3
