"""Screen 1, Fleet: every model with its state, load and capabilities; below, the chosen one, and what happened last."""

from __future__ import annotations

import json
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Input, Static

from tui.messages import ChatRequested, DetailRequested, LoadRequested, ModelHighlighted, PullRequested, UnloadRequested
from tui.node_view import WorkerView
from tui.screens.base import NodeScreen
from tui.screens.dialogs import ModelDetail
from tui.widgets.capability_matrix import SORTS, CapabilityMatrix
from tui.widgets.charts import LoadChart
from tui.widgets.event_lines import EventLines
from tui.widgets.model_facts import ModelPanel
from tui.widgets.other_nodes import OtherNodes
from tui.wording import clean

RESORT_EVERY = 4


class FleetScreen(NodeScreen):
    NAME = "fleet"
    CSS_PATH = "fleet.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "load", "load", id="fleet.load", tooltip="Load the model under the cursor"),
        Binding("u", "unload", "unload", id="fleet.unload", tooltip="Unload it, or stop its pull; asks if it works"),
        Binding("p", "pull", "pull", id="fleet.pull", tooltip="Fetch its file"),
        Binding("t", "chat", "chat", id="fleet.chat", tooltip="Chat with it"),
        Binding("c", "copy_curl", "curl", id="fleet.curl", tooltip="Copy a command that asks it over HTTP"),
        Binding("slash", "filter", "filter", key_display="/", id="fleet.filter", tooltip="Filter the models"),
        Binding("s", "sort", "sort", id="fleet.sort", tooltip="Sort by name, state, queue, tok/s, params in turn"),
        Binding("escape", "back", "back", show=False, id="fleet.back", tooltip="Close the filter"),
    ]  # fmt: skip

    _n_looks = 0

    def compose_body(self) -> ComposeResult:
        with Vertical(id="models") as models:
            models.border_title = "Models"
            yield CapabilityMatrix(self.node.fleet.workers, id="matrix")
            yield Static("", id="nothing")
            yield OtherNodes(self.node.registry)
        with Horizontal(id="below"):
            with Vertical(id="chart"):
                yield LoadChart()
            yield ModelPanel("", id="panel")
        yield EventLines(self.node.events)
        yield Input(placeholder="name, state, architecture or capability", id="filter", compact=True)

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = "Detail"
        self.query_one("#filter", Input).cursor_blink = self.context.animate
        self.query_one(CapabilityMatrix).focus()

    @property
    def matrix(self) -> CapabilityMatrix:
        return self.query_one(CapabilityMatrix)

    @property
    def chosen(self) -> WorkerView | None:
        return self.node.fleet.workers.get(self.matrix.chosen or "")

    def look(self) -> None:
        self.matrix.look()
        self._n_looks += 1
        if self.matrix.sort_by != "name" and self._n_looks % RESORT_EVERY == 0:
            self.matrix.resort()
        self.query_one(OtherNodes).look(filter_text=self.matrix.filter_text)
        self._say_when_empty()
        self._show_chosen()
        self.query_one(EventLines).look()

    def _show_chosen(self) -> None:
        worker = self.chosen
        panel = self.query_one(ModelPanel)
        panel.show(worker, n_lines=max(1, panel.content_size.height or 6))
        chart = self.query_one("#chart")
        if chart.display:
            name = f"{clean(worker.name)} · " if worker else ""
            chart.border_title = Content.assemble(
                name, ("tok/s", "$accent"), " at the left, waiting at the right, 15 min"
            )
            self.query_one(LoadChart).draw(worker)

    def _say_when_empty(self) -> None:
        if not self.node.fleet.workers:
            told = (
                "There is no model yet.\n\n"
                "A file envs/worker.<name>.env makes one; `infsvc models list` shows those that ship."
            )
        elif not self.matrix.matches_any:
            told = f"Nothing matches “{self.matrix.filter_text}”.\n\nEsc shows all models again."
        else:
            told = ""
        self.query_one("#nothing", Static).update(Content(told))
        self.query_one("#models").set_class(bool(told), "-empty")

    def _tell_order(self) -> None:
        matrix, parts = self.matrix, []
        if matrix.filter_text:
            parts.append(f"{matrix.row_count}/{len(self.node.fleet.workers)} match “{matrix.filter_text}”")
        if matrix.sort_by != SORTS[0]:
            parts.append(f"sorted by {matrix.sort_by}")
        self.tell("  ".join(parts))

    def on_resize(self, event: events.Resize) -> None:
        # The parts get their new sizes with the next layout.
        self.call_after_refresh(self.look)

    def on_model_highlighted(self, message: ModelHighlighted) -> None:
        message.stop()
        self._show_chosen()

    def on_detail_requested(self, message: DetailRequested) -> None:
        message.stop()
        self.app.push_screen(ModelDetail(self.node, message.model))

    def on_input_changed(self, event: Input.Changed) -> None:
        if event.input.id == "filter":
            event.stop()
            self.matrix.filter_text = event.value.strip()
            self.matrix.rebuild()
            self._say_when_empty()
            self._tell_order()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if event.input.id == "filter":
            event.stop()
            self.query_one("#filter").set_class(bool(event.value.strip()), "-open")
            self.matrix.focus()

    def action_filter(self) -> None:
        field = self.query_one("#filter", Input)
        field.add_class("-open")
        field.focus()

    def action_back(self) -> None:
        field = self.query_one("#filter", Input)
        field.value = ""
        field.remove_class("-open")
        self.matrix.focus()

    def action_sort(self) -> None:
        self.matrix.sort_by = SORTS[(SORTS.index(self.matrix.sort_by) + 1) % len(SORTS)]
        self.matrix.rebuild()
        self._tell_order()
        if self.matrix.sort_by == SORTS[0]:
            self.tell("sorted by name")

    def action_load(self) -> None:
        if worker := self.chosen:
            self.app.post_message(LoadRequested(worker.name))

    def action_unload(self) -> None:
        if worker := self.chosen:
            self.app.post_message(UnloadRequested(worker.name))

    def action_pull(self) -> None:
        if worker := self.chosen:
            self.app.post_message(PullRequested(worker.name))

    def action_chat(self) -> None:
        if worker := self.chosen:
            self.app.post_message(ChatRequested(worker.name))

    def action_copy_curl(self) -> None:
        if worker := self.chosen:
            command = curl(worker, self.node.gateway_url)
            self.app.copy_to_clipboard(command)
            self.notify(command, title="Copied", timeout=8, markup=False)


def curl(worker: WorkerView, gateway_url: str) -> str:
    """A command that asks this model over HTTP: on its own port, else through the gateway."""
    body = {"input": "What is backpressure?", "params": {"max_tokens": 64}}
    if not worker.endpoint:
        body = {"model": worker.name, **body}
    data = json.dumps(body).replace("'", "'\\''")
    return f"curl -s {worker.endpoint or gateway_url}/v1/completions -H 'Content-Type: application/json' -d '{data}'"
