"""Logs: levels, search, following, the bound, and how events read."""

from __future__ import annotations

from tui_sample import NOW, SampleNode, sample_app

from infsvc.events import BrokerStateChanged, LogLine, ModelProgress, RequestFinished
from tui.widgets.log_view import MAX_LINES, LogView
from tui.widgets.tab_line import TabLine
from tui.wording import clean, record_of, sparkline


def line(index: int, level: str = "info", msg: str = "said") -> LogLine:
    return LogLine(ts=NOW.timestamp(), model="demo", level=level, code="llama", msg=f"{msg} {index}")


def note(app) -> str:
    return str(app._logs.query_one(TabLine).query_one(".note").render())


async def test_lines_come_in_batches_and_the_level_hides_some() -> None:
    node = SampleNode()
    node.happen(line(0), line(1, "debug"), line(2, "error"))
    app = sample_app(node)
    async with app.run_test(size=(100, 24)) as pilot:
        await pilot.press("f5")
        view = app._logs.query_one(LogView)
        assert [text.split()[-1] for text in view.lines] == ["0", "2"]
        assert "following · from info on · 2 lines · 1 hidden" in note(app)
        await pilot.press("v", "v")
        assert [text.split()[-1] for text in view.lines] == ["2"]
        await pilot.press("v")
        assert len(view.lines) == 3


async def test_search_keeps_what_matches_and_esc_shows_all(until) -> None:
    node = SampleNode()
    node.happen(*(line(index, msg="odd" if index % 2 else "even") for index in range(10)))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f5", "slash", *"ODD", "enter")
        view = app._logs.query_one(LogView)
        assert len(view.lines) == 5
        node.happen(line(11, msg="odd"), line(12, msg="even"))
        await until(pilot, lambda: len(view.lines) == 6)
        await pilot.press("escape")
        assert len(view.lines) == 12


async def test_follow_off_stays_where_the_reader_is(until) -> None:
    node = SampleNode()
    node.happen(*(line(index) for index in range(200)))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f5")
        view = app._logs.query_one(LogView)
        await until(pilot, lambda: view.scroll_y == view.max_scroll_y > 100)
        await pilot.press("f", "home")
        node.happen(*(line(index) for index in range(50)))
        await until(pilot, lambda: len(view.lines) == 250)
        assert view.scroll_y == 0
        assert "not following" in note(app)
        await pilot.press("f")
        await until(pilot, lambda: view.scroll_y == view.max_scroll_y)


async def test_ten_thousand_lines_are_kept_and_the_lost_are_counted(until) -> None:
    node = SampleNode()
    app = sample_app(node)
    async with app.run_test() as pilot:
        node.happen(*(line(index) for index in range(MAX_LINES + 5)))
        await pilot.press("f5")
        view = app._logs.query_one(LogView)
        await until(pilot, lambda: len(view.lines) == MAX_LINES)
        assert "5 lost" in note(app)


async def test_what_is_read_further_up_stays_in_sight_when_old_lines_go(until) -> None:
    node = SampleNode()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f5")
        view = app._logs.query_one(LogView)
        node.happen(*(line(index) for index in range(MAX_LINES)))
        await until(pilot, lambda: view.scroll_y == view.max_scroll_y > 100)
        await pilot.press("pageup", "pageup")
        await until(pilot, lambda: view.scroll_y < view.max_scroll_y)
        read = view.lines[int(view.scroll_y)]
        node.happen(*(line(MAX_LINES + index) for index in range(70)))
        await until(pilot, lambda: view.lines[-1].endswith(f" {MAX_LINES + 69}"))
        assert view.lines[int(view.scroll_y)] == read


async def test_a_line_break_in_a_message_does_not_make_a_second_line() -> None:
    node = SampleNode()
    node.happen(line(0, msg="one\n14:00:00 error   demo"))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f5")
        assert len(app._logs.query_one(LogView).lines) == 1


def test_events_read_as_sentences() -> None:
    finished = RequestFinished(
        model="demo",
        req_id="r",
        tokens_in=5,
        tokens_out=7,
        ttft_ms=4,
        duration_ms=1500,
        finish_reason="stop",
        source="http",
    )
    assert record_of(finished).msg == "r  http  stop  5 in  7 out  first 4 ms  1.5 s"
    progress = ModelProgress(model="demo", done_bytes=2**29, total_bytes=2**30, bytes_per_s=2**23, eta_s=64)
    assert record_of(progress).msg == "50 % of 1.0 GiB  8.0 MiB/s"
    down = BrokerStateChanged(state="down", url="nats://x:1", embedded=True, reason="refused", retry_in_s=4)
    assert (record_of(down).level, record_of(down).msg) == ("error", "down embedded nats://x:1: refused, retry in 4 s")


def test_text_from_outside_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[31m\x9bb\r\nc\u202ed") == "a[31mb\ncd"


def test_sparklines_are_as_wide_as_asked_and_stand_at_the_right() -> None:
    assert sparkline([], 4) == "    "
    assert sparkline([0, 1, 2], 5) == "  ▁▅█"
    assert sparkline([1] * 9, 3, ceiling=7) == "▂▂▂"
