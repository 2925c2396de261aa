"""The Queue screen: what the broker has, dead letters by the thousand, and what is done to them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Log
from tui_sample import SampleBusState, SampleLetter, SampleNode, busy_node, queue_node, sample_app

from infsvc.errors import QueueFull, QueueUnavailable
from infsvc.events import BrokerStateChanged, DeadLettersChanged
from tui.app import InfsvcApp
from tui.screens.dead_letter import DeadLetterDetail
from tui.screens.dialogs import Question
from tui.screens.queue import QueueScreen
from tui.widgets.header import StatusHeader
from tui.widgets.row_list import RowList

Until = Callable[[Pilot[Any], Callable[[], object]], Awaitable[None]]


def screen_of(app: InfsvcApp) -> QueueScreen:
    screen = app.screen_stack[0]
    assert isinstance(screen, QueueScreen)
    return screen


async def opened(app: InfsvcApp, pilot: Pilot[Any], until: Until, n: int) -> QueueScreen:
    """The screen once it lists so many letters."""
    await until(pilot, lambda: app.context and app.context.phase == "running")
    await pilot.press("6")
    screen = screen_of(app)
    await until(pilot, lambda: len(screen.letters.rows) == n and screen._dead.was_read)
    await pilot.pause()
    return screen


def seen(widget: RowList[Any]) -> list[str]:
    """The lines that the list draws."""
    return [widget.render_line(y).text.rstrip() for y in range(widget.size.height)]


def note_of(screen: QueueScreen) -> str:
    return str(screen.query_one(".note").render())


async def test_ten_thousand_letters_cost_what_is_in_sight(until: Until) -> None:
    app = sample_app(queue_node(10_000))
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(app, pilot, until, 10_000)
        assert "order-09999" in "\n".join(seen(screen.letters))
        assert screen.letters.chosen is not None
        assert screen.letters.chosen.id == 10_000
        await pilot.press("end")
        assert screen.letters.chosen.id == 1
        assert "order-00001" in seen(screen.letters)[-1]
        await pilot.press("slash", *"order-04321", "enter")
        await until(pilot, lambda: len(screen.letters.rows) == 1)
        assert screen.letters.chosen.id == 4321
        assert "1/10,000 match" in note_of(screen)
        await pilot.press("escape", "s")
        await until(pilot, lambda: len(screen.letters.rows) == 10_000)
        assert screen.letters.rows[0].id == 1
        assert screen.letters.chosen.id == 4321


async def test_queues_and_letters_follow_events_and_nothing_is_asked_without(until: Until) -> None:
    node = queue_node(3)
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        screen = await opened(app, pilot, until, 3)
        lines = "\n".join(seen(screen.queues))
        assert "12" in lines
        assert "1,204" in lines
        n_asked = node.queue_desk.n_asked
        node.queue_desk.queues[0]["waiting"] = 77
        for _ in range(3):
            screen.look()
        assert node.queue_desk.n_asked == n_asked
        node.durable.dead.put(SampleLetter(id=9, req_id="new one"))
        node.happen(DeadLettersChanged(n_kept=4))
        await until(pilot, lambda: len(screen.letters.rows) == 4)
        assert "77" in "\n".join(seen(screen.queues))
        del node.durable.dead.letters[2]
        node.happen(DeadLettersChanged(n_kept=3))
        await until(pilot, lambda: [row.id for row in screen.letters.rows] == [9, 3, 1])
        # Nobody looks: nothing is asked.
        await pilot.press("1")
        n_read = node.durable.dead.n_read
        node.happen(DeadLettersChanged(n_kept=3))
        await pilot.pause(0.05)
        assert node.durable.dead.n_read == n_read
        await pilot.press("6")
        await until(pilot, lambda: node.durable.dead.n_read > n_read)


async def test_the_tabs_of_every_screen_say_that_there_are_dead_letters(until: Until) -> None:
    node = queue_node(12)
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: "✕12" in str(app.screen.query_one(".tabs").render()))
        assert app.current_mode == "fleet"
        node.durable.dead.letters.clear()
        node.durable.dead.n_kept = 0
        await until(pilot, lambda: "✕" not in str(app.screen.query_one(".tabs").render()))


async def test_one_letter_is_replayed_at_once_and_deleted_after_a_question(until: Until) -> None:
    node = queue_node(3)
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(app, pilot, until, 3)
        await pilot.press("r")
        await until(pilot, lambda: node.calls[-1] == "replay 3" and len(screen.letters.rows) == 2)
        await pilot.press("x")
        assert isinstance(app.screen, Question)
        await pilot.press("enter")
        assert len(node.durable.dead.letters) == 2
        await pilot.press("x", "y")
        await until(pilot, lambda: node.calls[-1] == "delete 2" and len(screen.letters.rows) == 1)


async def test_what_the_filter_shows_is_replayed_in_the_order_of_death(until: Until) -> None:
    node = queue_node(9)
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(app, pilot, until, 9)
        await pilot.press("slash", *"gemma3", "enter")
        await until(pilot, lambda: len(screen.letters.rows) == 3)
        await pilot.press("R")
        assert "all 3 dead letters that match “gemma3”" in str(app.screen.query_one(".question").render())
        await pilot.press("y")
        await until(pilot, lambda: not screen.letters.rows)
        assert node.calls[-3:] == ["replay 1", "replay 4", "replay 7"]
        await pilot.press("escape")
        await until(pilot, lambda: len(screen.letters.rows) == 6)
        await pilot.press("X", "y")
        await until(pilot, lambda: not node.durable.dead.letters)
        await until(pilot, lambda: "There is no dead letter" in str(screen.query_one("#nothing").render()))


async def test_a_full_queue_ends_a_replay_of_many_in_words(until: Until) -> None:
    node = queue_node(3)
    node.durable.dead.replay_error = QueueFull(model="demo", n_waiting=16, capacity=16, retry_after_s=5)
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        screen = await opened(app, pilot, until, 3)
        await pilot.press("R", "y")
        await until(pilot, lambda: any("16 requests waiting" in toast.message for toast in app._notifications))
        assert len(screen.letters.rows) == 3
        assert not screen._doing


async def test_esc_stops_a_replay_of_many(until: Until) -> None:
    import asyncio

    node = queue_node(5)
    node.durable.dead.hold = asyncio.Event()
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        screen = await opened(app, pilot, until, 5)
        await pilot.press("R", "y")
        await until(pilot, lambda: screen._doing)
        await pilot.press("r")
        assert any("Esc stops that first" in toast.message for toast in app._notifications)
        await pilot.press("escape")
        node.durable.dead.hold.set()
        await until(pilot, lambda: not screen._doing)
        assert len(node.durable.dead.letters) == 4


async def test_purge_names_the_queue_and_asks(until: Until) -> None:
    node = queue_node(1)
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(app, pilot, until, 1)
        await pilot.press("tab", "down", "p")
        told = str(app.screen.query_one(".question").render())
        assert "1,204 requests" in told
        assert "gemma3-270m" in told
        await pilot.press("y")
        await until(pilot, lambda: node.calls[-1] == "purge gemma3-270m")


async def test_enter_shows_the_whole_body_and_what_can_be_done(until: Until) -> None:
    node = queue_node(1)
    node.durable.dead.letters[1].body = {"req_id": "r", "input": "x" * 200_000 + "the end\x1b[2J"}
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(app, pilot, until, 1)
        await pilot.press("enter")
        assert isinstance(app.screen, DeadLetterDetail)
        log = app.screen.query_one(Log)
        await until(pilot, lambda: log.line_count > 2_000)
        text = "".join(log.lines)
        assert text.count("x") >= 200_000
        assert "the end" in text
        assert "\x1b" not in text
        assert "expired in the queue" in str(app.screen.query_one("#facts").render())
        await pilot.press("r")
        await until(pilot, lambda: node.calls[-1] == "replay 1")


async def test_a_letter_that_went_meanwhile_is_said(until: Until) -> None:
    node = queue_node(1)
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await opened(app, pilot, until, 1)
        node.durable.dead.letters.clear()
        await pilot.press("enter")
        await until(pilot, lambda: "there is no dead letter 1" in "".join(app.screen.query_one(Log).lines))


async def test_a_broker_that_goes_leaves_what_was_seen(until: Until) -> None:
    node = queue_node(3)
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        screen = await opened(app, pilot, until, 3)
        node.bus.state = SampleBusState(status="down", reason="connection refused")
        node.durable.dead.error = QueueUnavailable("there is no connection to the broker")
        node.happen(BrokerStateChanged(state="down", url=node.bus.state.url, embedded=True))
        await until(pilot, lambda: "as last seen" in note_of(screen))
        assert len(screen.letters.rows) == 3
        assert "The broker is down: connection refused" in str(screen.query_one("#caps").render())
        await pilot.press("r")
        await until(pilot, lambda: any("no connection" in toast.message for toast in app._notifications))
        assert len(screen.letters.rows) == 3


async def test_no_durable_queue_is_said_with_its_reason(until: Until) -> None:
    node = busy_node()
    off = "the durable queue is off: JetStream is switched off on this broker"
    node.queue_desk.queues = [
        {"model": "demo", "capacity": 2000, "max_age_s": 60.0, "max_deliver": 5, "max_ack_pending": 64,
         "durable": False, "reason": off}
    ]  # fmt: skip
    node.durable.dead.error = QueueUnavailable("the broker's dead letters cannot be reached: JetStream is switched off")
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        await until(pilot, lambda: app.context and app.context.phase == "running")
        await pilot.press("6")
        screen = screen_of(app)
        await until(pilot, lambda: "JetStream is switched off" in str(screen.query_one("#nothing").render()))
        await until(pilot, lambda: off in str(screen.query_one("#caps").render()))
        assert "✕ off" in "\n".join(seen(screen.queues))


@pytest.mark.parametrize("size", [(40, 10), (80, 24), (200, 50)], ids=str)
async def test_it_works_at_every_size(until: Until, size: tuple[int, int]) -> None:
    app = sample_app(queue_node(100))
    async with app.run_test(size=size) as pilot:
        screen = await opened(app, pilot, until, 100)
        assert screen.letters.size.height >= 3
        await pilot.press(*["down"] * 5)
        assert screen.letters.chosen is not None
        assert screen.letters.chosen.id == 95
        line = 1 + screen.letters.cursor - int(screen.letters.scroll_y)
        assert "demo" in seen(screen.letters)[line] or "gemma3" in seen(screen.letters)[line]
        await pilot.click(screen.letters, offset=(3, 1))
        first = screen.letters.chosen.id
        assert first == screen.letters.rows[int(screen.letters.scroll_y)].id
        await pilot.press("pagedown", "pageup", "home")
        assert screen.letters.chosen.id == 100
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: screen.letters.size.width >= 78)
        assert screen.letters.chosen.id == 100


async def test_enter_on_a_queue_narrows_the_letters_to_it(until: Until) -> None:
    app = sample_app(queue_node(9))
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(app, pilot, until, 9)
        await pilot.press("tab", "down", "enter")
        await until(pilot, lambda: len(screen.letters.rows) == 3)
        assert screen.query_one("#filter", Input).value == "gemma3-270m"


async def test_without_colour_state_has_a_word(until: Until, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = sample_app(queue_node(3))
    async with app.run_test(size=(80, 24)) as pilot:
        screen = await opened(app, pilot, until, 3)
        assert app.no_color
        assert "● on" in "\n".join(seen(screen.queues))
        cursor = screen.letters.render_line(1)
        other = screen.letters.render_line(2)
        assert cursor._segments[0].style != other._segments[0].style


async def test_a_model_that_only_embeds_is_not_offered_for_chat(until: Until) -> None:
    from tui.commands import NodeCommands

    node: SampleNode = busy_node()
    # Read from its file, whatever its worker file says.
    nomic = node.fleet.workers["nomic-embed-v1.5"]
    nomic.settings = nomic.settings.model_copy(update={"model_format": "auto"})
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.context and app.context.phase == "running")
        titles = [title for title, *_ in NodeCommands(app.screen)._commands()]
        assert "Chat with demo" in titles
        assert "Load nomic-embed-v1.5" in titles
        assert "Chat with nomic-embed-v1.5" not in titles
        app._fleet.table.move_cursor(row=4)
        await pilot.pause()
        assert app._fleet.table.chosen == "nomic-embed-v1.5"
        await pilot.press("t")
        await until(pilot, lambda: any("only embeds" in toast.message for toast in app._notifications))
        assert app.current_mode == "fleet"
        assert app.screen_stack[0].query_one(StatusHeader)
