"""Screen 4: worker files, pulls with their figures, removal, filter and sort, a new worker."""

from __future__ import annotations

import pytest
from tui_sample import SampleNode, SamplePull, SampleWorker, busy_node, demo_worker, sample_app

from infsvc.errors import ConfigError, LoadError, NoSource
from infsvc.types import ModelState
from tui.screens.dialogs import ModelDetail, Question
from tui.screens.new_worker import NewWorkerDialog
from tui.widgets.capability_matrix import layout
from tui.widgets.file_table import SORTS, file_layout


def rows(app) -> list[str]:
    return [row.key.value for row in app._models.table.ordered_rows]


def cell(app, model: str, column: str) -> str:
    return app._models.table.get_cell(model, column).plain.strip()


def pull(node: SampleNode, model: str) -> SampleWorker:
    worker = node.fleet.workers[model]
    worker.state, worker.progress = ModelState.DOWNLOADING, 0.42
    worker.pull = SamplePull(105 * 2**20, 250 * 2**20, 12.5 * 2**20, 11.6)
    return worker


async def test_what_lies_on_disk_and_what_it_takes(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test(size=(200, 50)) as pilot:
        await pilot.press("4")
        await until(pilot, lambda: rows(app))
        assert (cell(app, "demo", "disk"), cell(app, "demo", "port")) == ("3.0 MiB", "5769")
        assert cell(app, "qwen3-4b", "memory") == "5.6 GiB"
        assert (cell(app, "gpt-oss-20b", "disk"), cell(app, "gpt-oss-20b", "source")) == ("–", "by hand")
        told = str(app._models.query_one("#file").render())
        assert "weights" in told
        assert "8 × 1,024 tokens" in told


async def test_a_pull_shows_percent_rate_and_time_left_on_both_screens(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=(160, 48)) as pilot:
        await pilot.press("f4")
        await until(pilot, lambda: rows(app))
        pull(node, "gpt-oss-20b")
        app._models.show_model("gpt-oss-20b")
        assert cell(app, "gpt-oss-20b", "state") == "◐ pull 42 %"
        assert cell(app, "gpt-oss-20b", "pace") == "12.5 MiB/s 12 s"
        assert "105.0 MiB of 250.0 MiB, 12.5 MiB/s, 12 s left" in str(app._models.query_one("#file").render())
        await pilot.press("f1")
        app._fleet.look()
        assert app._fleet.table.get_cell("gpt-oss-20b", "state").plain.strip() == "◐ pull 42 % 12.5 MiB/s 12 s"


async def test_keys_ask_the_node_and_removal_asks_the_user(until) -> None:
    node = SampleNode(demo_worker(ModelState.ON_DISK))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("f1", "p")
        await pilot.press("f4", "p", "l", "u")
        await until(pilot, lambda: node.calls[1:] == ["pull demo", "pull demo", "load demo", "unload demo"])
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("n")
        assert not any(call.startswith("remove") for call in node.calls)
        await pilot.press("x")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await until(pilot, lambda: node.calls[-1] == "remove demo")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ModelDetail))


@pytest.mark.parametrize("error", [NoSource("data/models/demo/model.gguf"), LoadError("demo is ready: unload it")])
async def test_what_the_node_refuses_is_told(error: Exception, until) -> None:
    node = SampleNode(demo_worker(ModelState.ABSENT))
    node.load_error = error
    app = sample_app(node)
    async with app.run_test() as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("f4", "p", "x")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("y")
        await until(pilot, lambda: len(app._notifications) == 2)
        assert [notification.message for notification in app._notifications] == [str(error)] * 2


async def test_filter_sort_and_empty(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test(size=(120, 32)) as pilot:
        await pilot.press("f4", "slash", *"nomic")
        await until(pilot, lambda: rows(app) == ["nomic-embed-v1.5"])
        await pilot.press("enter", "escape", "s", "s")
        assert app._models.table.sort_by == "size"
        assert rows(app)[0] == "llama3-8b"
        await pilot.press("s", "s")
        assert rows(app)[0] == "demo"
        await pilot.press("s")
        assert rows(app) == sorted(rows(app))
        await pilot.press("slash", *"zzz")
        await until(pilot, lambda: "Nothing matches" in str(app._models.query_one("#nothing").render()))
    empty = sample_app(SampleNode())
    async with empty.run_test() as pilot:
        await pilot.press("f4")
        await until(pilot, lambda: "n writes one" in str(empty._models.query_one("#nothing").render()))


async def test_a_new_worker_is_written_and_stands_under_the_cursor(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("f4", "n", *"zed", "tab", *"a/b", "tab", *"c.gguf", "ctrl+s")
        await until(pilot, lambda: "zed" in node.fleet.workers)
        wanted = {
            "MODEL_NAME": "zed", "MODEL_REPO": "a/b", "MODEL_FILE": "c.gguf", "MODEL_URL": "", "MODEL_PATH": "",
            "HTTP_ADDR": ":5781", "CTX_SIZE": "4096",
        }  # fmt: skip
        assert node.calls[-1] == f"add {wanted}"
        await until(pilot, lambda: app._models.table.chosen == "zed")


async def test_a_wrong_form_says_why_and_stays(until) -> None:
    node = busy_node()
    app = sample_app(node)
    async with app.run_test(size=(80, 24)) as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        await pilot.press("f4", "n", "enter")

        def problem() -> str:
            return str(app.screen.query_one(".problem").render())

        await until(pilot, lambda: "needs a name" in problem())
        await pilot.press(*"x", "tab", *"a/b", "tab", "tab", *"https://c", "enter")
        await until(pilot, lambda: "one source" in problem())
        node.load_error = ConfigError("port 5769 is demo's", key="HTTP_ADDR")
        app.screen.query_one("#url").value = ""
        await pilot.press("enter")
        await until(pilot, lambda: "5769 is demo's" in problem())
        assert app.focused is not None
        assert app.focused.id == "port"
        await pilot.press("escape")
        assert not isinstance(app.screen, NewWorkerDialog)


async def test_the_palette_pulls_stops_removes_and_writes(until) -> None:
    node = busy_node()
    absent = SampleWorker("far", ModelState.ABSENT, model_repo="a/b", model_file="c.gguf")
    node.fleet.workers["far"] = absent
    pull(node, "gpt-oss-20b")
    app = sample_app(node)
    async with app.run_test(size=(120, 32)) as pilot:
        await until(pilot, lambda: app.context.phase == "running")
        for words, call in (
            ("Pull far", "pull far"),
            ("Load far", "load far"),
            ("Stop the pull of gpt", "unload gpt-oss-20b"),
        ):
            await pilot.press("ctrl+p", *words)
            await until(pilot, lambda: app.screen.query("OptionList").last().option_count)
            await pilot.press("enter")
            await until(pilot, lambda call=call: node.calls[-1] == call)
        await pilot.press("ctrl+p", *"Remove the file of nomic")
        await until(pilot, lambda: app.screen.query("OptionList").last().option_count)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, Question))
        await pilot.press("escape", "ctrl+p", *"New worker")
        await until(pilot, lambda: app.screen.query("OptionList").last().option_count)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, NewWorkerDialog))


@pytest.mark.parametrize("pulling", [False, True])
@pytest.mark.parametrize("width", range(20, 250, 7))
def test_columns_fit_every_width(width: int, pulling: bool) -> None:
    widths = file_layout(width, pulling=pulling)
    assert {"model", "state"} <= set(widths)
    assert sum(size + 1 for size in widths.values()) <= max(width, 22)
    assert sum(size + 1 for size in layout(width, pulling=pulling).values()) <= max(width, 38)


def test_sorts_are_all_tried() -> None:
    assert SORTS == ("name", "state", "size", "memory", "port")
