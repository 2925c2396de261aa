"""The folder where a model's states outlive their place in RAM, and the node: what lies there, a thread that writes and
reads it, and a budget.

The engine's thread never touches the disk: it hands over what leaves the store (`put`), looks up what is here by its
tokens (`find`), and asks for a file (`fetch`), which comes when it was read and checked. A disk that is full or may not
be written is told once; the cache then goes on with what it has. Files of another model, context or build count against
the budget and leave by their age, but are never read.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine.counters import EngineCounters
from engine.prefix_cache import MIN_SHARED, StoredState, TokenIds, common_prefix
from engine.state_file import (
    PART_SUFFIX,
    SUFFIX,
    FiledState,
    file_bytes,
    is_of,
    name_of,
    read_head,
    read_state,
    write_state,
)
from infsvc.errors import StateFileError, human_bytes

log = logging.getLogger("infsvc.engine")

MAX_FILES = 4096
"""Files in a folder at most."""

_WAITING_BYTES = 64 * 2**20
"""States that wait to be written; more are let go, because a disk that is slower than the requests is of no use."""

_LATE_S = 5.0
"""A file that takes longer is not waited for: reading the prompt is quicker than such a disk."""


@dataclass(frozen=True)
class Fetched:
    """A file that was asked for; `state` is None where it could not be used. `seconds` from asking to having it."""

    filed: FiledState
    state: StoredState | None
    seconds: float


class StateFolder:
    """`find`, `put`, `fetch`, `fetched`, `forget`, `late` and `close` belong to the engine's thread.

    Args:
        origin: of the model and its context; see `state_file.origin_of`.
        budget_bytes: of all files in the folder.
        cuttable: whether a longer state serves for a shorter one.
        counters: where it is told what was written and read.
        on_fetched: called on the folder's thread when something asked for has come.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        origin: bytes,
        budget_bytes: int,
        cuttable: bool,
        counters: EngineCounters,
        on_fetched: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.looked = threading.Event()
        """Set when everything in the folder is known."""
        self._name, self._origin, self._budget_bytes = name, origin, budget_bytes
        self._cuttable, self._counters, self._on_fetched = cuttable, counters, on_fetched
        self._changed = threading.Condition()
        # Under the condition's lock:
        self._by_start: dict[bytes, list[FiledState]] = {}
        self._to_write: deque[StoredState] = deque()
        self._to_read: deque[tuple[FiledState, float]] = deque()
        self._asked: dict[Path, float] = {}
        self._fetched: list[Fetched] = []
        self._n_waiting_bytes = 0
        self._writes = self._reads = True
        self._until_s: float | None = None
        # The folder's thread alone: path → size, the least recently used first.
        self._sizes: OrderedDict[Path, int] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name=f"states-{name}", daemon=True)

    # -- the engine's thread ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread, which looks what is in the folder."""
        self._thread.start()

    def find(self, prompt: TokenIds) -> list[FiledState]:
        """What lies here that may begin like the prompt."""
        with self._changed:
            return list(self._by_start.get(_start(prompt), ())) if self._reads else []

    def put(self, state: StoredState, *, last: bool = False) -> None:
        """Hands a state over to be written; nothing is done where the disk does not take it, or not so fast.

        Args:
            last: whether the engine is ending, so that the memory is free anyway.
        """
        n_bytes = state.blob.nbytes
        with self._changed:
            full = self._to_write and self._n_waiting_bytes + n_bytes > _WAITING_BYTES and not last
            if not self._writes or full or file_bytes(state) > self._budget_bytes:
                return
            self._to_write.append(state)
            self._n_waiting_bytes += n_bytes
            self._changed.notify()

    def fetch(self, filed: FiledState) -> None:
        """Asks for a file's state; `fetched` has it later. Asking twice is asking once."""
        with self._changed:
            if filed.path not in self._asked:
                now = time.perf_counter()
                self._asked[filed.path] = now
                self._to_read.append((filed, now))
                self._changed.notify()

    def fetched(self) -> list[Fetched]:
        """What has come since the last call."""
        with self._changed:
            found, self._fetched = self._fetched, []
            for each in found:
                self._asked.pop(each.filed.path, None)
        return found

    def late(self) -> bool:
        """Whether a file is so late that nobody should wait; from then on none is found here."""
        with self._changed:
            if self._asked and time.perf_counter() - min(self._asked.values()) > _LATE_S:
                self._reads = False
                self._asked.clear()
                self._to_read.clear()
                self._tell(f"{self.folder} does not answer in {_LATE_S:.0f} s")
                return True
            return False

    def forget(self, state: StoredState) -> None:
        """Removes the file of a state that llama.cpp would not take."""
        path = self.folder / name_of(self._origin, state.tokens)
        self._unlist(path)
        with suppress(OSError):
            path.unlink()

    def close(self, timeout_s: float) -> None:
        """Writes what waits, for as long as there is time, and ends the thread."""
        with self._changed:
            self._until_s = time.perf_counter() + timeout_s
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_s + 1.0)

    # -- the folder's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._look()
        except OSError as error:
            self._give_up(error)
        finally:
            self.looked.set()
        while True:
            with self._changed:
                while not self._to_read and not self._to_write and self._until_s is None:
                    self._changed.wait()
                if self._stopped() or (self._until_s is not None and not self._to_write):
                    return
                reading = self._to_read.popleft() if self._to_read and self._until_s is None else None
                writing = self._to_write.popleft() if reading is None and self._to_write else None
            if reading is not None:
                self._read(*reading)
            elif writing is not None:
                try:
                    self._write(writing)
                except OSError as error:
                    self._give_up(error)
                with self._changed:
                    self._n_waiting_bytes = max(0, self._n_waiting_bytes - writing.blob.nbytes)

    def _stopped(self) -> bool:
        return self._until_s is not None and time.perf_counter() > self._until_s

    def _look(self) -> None:
        """Learns what is in the folder, the most recently used first."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[tuple[int, Path, int]] = []
        for path in self.folder.iterdir():
            if path.suffix == PART_SUFFIX:
                path.unlink(missing_ok=True)
            elif path.suffix == SUFFIX:
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    found.append((stat.st_mtime_ns, path, stat.st_size))
        found.sort()
        self._sizes = OrderedDict((path, size) for _, path, size in found)
        self._make_room(0)
        for path in list(reversed(self._sizes)):
            if self._until_s is not None:
                return
            if not is_of(path.name, self._origin):
                continue
            try:
                self._list(read_head(path, self._origin))
            except (StateFileError, OSError) as error:
                self._remove_damaged(path, error)

    def _read(self, filed: FiledState, asked_s: float) -> None:
        state = None
        try:
            state = read_state(filed, self._origin)
        except (StateFileError, OSError) as error:
            self._remove_damaged(filed.path, error)
        else:
            self._counters.n_states_read += 1
            self._touch(filed.path)
        with self._changed:
            self._fetched.append(Fetched(filed, state, time.perf_counter() - asked_s))
        self._on_fetched()

    def _write(self, state: StoredState) -> None:
        superseded: list[FiledState] = []
        with self._changed:
            known = list(self._by_start.get(_start(state.tokens), ()))
        for each in known:
            n = common_prefix(each.tokens, state.tokens)
            same = n == len(each.tokens) == len(state.tokens)
            if same or (self._cuttable and n == len(state.tokens)):
                self._touch(each.path)
                return
            if self._cuttable and n == len(each.tokens):
                superseded.append(each)
        for each in superseded:
            self._remove(each.path)
        self._make_room(file_bytes(state))
        filed = write_state(self.folder, self._origin, state, self._stopped)
        if filed is not None:
            self._sizes[filed.path] = filed.file_bytes
            self._counters.n_states_written += 1
            self._list(filed)

    def _make_room(self, n_bytes: int) -> None:
        while self._sizes and (
            sum(self._sizes.values()) + n_bytes > self._budget_bytes or len(self._sizes) >= MAX_FILES
        ):
            self._remove(next(iter(self._sizes)))
        self._counters.disk_bytes = sum(self._sizes.values())

    def _remove(self, path: Path) -> None:
        self._unlist(path)
        path.unlink(missing_ok=True)
        self._sizes.pop(path, None)

    def _remove_damaged(self, path: Path, error: Exception) -> None:
        log.warning(
            f"a saved state is not used and removed: {error}",
            extra={"code": "prefix.state_damaged", "model": self._name},
        )
        self._counters.n_states_damaged += 1
        with suppress(OSError):
            self._remove(path)
        self._counters.disk_bytes = sum(self._sizes.values())

    def _touch(self, path: Path) -> None:
        """Notes a use, for this run and the next."""
        if path in self._sizes:
            self._sizes.move_to_end(path)
        with suppress(OSError):
            os.utime(path)

    def _list(self, filed: FiledState) -> None:
        with self._changed:
            self._by_start.setdefault(_start(filed.tokens), []).append(filed)
        self._counters.disk_bytes = sum(self._sizes.values())

    def _unlist(self, path: Path) -> None:
        with self._changed:
            for start, listed in tuple(self._by_start.items()):
                left = [each for each in listed if each.path != path]
                if len(left) < len(listed):
                    self._by_start[start] = left
                    if not left:
                        del self._by_start[start]

    def _give_up(self, error: OSError) -> None:
        """The disk is full, or the folder may not be written: no more is written until the model is loaded again."""
        with self._changed:
            told, self._writes = not self._writes, False
            self._to_write.clear()
            self._n_waiting_bytes = 0
        if not told:
            self._tell(f"{self.folder} cannot be written ({error.strerror or error})")

    def _tell(self, what: str) -> None:
        log.warning(
            f"{what}: prompts' states are kept in RAM only until {self._name} is loaded again; make room, or set "
            f"PREFIX_CACHE_DISK_MB=0 ({human_bytes(self._budget_bytes)} are allowed)",
            extra={"code": "prefix.disk_failed", "model": self._name},
        )


def _start(tokens: TokenIds) -> bytes:
    """What states are looked up by: less in common is never shared."""
    return tokens[:MIN_SHARED].tobytes()
