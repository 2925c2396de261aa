"""The choice of who to chat with: this node's models, then those of other nodes; what is typed filters them."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from infsvc.board import fit
from tui.node_view import NodeView
from tui.partner import Partner, partners
from tui.screens.base import Dialog
from tui.wording import Shown, clean

_NAME_CELLS, _NODE_CELLS = 42, 18
Key = tuple[str, str | None]


class ModelPicker(Dialog[Partner | None]):
    """Answers the chosen one. The list is brought up to date each second: nodes come and go."""

    HEADING = "Chat with"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move('cursor_up')", "up", show=False, id="picker.up"),
        Binding("down", "move('cursor_down')", "down", show=False, id="picker.down"),
        Binding("pageup", "move('page_up')", "page up", show=False, id="picker.page_up"),
        Binding("pagedown", "move('page_down')", "page down", show=False, id="picker.page_down"),
    ]

    def __init__(self, node: NodeView, chosen: Partner | None, *, blink: bool) -> None:
        super().__init__()
        self._node, self._blink = node, blink
        self._at: Key | None = (chosen.model, chosen.node) if chosen is not None else None
        self._listed: list[Partner] = []
        self._rows: list[Content] = []

    def compose_box(self) -> ComposeResult:
        yield Input(placeholder="type to filter by model, node or state", id="filter", compact=True)
        yield OptionList()
        yield Static("", classes="empty")
        yield Static(Content("↑↓ moves · enter chooses · esc closes"), classes="hint")

    def on_mount(self) -> None:
        field = self.query_one(Input)
        field.cursor_blink = self._blink
        field.focus()
        self.query_one(OptionList).can_focus = False
        self._look()
        self.set_interval(1.0, self._look, name="picker")

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self._look()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self._choose(self.query_one(OptionList).highlighted)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        partner = self._listed[event.option_index]
        self._at = (partner.model, partner.node)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._choose(event.option_index)

    def _choose(self, index: int | None) -> None:
        if index is not None and index < len(self._listed):
            self.dismiss(self._listed[index])

    def action_move(self, how: str) -> None:
        getattr(self.query_one(OptionList), f"action_{how}")()

    def _look(self) -> None:
        """Lists who is there now and matches; the cursor stays on its model as long as that is listed."""
        everyone = partners(self._node)
        words = self.query_one(Input).value.lower().split()
        found = [
            (each, state)
            for each, state in everyone
            if all(word in f"{each.name} {state.word}".lower() for word in words)
        ]
        self._listed = [each for each, _ in found]
        rows = [_row(each, state) for each, state in found]
        if rows != self._rows:
            self._rows = rows
            keys: list[Key] = [(each.model, each.node) for each in self._listed]
            menu = self.query_one(OptionList)
            with self.prevent(OptionList.OptionHighlighted):
                menu.set_options(Option(row) for row in rows)
                menu.highlighted = keys.index(self._at) if self._at in keys else 0 if keys else None
        if not everyone:
            told = "no model here or on another node can chat: add a worker file to envs/"
        else:
            told = "" if rows else "nothing matches"
        self.query_one(".empty", Static).update(told)
        self.query_one(".empty").display = bool(told)


def _row(partner: Partner, state: Shown) -> Content:
    """Name and state. States stand in one column; of a name too long for that its node's part stays."""
    model, at = clean(partner.model), ""
    if partner.node is not None:
        at = fit(f" @{clean(partner.node)}", min(_NODE_CELLS, len(partner.node) + 2))
    shown = fit(model, _NAME_CELLS - len(at)).rstrip() if len(model) + len(at) > _NAME_CELLS else model
    return Content.assemble((fit(shown + at, _NAME_CELLS) + " ", ""), (str(state), f"${state.tone}"))
