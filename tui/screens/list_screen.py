"""What the screens that are a list have in common: the filter line, the order, a word where nothing is listed; and for
lists of models what is done to the one under the cursor.

Keys are each screen's own, as their words differ; what they do stands here once.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from textual import events
from textual.app import ComposeResult
from textual.content import Content
from textual.widgets import Input, Static

from tui.messages import (
    ChatRequested,
    DetailRequested,
    LoadRequested,
    ModelHighlighted,
    PullRequested,
    UnloadRequested,
)
from tui.node_view import WorkerView
from tui.screens.base import NodeScreen
from tui.screens.dialogs import ModelDetail
from tui.widgets.capability_matrix import CapabilityMatrix

RESORT_EVERY = 4


class Listing(Protocol):
    """A list that can be narrowed and ordered."""

    filter_text: str
    sort_by: str

    def rebuild(self) -> None:
        """Lists anew what the filter lets through."""


class ListScreen(NodeScreen):
    """Subclasses give `SORTS`, `listing`, `home_focus`, `empty_words` and `totals`, and yield `filter_line` and
    `empty_line` in their body; their box of class `list` shows one or the other."""

    SORTS: ClassVar[tuple[str, ...]] = ("name",)
    FILTER_HINT: ClassVar[str] = ""

    def filter_line(self) -> ComposeResult:
        yield Input(placeholder=self.FILTER_HINT, id="filter", compact=True)

    def empty_line(self) -> ComposeResult:
        yield Static("", id="nothing")

    def on_mount(self) -> None:
        self.query_one("#filter", Input).cursor_blink = self.context.animate
        self.focus_list()

    @property
    def listing(self) -> Listing:
        """What is filtered and sorted."""
        raise NotImplementedError

    def focus_list(self) -> None:
        """Gives the keys back to the list."""
        raise NotImplementedError

    def empty_words(self) -> str:
        """What stands where nothing is listed, or "" while something is."""
        raise NotImplementedError

    def tell_totals(self) -> None:
        """Says at the right of the tabs what is listed and how."""
        raise NotImplementedError

    def say_when_empty(self) -> None:
        told = self.empty_words()
        self.query_one("#nothing", Static).update(Content(told))
        self.query_one(".list").set_class(bool(told), "-empty")

    def on_resize(self, event: events.Resize) -> None:
        # The parts get their new sizes with the next layout.
        self.call_after_refresh(self.look)

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "filter":
            event.stop()
            self.listing.filter_text = event.value.strip()
            self.listing.rebuild()
            self.say_when_empty()
            self.tell_totals()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id == "filter":
            event.stop()
            self.query_one("#filter").set_class(bool(event.value.strip()), "-open")
            self.focus_list()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.add_class("-open")
        field.focus()

    def action_back(self) -> None:
        field = self.query_one("#filter", Input)
        field.value = ""
        field.remove_class("-open")
        self.focus_list()

    def action_sort(self) -> None:
        order = self.SORTS
        self.listing.sort_by = order[(order.index(self.listing.sort_by) + 1) % len(order)]
        self.listing.rebuild()
        self.tell_totals()


class ModelListScreen(ListScreen):
    """A list of models in a `CapabilityMatrix`, or in a table of its kind."""

    _n_looks = 0

    @property
    def table(self) -> CapabilityMatrix:
        return self.query_one(CapabilityMatrix)

    @property
    def listing(self) -> CapabilityMatrix:
        return self.table

    @property
    def chosen(self) -> WorkerView | None:
        return self.node.fleet.workers.get(self.table.chosen or "")

    def focus_list(self) -> None:
        self.table.focus()

    def look_at_table(self) -> None:
        """Brings the table up to date, and now and then into order."""
        self.table.look()
        self._n_looks += 1
        if self.table.sort_by != self.SORTS[0] and self._n_looks % RESORT_EVERY == 0:
            self.table.resort()

    def order_words(self) -> list[str]:
        """Filter and order, where they are not the usual ones."""
        table, parts = self.table, []
        if table.filter_text:
            parts.append(f"{table.row_count}/{len(self.node.fleet.workers)} match “{table.filter_text}”")
        if table.sort_by != self.SORTS[0]:
            parts.append(f"sorted by {table.sort_by}")
        return parts

    def show_chosen(self) -> None:
        """Shows what is known of the model under the cursor."""
        raise NotImplementedError

    def on_model_highlighted(self, message: ModelHighlighted) -> None:
        message.stop()
        self.show_chosen()

    def on_detail_requested(self, message: DetailRequested) -> None:
        message.stop()
        self.app.push_screen(ModelDetail(self.node, message.model))

    def _ask(self, request: type[LoadRequested | UnloadRequested | PullRequested | ChatRequested]) -> None:
        if worker := self.chosen:
            self.app.post_message(request(worker.name))

    def action_load(self) -> None:
        self._ask(LoadRequested)

    def action_unload(self) -> None:
        self._ask(UnloadRequested)

    def action_pull(self) -> None:
        self._ask(PullRequested)

    def action_chat(self) -> None:
        self._ask(ChatRequested)
