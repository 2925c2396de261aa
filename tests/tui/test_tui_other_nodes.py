"""Models of other nodes on the Fleet screen: a line each below the own ones, marked by their node."""

from __future__ import annotations

import pytest
from tui_sample import busy_node, sample_app

from tests.infsvc.test_roster import health, report
from tui.widgets.other_nodes import MAX_LINES, OtherNodes


@pytest.mark.parametrize("size", [(160, 48), (80, 24), (40, 24)])
async def test_other_nodes_models_are_marked_and_filtered(size: tuple[int, int]) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        others = app._fleet.query_one(OtherNodes)
        assert not others.display
        node.registry.roster.hear_health(health("far", "beta"), response_time_ms=3)
        node.registry.roster.hear_report(report("far", "beta"))
        app._fleet.look()
        await pilot.pause()
        app._fleet.look()
        line = str(others.render())
        assert others.display
        assert line.startswith("far @beta ")
        assert "● online" in line
        assert len(line.rstrip()) <= size[0]
        if size[0] >= 80:
            assert "critical" in line
        app._fleet.table.filter_text = "demo"
        app._fleet.look()
        assert not others.display


async def test_many_leave_room_for_the_own_models() -> None:
    node = busy_node()
    for n in range(50):
        node.registry.roster.hear_health(health(f"m{n:02}", "beta"))
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.pause()
        app._fleet.look()
        lines = str(app._fleet.query_one(OtherNodes).render()).splitlines()
        assert len(lines) == MAX_LINES
        assert lines[-1] == f"… {50 - MAX_LINES + 1} more on other nodes: infsvc monitor"
        assert app._fleet.table.size.height >= 4
