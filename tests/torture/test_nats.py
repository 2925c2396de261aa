"""A short torture run in the suite; `make torture` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.nats import Plan, Torture


@pytest.mark.timeout(120)
async def test_nodes_and_broker_are_killed_and_every_durable_request_is_answered_once(tmp_path: Path) -> None:
    plan = Plan(seed=12, n_durable=90, n_asked=10, n_kills=3, pause_s=(0.8, 1.6), patience_s=60, ask_s=2)
    outcome = await Torture(tmp_path, plan).run()
    assert outcome.n_kills.keys() == {"alpha", "beta", "broker"}
    assert not outcome.faults, outcome.text()
    assert (outcome.n_answered, outcome.n_twice_unexcused) == (90, 0)
