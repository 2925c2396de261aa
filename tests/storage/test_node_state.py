"""What a node remembers, and that a damaged memory is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.node_state import NodeState


def test_what_is_remembered_is_told(tmp_path: Path) -> None:
    state = NodeState(tmp_path / "state.json")
    assert state.models() is None
    state.remember(["a", "b"])
    assert NodeState(tmp_path / "state.json").models() == ["a", "b"]
    state.remember([])
    assert state.models() == []
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"{}",
        b'{"models": "a"}',
        b'{"models": [1]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(damage)
    assert NodeState(path).models() is None
    NodeState(path).remember(["a"])
    assert NodeState(path).models() == ["a"]


def test_a_folder_that_is_not_there_is_an_error_when_writing(tmp_path: Path) -> None:
    state = NodeState(tmp_path / "nowhere" / "state.json")
    assert state.models() is None
    with pytest.raises(OSError, match="nowhere"):
        state.remember(["a"])
