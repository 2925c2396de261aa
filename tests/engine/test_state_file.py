"""A state as a file: what was written comes back, and nothing else ever does."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from engine.prefix_cache import StoredState
from engine.state_file import (
    PART_SUFFIX,
    file_bytes,
    is_of,
    model_stamp,
    name_of,
    origin_of,
    read_head,
    read_state,
    write_state,
)
from infsvc.errors import StateFileError

ORIGIN = b"0123456789abcdef"


def state(n: int = 100, *, n_bytes: int = 5000, first: int = 0, seed: int = 0) -> StoredState:
    random = np.random.default_rng(seed)
    return StoredState(
        random.integers(0, 2**31 - 1, n, dtype=np.int32), first, random.integers(0, 256, n_bytes, dtype=np.uint8)
    )


def written(folder: Path, given: StoredState) -> Path:
    filed = write_state(folder, ORIGIN, given, lambda: False)
    assert filed is not None
    return filed.path


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    given = state(first=76)
    path = written(tmp_path, given)
    assert path.name == name_of(ORIGIN, given.tokens)
    assert is_of(path.name, ORIGIN)
    assert not is_of(path.name, ORIGIN[::-1])
    assert path.stat().st_mode & 0o777 == 0o600
    head = read_head(path, ORIGIN)
    assert (head.first, head.n_bytes, head.file_bytes) == (76, 5000, path.stat().st_size)
    assert head.file_bytes == file_bytes(given)
    again = read_state(head, ORIGIN)
    assert again.first == 76
    assert np.array_equal(again.tokens, given.tokens)
    assert np.array_equal(again.blob, given.blob)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_no_byte_can_change_and_none_can_be_missing(tmp_path: Path) -> None:
    path = written(tmp_path, state(20, n_bytes=300))
    filed, data = read_head(path, ORIGIN), path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(StateFileError):
            read_state(filed, ORIGIN)
    for n in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:n])
        for read in (lambda: read_head(path, ORIGIN), lambda: read_state(filed, ORIGIN)):
            with pytest.raises(StateFileError):
                read()
    path.write_bytes(data + b"\0")
    with pytest.raises(StateFileError):
        read_head(path, ORIGIN)
    path.write_bytes(Random(0).randbytes(len(data)))
    with pytest.raises(StateFileError, match="no state"):
        read_head(path, ORIGIN)


def test_another_ones_state_is_not_read(tmp_path: Path) -> None:
    path = written(tmp_path, state())
    with pytest.raises(StateFileError, match="another model"):
        read_head(path, ORIGIN[::-1])


def test_a_writer_that_should_stop_leaves_nothing(tmp_path: Path) -> None:
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) > 2

    assert write_state(tmp_path, ORIGIN, state(), stopped) is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_state(tmp_path / "missing", ORIGIN, state(), lambda: False)
    assert not list(tmp_path.rglob(f"*{PART_SUFFIX}"))


def test_an_origin_is_a_files_and_a_contexts(tmp_path: Path) -> None:
    model = tmp_path / "a.gguf"
    model.write_bytes(Random(1).randbytes(10 * 2**20))
    origin = origin_of(model, "0.3", 512)
    assert origin == origin_of(model, "0.3", 512)
    assert len({origin, origin_of(model, "0.4", 512), origin_of(model, "0.3", 256)}) == 3
    # Another file of the same name, size and time.
    stat = model.stat()
    data = bytearray(model.read_bytes())
    data[:4] = b"else"
    model.write_bytes(data)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert origin_of(model, "0.3", 512) != origin
    # A copy elsewhere is the same model, as long as it keeps its time.
    copied = tmp_path / "there" / "b.gguf"
    copied.parent.mkdir()
    shutil.copy2(model, copied)
    assert origin_of(copied, "0.3", 512) == origin_of(model, "0.3", 512)
    os.utime(copied, ns=(0, 0))
    assert origin_of(copied, "0.3", 512) != origin_of(model, "0.3", 512)


def test_all_parts_of_a_model_count(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    for part in parts:
        part.write_bytes(b"x" * 100)
    (tmp_path / "other-00001-of-00002.gguf").write_bytes(b"x")
    assert [name for name, *_ in model_stamp(parts[0])] == [part.name for part in parts]
    origin = origin_of(parts[0])
    parts[1].write_bytes(b"y" * 100)
    assert origin_of(parts[0]) != origin
