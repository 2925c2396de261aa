"""The app's life: first frame before the node, failing starts, quitting, keys everywhere, loading and unloading."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest
from textual.content import Content
from tui_sample import SampleNode, busy_node, demo_worker, sample_app

from infsvc.errors import ConfigError, HomeError, MemoryFitError, StartError
from infsvc.events import ModelStateChanged
from infsvc.types import ModelState
from tui.app import InfsvcApp
from tui.screens.dialogs import Help, Question
from tui.terminal import terminal_problem
from tui.widgets.header import StatusHeader
from tui.widgets.key_line import KeyLine
from tui.widgets.tab_line import fitted


async def test_the_first_frame_comes_before_the_node_starts(until) -> None:
    node = SampleNode(demo_worker(ModelState.ON_DISK))
    app = sample_app(node)
    seen: list[str] = []

    async def start() -> SampleNode:
        seen.append(app.screen.query_one("#matrix").get_row("demo")[0].plain.strip())
        return node

    node.start = start
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
    assert seen == ["demo"]


@pytest.mark.parametrize("error", [HomeError("in use"), StartError("port 5780 is taken"), ConfigError("bad", key="X")])
async def test_a_failed_start_ends_the_app_with_its_sentence(error: Exception, until, capsys) -> None:
    node = SampleNode()
    node.start_error = error
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.return_code is not None)
    assert app.return_code == 1
    assert capsys.readouterr().err.strip() == str(error)


async def test_quit_at_once_when_nothing_runs(until) -> None:
    node = SampleNode(demo_worker())
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("ctrl+q")
        await until(pilot, lambda: app.return_value is not None)
    assert app.return_value == 0
    assert node.calls == ["start", "close"]


async def test_quit_asks_while_requests_run_and_no_goes_back(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("ctrl+q")
        assert isinstance(app.screen, Question)
        await pilot.press("enter")
        assert not isinstance(app.screen, Question)
        assert app.context.phase == "running"
        await pilot.press("ctrl+q", "y")
        await until(pilot, lambda: app.return_value is not None)
    assert node.calls == ["start", "close"]


async def test_draining_is_told_until_the_node_has_closed(until) -> None:
    node = SampleNode(demo_worker())
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        node.hold_close()
        app.shut_down()
        app.shut_down()
        await pilot.pause()
        header = app.screen.query_one(StatusHeader)
        header.refresh_facts()
        assert "draining" in str(header.render())
        node.release_close()
        await until(pilot, lambda: app.return_value is not None)


async def test_screens_change_by_digit_and_by_function_key(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        for key, name in (
            ("5", "logs"),
            ("2", "chat"),
            ("f1", "fleet"),
            ("f5", "logs"),
            ("3", "queue"),
            ("f3", "queue"),
            ("1", "fleet"),
        ):
            if app.current_mode == "chat":
                await pilot.press("escape")
            await pilot.press(key)
            assert app.current_mode == name


async def test_digits_and_question_mark_belong_to_an_input() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.press("f2", "1", "5", "question_mark")
        assert app.current_mode == "chat"
        assert app._chat.prompt.text == "15?"
        await pilot.press("f12")
        assert isinstance(app.screen, Help)
        await pilot.press("f1")
        assert app.current_mode == "fleet"
        assert len(app.screen_stack) == 1


async def test_help_lists_every_key_that_has_a_sentence() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.pause()
        keys = dict(app._keys())
    assert keys["l"] == "Load the model under the cursor"
    assert keys["^q"] == "End the node; asks if it is busy"


async def test_help_tells_the_screens_keys_first_and_those_of_everywhere_in_order() -> None:
    app = sample_app(SampleNode(demo_worker()))
    async with app.run_test() as pilot:
        await pilot.press("f2", "f12")
        keys = [key for key, _ in app.screen._rows]
    assert keys[:2] == ["⏎", "esc"]
    assert keys[-8:] == ["F1", "F2", "F4", "F5", "F6", "?", "^p", "^q"]


async def test_the_line_of_keys_names_the_help_that_works_here() -> None:
    app = sample_app(SampleNode(demo_worker()))
    async with app.run_test() as pilot:
        assert app.screen.query_one(KeyLine).render().plain.rstrip().endswith("? help")
        await pilot.press("f2")
        assert app.screen.query_one(KeyLine).render().plain.rstrip().endswith("F12 help")


@pytest.mark.parametrize(("n_waiting", "timeless"), [(7, (40,)), (1999, (40, 60))])
@pytest.mark.parametrize("width", [40, 60, 71, 72, 80, 109, 110, 200])
async def test_no_width_of_the_header_cuts_a_figure(width: int, n_waiting: int, timeless: tuple[int, ...]) -> None:
    worker = demo_worker()
    worker.n_waiting = n_waiting
    app = sample_app(SampleNode(worker))
    async with app.run_test(size=(width, 24)):
        shown = app.screen.query_one(StatusHeader).render().plain
    assert len(shown) <= width
    assert f" {n_waiting:,}" in shown
    assert ("14:07" in shown) is (width not in timeless)


def test_a_note_ends_at_a_whole_part() -> None:
    note = Content("demo ● ready ▾   t 0.7  max 512 · more")
    assert [fitted(note, room).plain for room in (40, 32, 20, 3)] == [
        "demo ● ready ▾   t 0.7  max 512 · more",
        "demo ● ready ▾   t 0.7  max 512",
        "demo ● ready ▾",
        "demo ● ready ▾",
    ]


async def test_load_and_unload_are_handed_to_the_node(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: node.entered)
        await pilot.press("l")
        await until(pilot, lambda: "load demo" in node.calls)
        node.fleet.workers["demo"].state = ModelState.READY
        await pilot.press("u")
        await until(pilot, lambda: "unload demo" in node.calls)


async def test_unloading_a_busy_model_asks(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: node.entered)
        await pilot.press("down", "u")
        assert isinstance(app.screen, Question)
        await pilot.press("n")
        assert "unload gemma3-270m" not in node.calls
        await pilot.press("u", "y")
        await until(pilot, lambda: "unload gemma3-270m" in node.calls)


async def test_a_refused_load_is_told(until) -> None:
    node = busy_node()
    node.load_error = MemoryFitError(needed_bytes=7 * 2**30, free_bytes=3 * 2**30, parts="weights 7.0")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: node.entered)
        await pilot.press("l")
        await until(pilot, lambda: any("needs 7.0 GiB" in note.message for note in app._notifications))


async def test_a_model_that_fails_is_told_on_every_screen(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f5")
        node.happen(ModelStateChanged(model="demo", state=ModelState.FAILED, reason="the engine [died]"))
        await until(pilot, lambda: any("the engine [died]" in note.message for note in app._notifications))


async def test_the_theme_changes_and_the_matrix_with_it() -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.pause()
        before = app._fleet.table.get_row("demo")[1].style
        app.action_toggle_theme()
        await pilot.pause()
        assert app.theme == "infsvc-light"
        assert app._fleet.table.get_row("demo")[1].style != before


async def test_without_colour_glyph_and_word_still_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.pause()
        assert app.no_color
        assert "✕ failed" in app._fleet.table.get_row("llama3-8b")[1].plain


def test_terminals_that_cannot_carry_a_screen_are_refused_with_the_way_out() -> None:
    assert terminal_problem({"TERM": "xterm"}, True, (80, 24)) is None
    assert terminal_problem({"TERM": "xterm"}, True, (20, 5)) is None
    for term, isatty, size in (("dumb", True, (80, 24)), ("xterm", False, (80, 24)), ("xterm", True, (0, 0))):
        assert "infsvc serve" in (terminal_problem({"TERM": term}, isatty, size) or "")
    assert "TERM is not set" in (terminal_problem({}, True, (80, 24)) or "")


def test_the_screen_knows_no_engine_room_and_no_socket() -> None:
    tui = Path(__file__).resolve().parents[2] / "tui"
    for path in tui.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"llama_cpp", "starlette", "nats", "aiosqlite", "sqlite3"}, path


async def test_the_curtain_is_up_while_the_node_is_made_and_quits_at_once(until) -> None:
    made = asyncio.Event()
    node = SampleNode()

    async def open_node() -> SampleNode:
        await made.wait()
        return node

    app = InfsvcApp(open_node, animate=False)
    async with app.run_test(size=(80, 24)) as pilot:
        assert "the node starts" in str(app.screen.query_one("#curtain").render())
        await pilot.press("f2", "question_mark", "1")
        made.set()
        await until(pilot, lambda: app.context is not None and app.context.phase == "running")
        assert app.screen is app._fleet
        await pilot.press("ctrl+q")
        await until(pilot, lambda: app._exit)
    assert node.calls == ["start", "close"]
