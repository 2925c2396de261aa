"""All that a node can at once: a short run in the suite, ten minutes in `make soak` (`SOAK_MIXED_S` for another
time)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.mixed import SECONDS, Mixed, Plan

KINDS = {"generate", "chat", "embed", "grammar", "schema", "leave", "cancel"}


async def test_mixed_clients_get_whole_answers_and_leave_nothing(tmp_path: Path) -> None:
    outcome = await Mixed(tmp_path, Plan(seconds=2, warm_s=1.0, mark_s=0.5)).run()
    assert not [fault for fault in outcome.faults if not fault.startswith("memory")], outcome.text()
    assert outcome.n_done.keys() == KINDS
    assert outcome.marks


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 300)
async def test_memory_is_flat_under_mixed_clients(tmp_path: Path) -> None:
    outcome = await Mixed(tmp_path, Plan()).run()
    print(outcome.text())
    assert not outcome.faults, outcome.text()
    assert min(outcome.n_done.values()) > 20
