"""Screen 4, Models: the worker files, what lies on disk and what it takes in memory; pull, stop, remove, a new one."""

from __future__ import annotations

from contextlib import suppress
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from engine.model_file import origin, part_of
from infsvc.types import ModelState
from tui.messages import NewWorkerRequested, RemoveRequested
from tui.node_view import WorkerView
from tui.screens.list_screen import ModelListScreen
from tui.widgets.file_table import SORTS, FileTable, disk_bytes, memory_of
from tui.widgets.model_facts import pull_line
from tui.wording import clean, plural, size, state_of


class ModelsScreen(ModelListScreen):
    NAME = "models"
    CSS_PATH = "models.tcss"
    SORTS = SORTS
    FILTER_HINT = "name, state, source or path"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "pull", "pull", id="models.pull", tooltip="Fetch the file of the model under the cursor"),
        Binding("l", "load", "load", id="models.load", tooltip="Load it; a missing file is fetched first"),
        Binding("u", "unload", "unload", id="models.unload", tooltip="Unload it, or stop its pull"),
        Binding("n", "new", "new", id="models.new", tooltip="Write a worker file for another model"),
        Binding("x", "remove", "remove", id="models.remove", tooltip="Remove its file from the disk; asks"),
        Binding("t", "chat", "chat", id="models.chat", tooltip="Chat with it"),
        Binding("slash", "filter", "filter", key_display="/", id="models.filter", tooltip="Filter the models"),
        Binding("s", "sort", "sort", id="models.sort", tooltip="Sort by name, state, size, memory, port in turn"),
        Binding("escape", "back", "back", show=False, id="models.back", tooltip="Close the filter"),
    ]  # fmt: skip

    _wanted: str | None = None

    def compose_body(self) -> ComposeResult:
        with Vertical(id="files", classes="list") as files:
            files.border_title = "Worker files"
            yield FileTable(self.node.fleet.workers, id="table")
            yield from self.empty_line()
        yield Static("", id="file")
        yield from self.filter_line()

    def on_mount(self) -> None:
        self.query_one("#file").border_title = "File"

    def show_model(self, name: str) -> None:
        """Puts the cursor on a model, which may have just come."""
        self._wanted = name
        self.action_back()
        self.look()

    def look(self) -> None:
        self.look_at_table()
        if self._wanted is not None and any(row.key.value == self._wanted for row in self.table.ordered_rows):
            self.table.move_cursor(row=self.table.get_row_index(self._wanted), animate=False)
            self._wanted = None
        self.say_when_empty()
        self.show_chosen()
        self.tell_totals()

    def show_chosen(self) -> None:
        worker = self.chosen
        panel = self.query_one("#file", Static)
        panel.update(Content("\n").join(file_lines(worker)) if worker else "", layout=False)

    def tell_totals(self) -> None:
        kept = [n for worker in self.node.fleet.workers.values() if (n := disk_bytes(worker))]
        self.tell(" · ".join([*self.order_words(), f"{plural(len(kept), 'file')}, {size(sum(kept))}"]))

    def empty_words(self) -> str:
        if not self.node.fleet.workers:
            return "There is no worker file yet.\n\nn writes one: a name, and where the model's file comes from."
        if not self.table.matches_any:
            return f"Nothing matches “{self.table.filter_text}”.\n\nEsc shows all worker files again."
        return ""

    def action_remove(self) -> None:
        if worker := self.chosen:
            self.app.post_message(RemoveRequested(worker.name))

    def action_new(self) -> None:
        self.app.post_message(NewWorkerRequested())


def file_lines(worker: WorkerView) -> list[Content]:
    """What is known of a model's file, the state first."""
    state, n_bytes = state_of(worker), disk_bytes(worker)
    source = clean(origin(worker.settings, worker.path))
    lines = [Content.assemble((str(state), f"${state.tone} bold"), (f"   {clean(worker.name)}", "bold"))]
    if worker.reason:
        lines.append(
            Content.styled(clean(worker.reason), "$error" if worker.state is ModelState.FAILED else "$warning")
        )
    elif worker.pull is not None:
        lines.append(Content.styled(pull_line(worker), "$warning"))
    if n_bytes:
        kept = f"  {size(n_bytes)}"
    else:
        kept = ", absent" if worker.pull is None else ""
        with suppress(OSError):
            kept += (
                "" if worker.pull else f"; {size(part_of(worker.path).stat().st_size)} of an unfinished pull are kept"
            )
    lines.append(_fact("file", f"{clean(str(worker.path))}{kept}"))
    lines.append(_fact("source", source or ("put there by hand" if n_bytes else "none: put the file there by hand")))
    need = memory_of(worker)
    lines.append(
        _fact(
            "memory",
            f"{size(need.total_bytes)}: weights {size(need.weight_bytes)}, KV {size(need.kv_bytes)} for "
            f"{worker.n_slots} × {worker.n_ctx:,} tokens, compute {size(need.compute_bytes)}"
            if need
            else "known when the file is there",
        )
    )
    lines.append(_fact("served", f"{worker.endpoint or 'gateway only'}   {clean(worker.settings.subject)}"))
    return lines


def _fact(key: str, value: str) -> Content:
    return Content.assemble((f"{key:<8}", "$muted"), (value, ""))
