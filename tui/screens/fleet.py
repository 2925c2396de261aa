"""Screen 1, Fleet: every model with its state, load and capabilities; below, the chosen one, and what happened last."""

from __future__ import annotations

import json
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content

from tui.node_view import WorkerView
from tui.screens.list_screen import ModelListScreen
from tui.widgets.capability_matrix import SORTS, CapabilityMatrix
from tui.widgets.charts import LoadChart
from tui.widgets.event_lines import EventLines
from tui.widgets.model_facts import ModelPanel
from tui.widgets.other_nodes import OtherNodes
from tui.wording import clean


class FleetScreen(ModelListScreen):
    NAME = "fleet"
    CSS_PATH = "fleet.tcss"
    SORTS = SORTS
    FILTER_HINT = "name, state, architecture or capability"
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

    def compose_body(self) -> ComposeResult:
        with Vertical(id="models", classes="list") as models:
            models.border_title = "Models"
            yield CapabilityMatrix(self.node.fleet.workers, id="matrix")
            yield from self.empty_line()
            yield OtherNodes(self.node.registry)
        with Horizontal(id="below"):
            with Vertical(id="chart"):
                yield LoadChart()
            yield ModelPanel("", id="panel")
        yield EventLines(self.node.events)
        yield from self.filter_line()

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = "Detail"

    def look(self) -> None:
        self.look_at_table()
        self.query_one(OtherNodes).look(filter_text=self.table.filter_text)
        self.say_when_empty()
        self.show_chosen()
        self.query_one(EventLines).look()

    def show_chosen(self) -> None:
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

    def empty_words(self) -> str:
        if not self.node.fleet.workers:
            return (
                "There is no model yet.\n\n"
                "A file envs/worker.<name>.env makes one; `infsvc models list` shows those that ship."
            )
        if not self.table.matches_any:
            return f"Nothing matches “{self.table.filter_text}”.\n\nEsc shows all models again."
        return ""

    def tell_totals(self) -> None:
        self.tell("  ".join(self.order_words()))

    def action_sort(self) -> None:
        super().action_sort()
        if self.table.sort_by == self.SORTS[0]:
            self.tell("sorted by name")

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
