"""The matrix of models: one row a worker file, its state, load and capabilities in columns that fit the width.

Rows are rebuilt only when the columns, the filter or the set of models change. Otherwise the rows in sight are
compared with what they show, and changed cells alone are written: a screen of ten thousand models costs as much as one
of twenty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding
from textual.coordinate import Coordinate
from textual.timer import Timer
from textual.widgets import DataTable

from infsvc.types import Capability
from tui.messages import DetailRequested, ModelHighlighted
from tui.node_view import WorkerView
from tui.themes import Palette
from tui.wording import clean, duration, level_mark, params_of, pull_pace, rate, sparkline, state_of

# Key → heading, width, right-aligned. One cell of space follows each.
_COLUMNS: dict[str, tuple[str, int, bool]] = {
    "model": ("model", 16, False),
    "state": ("state", 14, False),
    "arch": ("arch", 10, False),
    "params": ("params", 6, True),
    "quant": ("quant", 6, False),
    "ctx": ("ctx", 6, True),
    "text-generation": ("text", 4, False),
    "embeddings": ("emb", 3, False),
    "reasoning": ("reas", 4, False),
    "tool-calling": ("tool", 4, False),
    "grammar-constrained": ("gram", 4, False),
    "queue": ("queue", 6, True),
    "load": ("load", 4, False),
    "tok/s": ("tok/s", 6, True),
    "ttft": ("ttft p95", 8, True),
}
_CAPABILITIES = tuple(capability.value for capability in Capability if capability.value in _COLUMNS)
# What is added while it fits; the first group is always there.
_GROUPS = (
    ("model", "state", "queue", "tok/s"),
    _CAPABILITIES,
    ("ttft",),
    ("ctx",),
    ("quant",),
    ("params",),
    ("load",),
    ("arch",),
)
ROWS_AT_ONCE = 50
_MODEL_WIDTH_MAX, _LOAD_WIDTH_MAX = 32, 12
SORTS = ("name", "state", "queue", "tok/s", "params")
_STATE_ORDER = ("●", "◐", "◌", "✕", "○")


_PACE_WIDTH = 19


def layout(width: int, *, pulling: bool = False) -> dict[str, int]:
    """Column → width of what it shows, for a table of `width` cells, in the order shown. While something is `pulling`,
    room that is left goes to the state first: for the pace of it."""
    chosen: set[str] = set()
    used = 0
    for group in _GROUPS:
        need = sum(_COLUMNS[key][1] + 1 for key in group)
        if chosen and used + need > width:
            break
        chosen |= set(group)
        used += need
    widths = {key: spec[1] for key, spec in _COLUMNS.items() if key in chosen}
    if used > width:  # the narrowest screens: the state's word stays, the model's name gives way
        widths["model"] = max(6, widths["model"] - (used - width))
        return widths
    spare = width - used
    if pulling and spare >= _PACE_WIDTH:
        widths["state"] += _PACE_WIDTH
        spare -= _PACE_WIDTH
    if spare > 0:
        wider = min(spare, _MODEL_WIDTH_MAX - widths["model"])
        widths["model"] += wider
        spare -= wider
    if "load" in widths and spare > 0:
        widths["load"] += min(spare, _LOAD_WIDTH_MAX - widths["load"])
    return widths


@lru_cache(maxsize=4096)
def _cell(text: str, colour: str, width: int, right: bool) -> Text:
    if len(text) > width:
        text = text[: width - 1] + "…"
    padded = text.rjust(width) if right else text.ljust(width)
    return Text(padded + " ", style=colour, no_wrap=True, end="")


class CapabilityMatrix(DataTable[Text]):
    """Posts `ModelHighlighted` and `DetailRequested`; `look()` brings it up to date."""

    BINDINGS = [
        Binding("enter", "select_cursor", "detail", id="fleet.detail", tooltip="Everything known of this model"),
    ]
    DEFAULT_CSS = """
    CapabilityMatrix {
        height: 1fr;
        background: $background;
        scrollbar-size-horizontal: 0;
        &:focus { background-tint: $background 0%; }
        & > .datatable--header { background: $background; color: $muted; text-style: none; }
    }
    """

    COLUMNS: ClassVar[Mapping[str, tuple[str, int, bool]]] = _COLUMNS

    def __init__(self, workers: Mapping[str, WorkerView], *, id: str | None = None) -> None:
        super().__init__(id=id, cursor_type="row", cell_padding=0, zebra_stripes=False)
        self._workers = workers
        self._widths: dict[str, int] = {}
        self._shown: dict[str, tuple[Any, ...]] = {}
        self._palette: Palette | None = None
        self._coming: deque[WorkerView] = deque()
        self._was_chosen: str | None = None
        self._filling: Timer | None = None
        self.filter_text = ""
        self.sort_by = SORTS[0]

    @property
    def chosen(self) -> str | None:
        """The model under the cursor."""
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(Coordinate(self.cursor_row, 0)).row_key.value

    @property
    def matches_any(self) -> bool:
        """Whether the filter lets any model through, also before the rows were laid out."""
        return any(self._matches(worker) for worker in self._workers.values())

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda _: self._retheme())

    def on_resize(self) -> None:
        self.look()

    def _layout(self, width: int) -> dict[str, int]:
        """Column → width for a table of `width` cells."""
        return layout(width, pulling=any(worker.pull is not None for worker in self._workers.values()))

    def _retheme(self) -> None:
        self._palette = None
        self.rebuild()

    def look(self) -> None:
        """Shows what has changed; cheap when nothing has."""
        if not self.size.width:
            return
        # One cell stays free for the scrollbar, so that it does not change the columns when it comes.
        widths = self._layout(self.size.width - 1)
        n_rows = self.row_count + len(self._coming)
        if widths != self._widths or (not self.filter_text and n_rows != len(self._workers)):
            self.rebuild()
            return
        # Only rows in sight are compared; one that is scrolled into sight is so on the next look.
        top = int(self.scroll_y)
        for index in range(top, min(self.row_count, top + self.size.height)):
            name = self.coordinate_to_cell_key(Coordinate(index, 0)).row_key.value
            worker = self._workers.get(name or "")
            if worker is None:
                self.rebuild()
                return
            facts = self._facts(worker)
            before = self._shown.get(worker.name)
            if facts != before:
                self._shown[worker.name] = facts
                for column, (key, fact) in enumerate(zip(self._widths, facts, strict=True)):
                    if before is None or fact != before[column]:
                        self.update_cell_at(Coordinate(index, column), self._text(key, fact))

    def rebuild(self) -> None:
        """Lays all rows out anew; the cursor stays on its model."""
        if not self.size.width:
            return
        chosen = self.chosen
        self._widths = self._layout(self.size.width - 1)
        self.clear(columns=True)
        for key, width in self._widths.items():
            heading, _, right = self.COLUMNS[key]
            self.add_column(Text(heading.rjust(width) if right else heading), width=width + 1, key=key)
        self._shown = {}
        self._coming = deque(self._ordered())
        self._was_chosen = chosen
        self._add_some()
        if not self.row_count:
            self.post_message(ModelHighlighted(None))

    def _add_some(self) -> None:
        """Adds the next rows; DataTable measures each cell of new rows, so thousands at once would stop the screen."""
        for _ in range(min(ROWS_AT_ONCE, len(self._coming))):
            worker = self._coming.popleft()
            facts = self._shown[worker.name] = self._facts(worker)
            cells = [self._text(key, fact) for key, fact in zip(self._widths, facts, strict=True)]
            self.add_row(*cells, key=worker.name)
        if self._was_chosen in self._shown and self._was_chosen is not None:
            self.move_cursor(row=self.get_row_index(self._was_chosen), animate=False)
            self._was_chosen = None
        if self._filling is not None:
            self._filling.stop()
            self._filling = None
        if self._coming:
            self._filling = self.set_timer(0.1, self._add_some, name="fill-matrix")

    def resort(self) -> None:
        """Puts the rows into the order of `sort_by` as things are now; the cursor stays on its model."""
        rank = {worker.name: index for index, worker in enumerate(self._ordered())}
        names = [row.key.value or "" for row in self.ordered_rows]
        if not self._coming and names != sorted(names, key=lambda name: rank.get(name, len(rank))):
            self.rebuild()

    def _ordered(self) -> Iterable[WorkerView]:
        workers = [worker for worker in self._workers.values() if self._matches(worker)]
        if self.sort_by == "state":
            workers.sort(key=lambda worker: _STATE_ORDER.index(state_of(worker).glyph))
        elif self.sort_by == "queue":
            workers.sort(key=lambda worker: -worker.n_waiting)
        elif self.sort_by == "tok/s":
            workers.sort(key=lambda worker: -worker.stats.tokens_per_s())
        elif self.sort_by == "params":
            workers.sort(key=lambda worker: -(worker.info.n_params if worker.info else 0))
        return workers

    def _matches(self, worker: WorkerView) -> bool:
        if not self.filter_text:
            return True
        arch = worker.info.architecture if worker.info else ""
        claims = " ".join(claim.capability.value for claim in worker.claims if claim.present)
        return self.filter_text.lower() in f"{worker.name} {arch} {state_of(worker)} {claims}".lower()

    def _facts(self, worker: WorkerView) -> tuple[Any, ...]:
        """What the row shows, a text and a tone a column."""
        state, mark, info = state_of(worker), level_mark(worker.level), worker.info
        claims = {claim.capability.value: claim.present for claim in worker.claims}
        facts: dict[str, tuple[str, str]] = {}
        for key, width in self._widths.items():
            match key:
                case "model":
                    facts[key] = (clean(worker.name), "foreground")
                case "state":
                    figures = f" {pull_pace(worker)}" if width > self.COLUMNS["state"][1] else ""
                    facts[key] = (f"{state}{figures}", state.tone)
                case "arch":
                    facts[key] = (clean(info.architecture) if info else "–", "foreground" if info else "muted")
                case "params":
                    facts[key] = (params_of(worker), "foreground" if info else "muted")
                case "quant":
                    facts[key] = (info.quantization if info else "–", "foreground" if info else "muted")
                case "ctx":
                    facts[key] = (str(worker.n_ctx or "–"), "foreground" if info else "muted")
                case "queue":
                    waiting = f"{worker.n_waiting:,}" if worker.n_waiting or worker.asked else "–"
                    facts[key] = (f"{waiting:>4} {mark.glyph}", mark.tone if worker.n_waiting else "muted")
                case "load":
                    # The history may hold 900 samples; only its end is walked.
                    history: Any = worker.stats.history
                    last = [sample.n_waiting + sample.n_active for sample in islice(reversed(history), width)]
                    facts[key] = (sparkline(last[::-1], width, ceiling=worker.n_slots), "accent")
                case "tok/s":
                    pace = worker.stats.tokens_per_s()
                    facts[key] = (
                        rate(pace) if worker.stats.n_finished or pace else "–",
                        "foreground" if pace else "muted",
                    )
                case "ttft":
                    ttft = worker.stats.ttft_ms()
                    facts[key] = (duration(ttft[1]) if ttft else "–", "foreground" if ttft else "muted")
                case _:
                    present = claims.get(key)
                    facts[key] = (
                        " –" if present is None else " ✓" if present else " ·",
                        "success" if present else "muted",
                    )
        return tuple(facts.values())

    def _text(self, key: str, fact: tuple[str, str]) -> Text:
        if self._palette is None:
            self._palette = Palette.of(self.app.theme_variables)
        text, tone = fact
        return _cell(text, self._palette.colour(tone), self._widths[key], self.COLUMNS[key][2])

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        self.post_message(ModelHighlighted(event.row_key.value if event.row_key else None))

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        event.stop()
        if event.row_key.value is not None:
            self.post_message(DetailRequested(event.row_key.value))
