"""Streams that leave at random: a short run in the suite, the long one in `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.streams import Plan, Streams


async def test_streams_that_leave_cut_no_other_and_leave_nothing(tmp_path: Path) -> None:
    outcome = await Streams(tmp_path, Plan(n_streams=40, seconds=2, warm_s=0.5)).run()
    assert not outcome.faults, outcome.text()
    assert outcome.n_left > 10
    assert outcome.n_kept > outcome.n_left
    assert outcome.by_door.keys() == {"native", "chat", "nats"}


@pytest.mark.soak
@pytest.mark.timeout(400)
async def test_two_hundred_streams_for_two_minutes(tmp_path: Path) -> None:
    outcome = await Streams(tmp_path, Plan()).run()
    print(outcome.text())
    assert not outcome.faults, outcome.text()
    assert outcome.n_left > 1000
