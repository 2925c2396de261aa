"""The folder of states without a model: found again, within its budget, and a disk that fails takes nothing along."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine import state_folder
from engine.counters import EngineCounters
from engine.prefix_cache import StoredState
from engine.state_file import file_bytes
from engine.state_folder import Fetched, StateFolder

ORIGIN = b"0123456789abcdef"


class Opened(StateFolder):
    """A folder and what a test wants to know of it."""

    def __init__(self, path: Path, *, budget: int = 10**6, cuttable: bool = True, origin: bytes = ORIGIN) -> None:
        self.counters = EngineCounters()
        self.came = threading.Event()
        super().__init__(
            path,
            name="m",
            origin=origin,
            budget_bytes=budget,
            cuttable=cuttable,
            counters=self.counters,
            on_fetched=self.came.set,
        )

    def fetch_now(self, state: StoredState) -> Fetched:
        (filed,) = [each for each in self.find(state.tokens) if np.array_equal(each.tokens, state.tokens)]
        self.came.clear()
        self.fetch(filed)
        assert self.came.wait(10)
        (fetched,) = self.fetched()
        return fetched

    def has(self, state: StoredState) -> bool:
        return any(np.array_equal(each.tokens, state.tokens) for each in self.find(state.tokens))


@contextmanager
def opened(path: Path, **arguments: object) -> Iterator[Opened]:
    """Closed with time enough to write what it was given."""
    folder = Opened(path, **arguments)  # type: ignore[arg-type]
    folder.start()
    assert folder.looked.wait(10)
    try:
        yield folder
    finally:
        folder.close(10)
        assert not folder._thread.is_alive()


def state(seed: int, n: int = 100, *, n_bytes: int = 5000) -> StoredState:
    random = np.random.default_rng(seed)
    return StoredState(random.integers(0, 1000, n, dtype=np.int32), 0, random.integers(0, 256, n_bytes, dtype=np.uint8))


def begun_like(whole: StoredState, n: int) -> StoredState:
    return StoredState(whole.tokens[:n].copy(), 0, whole.blob[: 50 * n].copy())


def test_what_was_put_is_found_by_the_next(tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    with opened(tmp_path / "a/b") as folder:
        for each in states:
            folder.put(each)
        folder.put(states[0])
    assert folder.counters.n_states_written == 3
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o700
    with opened(tmp_path / "a/b") as folder:
        assert folder.counters.disk_bytes == sum(map(file_bytes, states))
        for each in states:
            found = folder.fetch_now(each).state
            assert found is not None
            assert np.array_equal(found.blob, each.blob)
        assert not folder.find(state(9).tokens)
        assert folder.counters.n_states_read == 3


def test_the_least_recently_used_leave(tmp_path: Path) -> None:
    states = [state(seed) for seed in range(5)]
    budget = 3 * file_bytes(states[0]) + 100
    with opened(tmp_path, budget=budget) as folder:
        for each in states[:3]:
            folder.put(each)
    for age, each in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)):
        os.utime(each, (age, age))
    with opened(tmp_path, budget=budget) as folder:
        assert folder.fetch_now(states[0]).state is not None
        for each in states[3:]:
            folder.put(each)
    with opened(tmp_path, budget=budget) as folder:
        assert [folder.has(each) for each in states] == [True, False, False, True, True]
    # A smaller budget is kept at once.
    with opened(tmp_path, budget=file_bytes(states[0])) as folder:
        assert folder.counters.disk_bytes <= file_bytes(states[0])
        assert len(list(tmp_path.iterdir())) == 1
        folder.put(state(7, n_bytes=10**6))  # over all of it
    assert folder.counters.n_states_written == 0


def test_a_longer_state_stands_for_a_shorter_one(tmp_path: Path) -> None:
    whole = state(0)
    for cuttable, left in ((True, [100]), (False, [80, 100])):
        with opened(tmp_path / str(cuttable), cuttable=cuttable) as folder:
            folder.put(begun_like(whole, 80))
            folder.put(whole)
            folder.put(begun_like(whole, 80))
        with opened(tmp_path / str(cuttable)) as folder:
            assert sorted(len(each.tokens) for each in folder.find(whole.tokens)) == left


def test_damaged_files_are_removed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = [state(seed) for seed in range(4)]
    with opened(tmp_path) as folder:
        for each in states:
            folder.put(each)
    paths = {each.name: each for each in tmp_path.iterdir()}
    names = [state_folder.name_of(ORIGIN, each.tokens) for each in states]
    paths[names[0]].write_bytes(paths[names[0]].read_bytes()[:-1])
    paths[names[1]].write_bytes(b"")
    data = bytearray(paths[names[2]].read_bytes())
    data[-1] ^= 1
    paths[names[2]].write_bytes(data)
    (tmp_path / "half.part").write_bytes(b"what a crash left")
    (tmp_path / "notes.txt").write_text("somebody's own")
    with opened(tmp_path) as folder:
        assert [folder.has(each) for each in states] == [False, False, True, True]
        # The state's own checksum is looked at when it is wanted.
        assert folder.fetch_now(states[2]).state is None
        assert not folder.has(states[2])
        assert folder.fetch_now(states[3]).state is not None
        assert folder.counters.n_states_damaged == 3
    assert [record.code for record in caplog.records] == ["prefix.state_damaged"] * 3  # type: ignore[attr-defined]
    assert {each.name for each in tmp_path.iterdir()} == {names[3], "notes.txt"}


def test_a_file_that_vanished_is_no_longer_found(tmp_path: Path) -> None:
    given = state(0)
    with opened(tmp_path) as folder:
        folder.put(given)
    with opened(tmp_path) as folder:
        next(tmp_path.iterdir()).unlink()
        assert folder.fetch_now(given).state is None
        assert not folder.has(given)


def test_another_ones_files_age_and_are_not_read(tmp_path: Path) -> None:
    given = state(0)
    with opened(tmp_path) as folder:
        folder.put(given)
    with opened(tmp_path, origin=ORIGIN[::-1]) as folder:
        assert not folder.has(given)
        assert folder.counters.disk_bytes == file_bytes(given)
        folder.put(given)
    assert len(list(tmp_path.iterdir())) == 2
    with opened(tmp_path) as folder:
        assert folder.has(given)
    # A file that is another's under a name of this one's.
    ours = tmp_path / state_folder.name_of(ORIGIN, given.tokens)
    (tmp_path / state_folder.name_of(ORIGIN[::-1], given.tokens)).replace(ours)
    with opened(tmp_path) as folder:
        assert not folder.has(given)
        assert not ours.exists()


def test_a_folder_that_cannot_be_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("no folder")
    with opened(tmp_path / "file/states") as folder:
        for seed in range(3):
            folder.put(state(seed))
        assert not folder.find(state(0).tokens)
    assert [record.code for record in caplog.records] == ["prefix.disk_failed"]  # type: ignore[attr-defined]
    assert "PREFIX_CACHE_DISK_MB=0" in caplog.messages[0]
    assert folder.counters.n_states_written == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_still_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = state(0)
    with opened(tmp_path) as folder:
        folder.put(given)
    tmp_path.chmod(0o500)
    try:
        with opened(tmp_path) as folder:
            folder.put(state(1))
            assert folder.fetch_now(given).state is not None
    finally:
        tmp_path.chmod(0o700)
    assert [record.code for record in caplog.records] == ["prefix.disk_failed"]  # type: ignore[attr-defined]


def test_a_disk_that_is_full_is_told_once_and_leaves_no_half_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of the process's files stands in for the disk's end: the write fails in the middle all the same."""
    given = state(0)
    with opened(tmp_path) as folder:
        folder.put(given)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = Opened(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        folder.start()
        for seed in range(1, 4):
            folder.put(state(seed, n_bytes=100_000))
        folder.close(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [record.code for record in caplog.records] == ["prefix.disk_failed"]  # type: ignore[attr-defined]
    assert len(list(tmp_path.iterdir())) == 1
    with opened(tmp_path) as folder:
        assert folder.fetch_now(given).state is not None


def test_more_than_the_disk_can_take_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_folder, "_WAITING_BYTES", 12_000)
    folder = Opened(tmp_path)  # not started: a disk that takes nothing
    for seed in range(5):
        folder.put(state(seed))
    assert len(folder._to_write) == 2
    folder.put(state(6), last=True)
    assert len(folder._to_write) == 3


def test_an_end_waits_no_longer_than_it_may(tmp_path: Path) -> None:
    folder = Opened(tmp_path, budget=10**9)
    folder.start()
    for seed in range(50):
        folder.put(state(seed, n_bytes=2**20), last=True)
    folder.close(0.0)
    assert not folder._thread.is_alive()
    assert folder.counters.n_states_written < 50
    assert not list(tmp_path.glob("*.part"))


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = state(0)
    with opened(tmp_path) as folder:
        folder.put(given)
    hanging, hang = threading.Event(), threading.Event()

    def forced_hang(*_: object) -> StoredState:
        hanging.set()
        assert hang.wait(10)
        return given

    monkeypatch.setattr(state_folder, "read_state", forced_hang)
    with opened(tmp_path) as folder:
        folder.fetch(folder.find(given.tokens)[0])
        assert hanging.wait(10)
        assert not folder.late()
        monkeypatch.setattr(state_folder, "_LATE_S", -1.0)
        assert folder.late()
        assert not folder.late()
        assert not folder.find(given.tokens)
        hang.set()
    assert [record.code for record in caplog.records] == ["prefix.disk_failed"]  # type: ignore[attr-defined]
