"""Fleet: what the matrix shows, filter and sort, many models, sizes, the copied command."""

from __future__ import annotations

import contextlib
import copy
import shlex

import pytest
from textual.coordinate import Coordinate
from tui_sample import SampleNode, SampleWorker, busy_node, demo_worker, sample_app

from infsvc.types import ModelState
from tui.screens.dialogs import ModelDetail
from tui.screens.fleet import curl
from tui.widgets.capability_matrix import layout
from tui.widgets.model_facts import ModelPanel


def rows(app) -> list[str]:
    return [row.key.value for row in app._fleet.table.ordered_rows]


def cell(app, model: str, column: str) -> str:
    return app._fleet.table.get_cell(model, column).plain.strip()


async def test_states_are_glyph_and_word() -> None:
    app = sample_app(busy_node())
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.pause()
        states = {name: cell(app, name, "state") for name in rows(app)}
        assert states == {
            "demo": "● ready",
            "gemma3-270m": "● busy 2/2",
            "gpt-oss-20b": "○ absent",
            "llama3-8b": "✕ failed",
            "nomic-embed-v1.5": "○ on disk",
            "qwen3-4b": "◐ loading 61 %",
        }
        assert cell(app, "gemma3-270m", "queue") == "6 ▲"
        assert cell(app, "gemma3-270m", "ttft") == "210 ms"
        assert cell(app, "demo", "reasoning") == "✓"
        assert cell(app, "gemma3-270m", "reasoning") == "·"
        assert cell(app, "gpt-oss-20b", "reasoning") == "–"


async def test_only_changed_cells_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.pause()
        matrix = app._fleet.table
        written: list[Coordinate] = []
        update = matrix.update_cell_at
        monkeypatch.setattr(matrix, "update_cell_at", lambda at, value: (written.append(at), update(at, value)))
        matrix.look()
        assert written == []
        node.fleet.workers["gemma3-270m"].n_waiting = 11
        matrix.look()
        assert [matrix.ordered_columns[at.column].key.value for at in written] == ["queue"]
        assert cell(app, "gemma3-270m", "queue") == "11 ■"


async def test_filter_narrows_by_name_state_and_capability_and_esc_shows_all() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.press("slash", *"qwen")
        assert rows(app) == ["demo", "qwen3-4b"]
        await pilot.press("escape", "slash", *"failed", "enter")
        assert rows(app) == ["llama3-8b"]
        assert app._fleet.table.has_focus
        await pilot.press("escape", "slash", *"zzz")
        assert rows(app) == []
        assert app._fleet.query_one("#models").has_class("-empty")
        await pilot.press("escape")
        assert len(rows(app)) == 6


async def test_sort_goes_round_and_the_cursor_stays_on_its_model() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.press("down", "down", "down")
        assert app._fleet.table.chosen == "llama3-8b"
        await pilot.press("s")
        assert rows(app)[0] == "demo"
        assert rows(app)[-2:] == ["gpt-oss-20b", "nomic-embed-v1.5"]
        assert app._fleet.table.chosen == "llama3-8b"
        await pilot.press("s")
        assert rows(app)[0] == "gemma3-270m"
        await pilot.press("s", "s", "s")
        assert rows(app) == sorted(rows(app))


async def test_rows_follow_the_order_as_figures_change() -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("s", "s")
        node.fleet.workers["qwen3-4b"].n_waiting = 99
        app._fleet.table.resort()
        assert rows(app)[0] == "qwen3-4b"


async def test_the_failed_reason_is_seen_at_80_by_24(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("down", "down", "down")
        panel = app._fleet.query_one(ModelPanel)
        await until(pilot, lambda: "needs 6.9 GiB" in str(panel.render()))


async def test_enter_opens_the_detail_and_it_lives() -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=(120, 60)) as pilot:
        await pilot.press("down", "enter")
        await pilot.pause()
        assert isinstance(app.screen, ModelDetail)
        facts = str(app.screen.query_one("#facts").render())
        assert "48,210" in facts
        assert "inference.request.gemma3-270m" in facts
        await pilot.press("escape")
        assert not isinstance(app.screen, ModelDetail)


def crowd(n: int) -> list[SampleWorker]:
    """Many idle models; one worker file read once."""
    first = SampleWorker("model")
    workers = []
    for index in range(n):
        worker = copy.copy(first)
        worker.name = f"model-{index:05}"
        workers.append(worker)
    return workers


async def test_ten_thousand_models_leave_the_screen_quick(until) -> None:
    workers = crowd(10_000)
    app = sample_app(SampleNode(*workers))
    async with app.run_test(size=(120, 32)) as pilot:
        matrix = app._fleet.table
        await until(pilot, lambda: matrix.row_count >= 150)
        await pilot.press("down", "down")
        assert matrix.chosen == "model-00002"
        workers[0].n_waiting = 9
        matrix.look()
        assert cell(app, "model-00000", "queue") == "9 ▲"
        await pilot.press("slash", *"09999")
        assert rows(app) == ["model-09999"]


@pytest.mark.soak
async def test_ten_thousand_rows_all_come(until) -> None:
    app = sample_app(SampleNode(*crowd(10_000)))
    async with app.run_test(size=(120, 32)) as pilot:
        matrix = app._fleet.table
        for _ in range(20):
            with contextlib.suppress(AssertionError):
                await until(pilot, lambda: matrix.row_count == 10_000)
        await pilot.press("ctrl+end")
        await until(pilot, lambda: matrix.chosen == "model-09999")


@pytest.mark.parametrize("width", range(20, 250, 7))
def test_columns_fit_every_width_and_the_essentials_stay(width: int) -> None:
    widths = layout(width)
    assert {"model", "state", "queue", "tok/s"} <= set(widths)
    assert sum(size + 1 for size in widths.values()) <= max(width, 38)


def test_columns_come_in_order_of_need() -> None:
    assert "ttft" in layout(79)
    assert "tool-calling" in layout(79)
    assert set(layout(55)) == {"model", "state", "queue", "tok/s"}
    assert set(layout(117)) >= {"ctx", "quant", "params", "load"}
    assert "arch" in layout(130)


async def test_resize_there_and_back(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.press("down")
        await pilot.resize_terminal(50, 14)
        await until(pilot, lambda: len(app._fleet.table.columns) == 4)
        await pilot.resize_terminal(30, 8)
        await until(pilot, lambda: not app._fleet.table.region)
        await pilot.resize_terminal(160, 48)
        await until(pilot, lambda: len(app._fleet.table.columns) == 15)
        assert app._fleet.table.chosen == "gemma3-270m"


async def test_a_model_that_comes_or_goes_is_seen() -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.pause()
        node.fleet.workers["new"] = demo_worker(ModelState.ON_DISK)
        node.fleet.workers["new"].name = "new"
        app._fleet.look()
        assert "new" in rows(app)
        del node.fleet.workers["new"]
        app._fleet.look()
        assert "new" not in rows(app)


async def test_names_with_markup_are_shown_as_they_are() -> None:
    worker = SampleWorker("a.b")
    worker.name, worker.reason, worker.state = "[red]x[/]\x1b[2J", "broke [/oops]", ModelState.FAILED
    node = SampleNode(worker)
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.pause()
        assert app._fleet.table.get_row(worker.name)[0].plain.strip().startswith("[red]x[/][2J")
        await pilot.press("enter")
        await pilot.pause()
        assert "broke [/oops]" in str(app.screen.query_one("#facts").render())


async def test_c_copies_a_command_that_asks_the_model() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.press("c")
        words = shlex.split(app.clipboard)
        assert words[:3] == ["curl", "-s", "http://127.0.0.1:5769/v1/completions"]


def test_a_model_without_a_port_is_asked_through_the_gateway() -> None:
    command = curl(SampleWorker("plain"), "http://127.0.0.1:5780")
    assert "http://127.0.0.1:5780/v1/completions" in command
    assert '"model": "plain"' in command
