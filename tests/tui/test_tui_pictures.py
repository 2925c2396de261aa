"""What a user sees, a picture a state, at 80×24 and 160×48."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from textual.pilot import Pilot
from tui_sample import (
    NOW,
    SampleBusState,
    SampleChunk,
    SampleNode,
    SamplePull,
    SampleWorker,
    busy_node,
    demo_worker,
    queue_node,
    sample_app,
)

from infsvc.errors import ContextLengthExceeded, NodeLost, QueueUnavailable
from infsvc.events import LogLine
from infsvc.types import ModelState
from tests.infsvc.test_roster import health
from tui.app import InfsvcApp
from tui.messages import PromptSubmitted
from tui.widgets.header import StatusHeader

Picture = Callable[..., bool]
SIZES = pytest.mark.parametrize("size", [(80, 24), (160, 48)], ids=["80x24", "160x48"])


def chat_node(*texts: str, state: ModelState = ModelState.READY) -> SampleNode:
    node = SampleNode(demo_worker(state))
    node.service.chunks = [SampleChunk(text=text) for text in texts]
    return node


def typing(*keys: str, then: Callable[[InfsvcApp], object] | None = None) -> Callable[[Pilot[Any]], Any]:
    """Presses keys and waits until a condition holds, so that the picture is of a state and not of a moment."""

    async def run(pilot: Pilot[Any]) -> None:
        await pilot.press(*keys)
        for _ in range(200):
            if then is None or then(pilot.app):
                break
            await pilot.pause(0.02)
        else:
            raise AssertionError("the state for the picture never came")
        await pilot.pause()
        pilot.app.screen_stack[0].query_one(StatusHeader).refresh_facts()
        await pilot.pause()

    return run


def answered(app: InfsvcApp) -> bool:
    return bool(app._chat.conversation.exchanges) and app._chat._answering is None


def started(app: InfsvcApp) -> bool:
    return app.context.phase == "running"


ASK = ("f2", *"Why?", "enter")
ANSWER = (
    "Backpressure is how a model says that work is **waiting**. When more requests wait than ",
    "`BACKPRESSURE_THRESHOLD`, the level turns to *warning*; at twice that, to *critical*.\n\n",
    "```sh\ninfsvc status\n```\n\n",
    "1. `healthy`\n2. `warning`\n3. `critical`\n",
)


@SIZES
def test_fleet_at_work(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=typing("down", then=started))


def test_fleet_narrow(snap_compare: Picture) -> None:
    assert snap_compare(sample_app(busy_node()), terminal_size=(56, 20), run_before=typing("down", then=started))


def test_fleet_light(snap_compare: Picture) -> None:
    app = sample_app(busy_node())
    app.theme = "infsvc-light"
    assert snap_compare(app, terminal_size=(120, 32), run_before=typing("down", then=started))


@SIZES
def test_fleet_failed_model(snap_compare: Picture, size: tuple[int, int]) -> None:
    keys = ("down", "down", "down")
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=typing(*keys, then=started))


@SIZES
def test_fleet_without_models(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(SampleNode()), terminal_size=size, run_before=typing(then=started))


@SIZES
def test_fleet_first_start(snap_compare: Picture, size: tuple[int, int]) -> None:
    demo = demo_worker(ModelState.LOADING)
    demo.progress = 0.34
    node = SampleNode(demo, SampleWorker("gemma3-270m", ModelState.ABSENT), SampleWorker("qwen3-4b", ModelState.ABSENT))
    node.bus.state = SampleBusState(status="starting")
    assert snap_compare(sample_app(node), terminal_size=size, run_before=typing(then=started))


@SIZES
def test_fleet_broker_down(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = busy_node()
    node.bus.state = SampleBusState(status="down", reason="connection refused", retry_in_s=3.2)
    assert snap_compare(sample_app(node), terminal_size=size, run_before=typing(then=started))


@SIZES
def test_fleet_filter(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("slash", *"qwen", then=started)
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=run)


@SIZES
def test_detail(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("down", "enter", then=started)
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=run)


@SIZES
def test_chat_empty(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(chat_node()), terminal_size=size, run_before=typing("f2", then=started))


@SIZES
def test_chat_waiting_for_a_loading_model(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = chat_node(state=ModelState.LOADING)
    node.fleet.workers["demo"].progress = 0.61
    run = typing(*ASK, then=lambda app: "61" in str(app.screen.query(".waiting").last().render()))
    assert snap_compare(sample_app(node), terminal_size=size, run_before=run)


@SIZES
def test_chat_streaming(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = chat_node(*ANSWER)
    node.service.chunks = [SampleChunk(reasoning="They ask about load."), *node.service.chunks]
    node.service.hold_after = 2
    run = typing(*ASK, then=lambda app: "tok" in str(app.screen.query(".foot").last().render()))
    assert snap_compare(sample_app(node), terminal_size=size, run_before=run)


@SIZES
def test_chat_finished(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = chat_node(*ANSWER)
    node.service.chunks = [SampleChunk(reasoning="They ask about load."), *node.service.chunks]
    assert snap_compare(sample_app(node), terminal_size=size, run_before=typing(*ASK, then=answered))


@SIZES
def test_chat_stopped(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = chat_node(*ANSWER)
    node.service.hold_after = 1

    async def run(pilot: Pilot[Any]) -> None:
        await typing(*ASK, then=lambda app: "tok" in str(app.screen.query(".foot").last().render()))(pilot)
        await typing("escape", then=answered)(pilot)

    assert snap_compare(sample_app(node), terminal_size=size, run_before=run)


@SIZES
def test_chat_context_exceeded(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = chat_node()
    node.service.refusal = ContextLengthExceeded(n_prompt_tokens=1_311, n_ctx=1_024)
    assert snap_compare(sample_app(node), terminal_size=size, run_before=typing(*ASK, then=answered))


@SIZES
def test_chat_settings(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(chat_node()), terminal_size=size, run_before=typing("f2", "ctrl+s", then=started))


def node_among_others() -> SampleNode:
    """Models of two other nodes beside its own: online, busy, loading, with a long name."""
    node = busy_node()
    hear = node.registry.roster.hear_health
    hear(health("demo", "beta"))
    hear(health("mixtral-8x22b-instruct-v0.3-q4-k-m-long-context", "gpu-box.example", worker_count=16))
    hear(health("qwen3-32b", "gpu-box.example", status="loading", progress=0.42))
    return node


@SIZES
def test_chat_model_picker(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("f2", "ctrl+o", "down", then=started)
    assert snap_compare(sample_app(node_among_others()), terminal_size=size, run_before=run)


def test_chat_model_picker_filtered(snap_compare: Picture) -> None:
    run = typing("f2", "ctrl+o", *"gpu", then=started)
    assert snap_compare(sample_app(node_among_others()), terminal_size=(80, 24), run_before=run)


@SIZES
def test_chat_lost_node(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = node_among_others()
    node.far_chat.service.chunks = [SampleChunk(text="Backpressure is how a model says")]
    node.far_chat.service.fault = NodeLost("gpu-box.example", "went in the middle of its answer")
    app = sample_app(node)

    def ask(app: InfsvcApp) -> bool:
        if app._chat.host is None:
            app._chat.choose("mixtral-8x22b-instruct-v0.3-q4-k-m-long-context", "gpu-box.example")
            app._chat.prompt.text = "Why?"
            app._chat.prompt.post_message(PromptSubmitted("Why?"))
        return answered(app)

    assert snap_compare(app, terminal_size=size, run_before=typing("f2", then=ask))


def pulling_node() -> SampleNode:
    """One model on its way, one of the others failed for want of a token."""
    node = busy_node()
    moe = node.fleet.workers["gpt-oss-20b"]
    moe.settings = moe.settings.model_copy(
        update={"model_repo": "bartowski/openai_gpt-oss-20b-GGUF", "model_file": "openai_gpt-oss-20b-MXFP4.gguf"}
    )
    moe.state, moe.progress = ModelState.DOWNLOADING, 0.37
    moe.pull = SamplePull(int(4.2 * 2**30), int(11.3 * 2**30), 48 * 2**20, 156)
    gated = SampleWorker("llama-gated", ModelState.FAILED, model_repo="meta/Llama", model_file="llama.gguf")
    gated.reason = "meta/Llama is gated (401): accept its terms at https://huggingface.co/meta/Llama, and set HF_TOKEN"
    node.fleet.workers["llama-gated"] = gated
    return node


@SIZES
def test_models_pulling(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("f4", "down", "down", then=lambda app: "left" in str(app.screen.query_one("#file").render()))
    assert snap_compare(sample_app(pulling_node()), terminal_size=size, run_before=run)


def test_models_light(snap_compare: Picture) -> None:
    app = sample_app(pulling_node())
    app.theme = "infsvc-light"
    run = typing("f4", *["down"] * 3, then=lambda app: "gated" in str(app.screen.query_one("#file").render()))
    assert snap_compare(app, terminal_size=(100, 30), run_before=run)


@SIZES
def test_models_new_worker(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing(
        "f4", "n", *"mine", "enter", then=lambda app: "one source" in str(app.screen.query_one(".problem").render())
    )
    assert snap_compare(sample_app(pulling_node()), terminal_size=size, run_before=run)


@SIZES
def test_logs_empty(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(SampleNode()), terminal_size=size, run_before=typing("f5", then=started))


def full_log() -> SampleNode:
    node = busy_node()
    codes = (
        ("info", "llama", "llama_model_loader: loaded meta data"),
        ("debug", "queue", "0 waiting"),
        ("warning", "backpressure", "6 waiting"),
    )
    for index in range(120):
        level, code, msg = codes[index % 3]
        node.happen(LogLine(ts=NOW.timestamp() + index, model="demo", level=level, code=code, msg=f"{msg} #{index}"))
    return node


@SIZES
def test_logs_full(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(full_log()), terminal_size=size, run_before=typing("f5", then=started))


@SIZES
def test_logs_searched(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("f5", "slash", *"llama", "enter", then=started)
    assert snap_compare(sample_app(full_log()), terminal_size=size, run_before=run)


def listed(app: InfsvcApp) -> bool:
    """Whether the Queue screen has read what there is."""
    return started(app) and app.screen_stack[0]._dead.was_read and not app.screen_stack[0]._changed


@SIZES
def test_queue_empty(snap_compare: Picture, size: tuple[int, int]) -> None:
    assert snap_compare(sample_app(queue_node()), terminal_size=size, run_before=typing("f6", then=listed))


@SIZES
def test_queue_filled(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("f6", "down", "down", then=listed)
    assert snap_compare(sample_app(queue_node(60)), terminal_size=size, run_before=run)


@SIZES
def test_queue_broker_down(snap_compare: Picture, size: tuple[int, int]) -> None:
    node = queue_node()
    node.bus.state = SampleBusState(status="down", reason="connection refused", retry_in_s=3.2)
    node.durable.dead.error = QueueUnavailable("there is no connection to the broker")
    for queue in node.queue_desk.queues:
        queue |= {"durable": False, "reason": "there is no connection to the broker"}
        for figure in ("waiting", "taken", "redelivered", "oldest_s", "spooled"):
            queue.pop(figure, None)
    run = typing("f6", then=lambda app: started(app) and app.screen_stack[0]._dead.problem)
    assert snap_compare(sample_app(node), terminal_size=size, run_before=run)


def test_queue_narrow(snap_compare: Picture) -> None:
    assert snap_compare(sample_app(queue_node(60)), terminal_size=(40, 10), run_before=typing("f6", then=listed))


@SIZES
def test_dead_letter(snap_compare: Picture, size: tuple[int, int]) -> None:
    def written(app: InfsvcApp) -> bool:
        logs = app.screen.query("#body")
        return bool(logs) and logs.first().line_count > 4

    async def run(pilot: Pilot[Any]) -> None:
        await typing("f6", then=listed)(pilot)
        await typing("enter", then=written)(pilot)

    assert snap_compare(sample_app(queue_node(60)), terminal_size=size, run_before=run)


@SIZES
def test_help(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("question_mark", then=started)
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=run)


@SIZES
def test_quit_question(snap_compare: Picture, size: tuple[int, int]) -> None:
    run = typing("ctrl+q", then=lambda app: len(app.screen_stack) > 1)
    assert snap_compare(sample_app(busy_node()), terminal_size=size, run_before=run)


def test_palette(snap_compare: Picture) -> None:
    run = typing("ctrl+p", *"load", then=started)
    assert snap_compare(sample_app(busy_node()), terminal_size=(80, 24), run_before=run)


def test_too_small(snap_compare: Picture) -> None:
    assert snap_compare(sample_app(busy_node()), terminal_size=(38, 9), run_before=typing(then=started))
