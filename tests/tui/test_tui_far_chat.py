"""Chat with a model of another node: it is listed with its node's name, found by typing, and lost in words."""

from __future__ import annotations

from typing import Any

from textual.widgets import Input, Markdown, OptionList, Static
from tui_sample import SampleChunk, SampleNode, busy_node, demo_worker, sample_app

from infsvc.errors import ContextLengthExceeded, Draining, ModelNotLoaded, NodeLost, QueueFull, RequestError, rebuilt
from infsvc.types import ModelState
from tests.infsvc.test_roster import health
from tui.messages import ChatRequested
from tui.screens.model_picker import ModelPicker


def node_with_others(*models: str, **more: Any) -> SampleNode:
    node = SampleNode(demo_worker())
    for model in models:
        node.registry.roster.hear_health(health(model, "beta", **more))
    return node


def listed(app) -> list[str]:
    menu = app.screen.query_one(OptionList)
    return [str(menu.get_option_at_index(index).prompt).split()[0:2] for index in range(menu.option_count)]


def ended(app) -> bool:
    return app._chat._answering is None and bool(app._chat.conversation.exchanges)


def foot(app) -> str:
    return str(app._chat.query(".foot").last(Static).render())


async def ask(pilot, text: str) -> None:
    pilot.app._chat.prompt.text = text
    await pilot.press("enter")


async def test_another_nodes_model_is_chosen_and_answers(until) -> None:
    node = node_with_others("far-v1.5")
    node.far_chat.service.chunks = [SampleChunk(text="from "), SampleChunk(text="afar")]
    app = sample_app(node)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("f2", "ctrl+o", "down", "enter")
        await until(pilot, lambda: app._chat.host == "beta")
        assert app._chat.prompt.placeholder == "ask far-v1.5 @beta anything"
        await ask(pilot, "hello")
        await until(pilot, lambda: ended(app))
        assert node.far_chat.asked == [("far-v1.5", "beta")]
        assert not node.service.requests
        assert app._chat.query(Markdown).last().source == "from afar"
        assert str(app._chat.query(".speaker").last(Static).render()) == "far-v1.5 @beta"
        # Its own model again, with what was said.
        await pilot.press("ctrl+o", "up", "enter")
        await until(pilot, lambda: app._chat.host is None)
        await ask(pilot, "and you?")
        await until(pilot, lambda: bool(node.service.requests) and ended(app))
        assert [message.content for message in node.service.requests[0].messages] == ["hello", "from afar", "and you?"]


async def test_esc_stops_it_and_the_partial_text_stays(until) -> None:
    node = node_with_others("far")
    node.far_chat.service.chunks = [SampleChunk(text="part"), SampleChunk(text=" never")]
    node.far_chat.service.hold_after = 1
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "beta")
        await ask(pilot, "go")
        await until(pilot, lambda: "tok" in foot(app))
        await pilot.press("escape")
        await until(pilot, lambda: ended(app))
        assert node.far_chat.service.generations[0].cancelled
        assert foot(app).startswith("stopped · 1 tok")
        assert app._chat.conversation.exchanges[0].answer == "part"


async def test_a_node_that_dies_is_told_and_another_is_offered(until) -> None:
    node = node_with_others("far")
    node.far_chat.service.chunks = [SampleChunk(text="half")]
    node.far_chat.service.fault = NodeLost("beta", "went in the middle of its answer")
    app = sample_app(node)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "beta")
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert "beta, which serves the model, went in the middle of its answer. Ctrl+R asks again" in foot(app)
        assert "Ctrl+O chooses another model" in foot(app)
        assert app._chat.query(Markdown).last().source == "half"
        node.far_chat.service.fault = None
        await pilot.press("ctrl+r")
        await until(pilot, lambda: len(node.far_chat.asked) == 2 and ended(app))
        assert app._chat.conversation.exchanges[0].answer == "half"


async def test_what_a_node_breaks_off_by_itself_was_not_stopped_here(until) -> None:
    node = node_with_others("far")
    node.far_chat.service.chunks = [SampleChunk(text="half")]
    node.far_chat.service.finish = "cancelled"
    app = sample_app(node)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "beta")
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert "beta, which serves the model, broke its answer off" in foot(app)


async def test_a_model_that_has_gone_is_told_at_once(until) -> None:
    node = node_with_others("far")
    app = sample_app(node)
    async with app.run_test(size=(120, 30)) as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "gamma")
        await until(pilot, lambda: "gamma is not heard of any more" in str(app._chat.query_one("#greeting").render()))
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert "gamma, which serves the model, is not there any more" in foot(app)
        app._chat.choose("far", "beta")
        node.registry.roster.hear_health(health("far", "beta", status="offline"))
        await ask(pilot, "go")
        await until(pilot, lambda: len(app._chat.conversation.exchanges) == 2 and ended(app))
        assert "far @beta cannot answer: it is offline there" in foot(app)
        assert not node.far_chat.asked


async def test_a_question_waits_for_a_model_that_its_node_loads(until) -> None:
    node = node_with_others("far", status="loading", progress=0.5)
    node.far_chat.service.chunks = [SampleChunk(text="here")]
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "beta")
        await ask(pilot, "early")
        waiting = app._chat.query_one(".waiting", Static)
        await until(pilot, lambda: "waiting for far @beta ◐ loading 50 %" in str(waiting.render()))
        assert not node.far_chat.asked
        node.registry.roster.hear_health(health("far", "beta"))
        await until(pilot, lambda: ended(app))
        assert app._chat.conversation.exchanges[0].answer == "here"


async def test_refusals_of_another_node_are_sentences(until) -> None:
    node = node_with_others("far")
    app = sample_app(node)
    long = rebuilt(ContextLengthExceeded(n_prompt_tokens=1311, n_ctx=1024).native(None))
    refusals: list[tuple[RequestError, str]] = [
        (long, "Ctrl+L begins a new conversation"),
        (QueueFull(model="far", n_waiting=20, capacity=20, retry_after_s=7), "far @beta has 20 requests waiting"),
        (ModelNotLoaded("far", "failed", "no room"), "far @beta cannot answer"),
        (Draining("the node ends"), "beta is shutting down"),
    ]
    async with app.run_test(size=(140, 40)) as pilot:
        await pilot.press("f2")
        app._chat.choose("far", "beta")
        for n, (refusal, told) in enumerate(refusals, 1):
            node.far_chat.service.refusal = refusal
            await ask(pilot, "too much")
            await until(pilot, lambda n=n: len(app._chat.conversation.exchanges) == n and ended(app))
            assert told in foot(app)


async def test_many_models_are_filtered_and_scrolled(until) -> None:
    node = busy_node()
    for n in range(120):
        node.registry.roster.hear_health(health(f"m{n:03}", "beta" if n % 2 else "gamma"))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2", "ctrl+o")
        menu = app.screen.query_one(OptionList)
        n_own = menu.option_count - 120
        assert n_own == 5
        await pilot.press(*["pagedown"] * 20)
        assert menu.highlighted == menu.option_count - 1
        assert menu.scroll_y > 0
        await pilot.press(*"m04 beta")
        assert listed(app) == [[f"m{n:03}", "@beta"] for n in (41, 43, 45, 47, 49)]
        await pilot.press(*" nobody")
        assert not listed(app)
        assert str(app.screen.query_one(".empty", Static).render()) == "nothing matches"
        await pilot.press("enter")
        assert isinstance(app.screen, ModelPicker)
        app.screen.query_one(Input).value = "m04 beta"
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: (app._chat.model, app._chat.host) == ("m045", "beta"))


async def test_the_list_follows_the_bus_and_the_cursor_stays_on_its_model(until) -> None:
    node = node_with_others("b", "d")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2", "ctrl+o", "down", "down")
        node.registry.roster.hear_health(health("a", "beta"))
        node.registry.roster.hear_health(health("b", "beta", status="failed"))
        app.screen._look()
        await pilot.pause()
        assert listed(app) == [["demo", "●"], ["a", "@beta"], ["d", "@beta"]]
        await pilot.press("enter")
        await until(pilot, lambda: (app._chat.model, app._chat.host) == ("d", "beta"))


async def test_a_node_without_models_can_chat_through_others(until) -> None:
    node = SampleNode()
    node.registry.roster.hear_health(health("far", "beta"))
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        greeting = app._chat.query_one("#greeting")
        await until(pilot, lambda: "Ctrl+O chooses one of another node" in str(greeting.render()))
        app.post_message(ChatRequested("far", "beta"))
        await until(pilot, lambda: "runs on another node" in str(greeting.render()))


async def test_a_failed_own_model_of_the_same_name_does_not_stand_in_the_way(until) -> None:
    node = node_with_others("demo")
    node.fleet.workers["demo"].state = ModelState.FAILED
    app = sample_app(node)
    async with app.run_test() as pilot:
        app.post_message(ChatRequested("demo", "beta"))
        await until(pilot, lambda: app.current_mode == "chat" and app._chat.host == "beta")
        await ask(pilot, "hello")
        await until(pilot, lambda: ended(app))
        assert node.far_chat.asked == [("demo", "beta")]
