"""The table of worker files: what lies on disk, what it would take in memory, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from textual.binding import Binding

from engine import memory_fit
from engine.memory_fit import MemoryEstimate
from engine.model_file import origin
from engine.model_source import describe
from engine.scheduler import N_BATCH
from tui.node_view import WorkerView
from tui.widgets.capability_matrix import CapabilityMatrix
from tui.wording import clean, pull_pace, size, state_of

_COLUMNS: dict[str, tuple[str, int, bool]] = {
    "model": ("model", 14, False),
    "state": ("state", 14, False),
    "pace": ("pace", 18, False),
    "disk": ("on disk", 9, True),
    "memory": ("memory", 9, True),
    "port": ("port", 5, True),
    "ctx": ("ctx", 6, True),
    "source": ("source", 12, False),
}
# What is added while it fits; the first group is always there.
_GROUPS = (("model", "state"), ("disk",), ("memory",), ("port",), ("ctx",), ("source",), ("pace",))
_MODEL_WIDTH_MAX, _SOURCE_WIDTH_MAX = 24, 90
SORTS = ("name", "state", "size", "memory", "port")
_STATE_ORDER = ("●", "◐", "◌", "✕", "○")


def file_layout(width: int, *, pulling: bool) -> dict[str, int]:
    """Column → width of what it shows, for a table of `width` cells, in the order shown."""
    chosen: set[str] = set()
    used = 0
    for group in _GROUPS:
        if group == ("pace",) and not pulling:
            continue
        need = sum(_COLUMNS[key][1] + 1 for key in group)
        if chosen and used + need > width:
            break
        chosen |= set(group)
        used += need
    widths = {key: spec[1] for key, spec in _COLUMNS.items() if key in chosen}
    spare = width - used
    if spare < 0:
        widths["model"] = max(6, widths["model"] + spare)
        return widths
    for key, most in (("model", _MODEL_WIDTH_MAX), ("source", _SOURCE_WIDTH_MAX)):
        if key in widths:
            wider = min(spare, most - widths[key])
            widths[key] += wider
            spare -= wider
    return widths


def disk_bytes(worker: WorkerView) -> int:
    """The size of the model's file, 0 when there is none."""
    if worker.info is not None:
        return worker.info.file_bytes
    try:
        return worker.path.stat().st_size
    except OSError:
        return 0


def memory_of(worker: WorkerView) -> MemoryEstimate | None:
    """What the model takes in memory with its settings, or None while its header is unknown."""
    if worker.info is None:
        return None
    return memory_fit.estimate(worker.info, n_ctx=worker.n_ctx, n_slots=worker.n_slots, n_batch=N_BATCH)


class FileTable(CapabilityMatrix):
    """Posts `ModelHighlighted` and `DetailRequested`, as the matrix does."""

    BINDINGS = [
        Binding("enter", "select_cursor", "detail", id="models.detail", tooltip="Everything known of this model"),
    ]
    COLUMNS: ClassVar[Mapping[str, tuple[str, int, bool]]] = _COLUMNS

    def _layout(self, width: int) -> dict[str, int]:
        return file_layout(width, pulling=any(worker.pull is not None for worker in self._workers.values()))

    def _ordered(self) -> Iterable[WorkerView]:
        workers = [worker for worker in self._workers.values() if self._matches(worker)]
        if self.sort_by == "state":
            workers.sort(key=lambda worker: _STATE_ORDER.index(state_of(worker).glyph))
        elif self.sort_by == "size":
            workers.sort(key=lambda worker: -disk_bytes(worker))
        elif self.sort_by == "memory":
            workers.sort(key=lambda worker: -(need.total_bytes if (need := memory_of(worker)) else 0))
        elif self.sort_by == "port":
            workers.sort(key=lambda worker: worker.settings.address.port if worker.settings.address else 2**16)
        else:
            workers.sort(key=lambda worker: worker.name)
        return workers

    def _matches(self, worker: WorkerView) -> bool:
        searched = f"{worker.name} {state_of(worker)} {describe(worker.settings)} {worker.path}"
        return self.filter_text.lower() in searched.lower()

    def _facts(self, worker: WorkerView) -> tuple[Any, ...]:
        state, need, n_bytes = state_of(worker), memory_of(worker), disk_bytes(worker)
        address, source = worker.settings.address, clean(origin(worker.settings, worker.path))
        told = {
            "model": (clean(worker.name), "foreground"),
            "state": (str(state), state.tone),
            "pace": (pull_pace(worker), "warning"),
            "disk": (size(n_bytes) if n_bytes else "–", "foreground" if n_bytes else "muted"),
            "memory": (size(need.total_bytes) if need else "–", "foreground" if need else "muted"),
            "port": (str(address.port) if address else "–", "foreground" if address else "muted"),
            "ctx": (str(worker.n_ctx or "–"), "foreground"),
            "source": (source or "by hand", "foreground" if source else "muted"),
        }
        return tuple(told[key] for key in self._widths)
