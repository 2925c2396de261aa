"""The monitor on a real broker: it finds what is there, keys work, and it outlives the broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import nats
import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from infsvc.onlooker import Onlooker
from tests.nodes import free_port
from tui.monitor.app import Detail, MonitorApp

from .conftest import Pair


async def until(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    for _ in range(400):
        if condition():
            return
        await pilot.pause(0.02)
    raise AssertionError(f"never held; the screen says: {text_of(pilot.app)}")


def text_of(app: Any) -> str:
    """The screen as it is drawn."""
    lines = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in lines)


def lines_of(app: Any) -> list[str]:
    table = app.screen_stack[0].query_one(DataTable)
    return [" ".join(str(cell).strip() for cell in table.get_row_at(n)) for n in range(table.row_count)]


@pytest.mark.parametrize("size", [(80, 24), (120, 30), (40, 10)])
async def test_every_node_is_seen_at_every_width(pair: Pair, size: tuple[int, int]) -> None:
    app = MonitorApp(Onlooker(pair.url), shown_url=pair.url)
    async with app.run_test(size=size) as pilot:
        await until(pilot, lambda: len(lines_of(app)) == 3 and all("online" in line for line in lines_of(app)))
        # The rows are there a frame before they are drawn.
        await until(pilot, lambda: "only-v1.5" in text_of(app))
        shown = text_of(app)
        assert all(len(line) == size[0] for line in shown.splitlines())
        assert "only-v1.5" in shown
        assert "quit" in shown
        if size[0] >= 80:
            assert [line.split()[:2] for line in lines_of(app)] == [
                ["only-v1.5", "beta"],
                ["tiny", "alpha"],
                ["tiny", "beta"],
            ]
            assert "2 nodes  3/3 up" in shown
            assert "healthy" in shown
            assert "queue 0" in shown.splitlines()[0]
            assert " detail  s sort" in shown


async def test_dead_letters_are_counted_with_where_to_look(pair: Pair) -> None:
    app = MonitorApp(Onlooker(pair.url), shown_url=pair.url)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: len(lines_of(app)) == 3)
        assert "could not be answered" not in text_of(app)
        nc = await nats.connect(pair.url)
        for data in (b"nonsense", b'{"input": "nobody"}'):
            await nc.jetstream().publish("inference.queue.tiny", data)
        await nc.close()
        told = "✕ 2 requests could not be answered: `infsvc queue dead`, or Queue in the app"
        await until(pilot, lambda: told in text_of(app))
        for letter in await pair.beta.durable.dead.page():
            await pair.beta.durable.dead.delete(letter.id)
        await until(pilot, lambda: "could not be answered" not in text_of(app))
        await pilot.press("q")


async def test_keys_sort_filter_and_open_a_model(pair: Pair) -> None:
    app = MonitorApp(Onlooker(pair.url), shown_url=pair.url)
    async with app.run_test(size=(120, 30)) as pilot:
        await until(pilot, lambda: len(lines_of(app)) == 3)
        await pilot.press("s")
        assert app.sort_by == "node"
        assert lines_of(app)[0].split()[:2] == ["tiny", "alpha"]
        await pilot.press("slash", *"beta")
        await until(pilot, lambda: len(lines_of(app)) == 2)
        await pilot.press("enter", "enter")
        await until(pilot, lambda: isinstance(app.screen, Detail) and "inference.request" in text_of(app))
        assert "16,384 tokens" in text_of(app)
        await pilot.press("escape")
        await pilot.press("escape")
        await until(pilot, lambda: len(lines_of(app)) == 3)
        await pilot.press("slash", *"nothing")
        await until(pilot, lambda: "No model matches nothing" in text_of(app))
        await pilot.press("escape", "t", "q")
    assert app.return_code == 0


async def test_a_change_shows_and_the_broker_may_go_and_come(pair: Pair) -> None:
    app = MonitorApp(Onlooker(pair.url), shown_url=pair.url)
    async with app.run_test(size=(120, 30)) as pilot:
        await until(pilot, lambda: len(lines_of(app)) == 3)
        await pair.beta.unload("only-v1.5")
        await until(pilot, lambda: "offline" in lines_of(app)[0])
        broker = pair.alpha.bus._broker
        assert broker is not None
        await broker.stop(grace_s=0)
        await until(pilot, lambda: "✕ down" in text_of(app))
        assert len(lines_of(app)) == 3
        await until(pilot, lambda: "● " in str(app.query_one("#head", Static).render()))


async def test_without_a_broker_it_says_so_and_waits() -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    app = MonitorApp(Onlooker(url), shown_url=url)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "no broker answers at" in text_of(app))
        await pilot.press("enter", "s", "q")
    assert app.return_code == 0


async def test_an_onlooker_needs_no_screen(pair: Pair) -> None:
    onlooker = Onlooker(pair.url)
    running = asyncio.create_task(onlooker.run())
    async with asyncio.timeout(10):
        while len(onlooker.roster.sightings()) < 3:
            await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert onlooker.roster.nodes() == ["alpha", "beta"]
