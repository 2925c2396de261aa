"""Chat: sending, stopping, asking again, waiting for a model, and what is said when something goes wrong."""

from __future__ import annotations

import pytest
from textual import events
from textual.widgets import Input, Markdown, Static
from tui_sample import SampleChunk, SampleNode, busy_node, demo_worker, sample_app

from infsvc.errors import ContextLengthExceeded, EngineFailed, QueueFull
from infsvc.types import Message, ModelState
from tui.conversation import ChatSettings, Conversation
from tui.screens.dialogs import Question
from tui.screens.model_picker import ModelPicker
from tui.widgets.transcript import AnswerTurn, Transcript


def node_that_says(*texts: str, state: ModelState = ModelState.READY) -> SampleNode:
    node = SampleNode(demo_worker(state))
    node.service.chunks = [SampleChunk(text=text) for text in texts]
    return node


def foot(app) -> str:
    return str(app._chat.query(".foot").last(Static).render())


def ended(app) -> bool:
    return app._chat._answering is None


async def ask(pilot, text: str) -> None:
    pilot.app._chat.prompt.text = text
    await pilot.press("enter")


async def test_a_conversation_of_two_turns_goes_with_the_second_question(until) -> None:
    node = node_that_says("Hello ", "you.")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2", *"hi", "enter")
        await until(pilot, lambda: ended(app))
        await ask(pilot, "and now?")
        await until(pilot, lambda: len(node.service.requests) == 2 and ended(app))
        said = [(message.role, message.content) for message in node.service.requests[1].messages]
        assert said == [("user", "hi"), ("assistant", "Hello you."), ("user", "and now?")]
        assert node.service.requests[0].source == "chat"
        assert app._chat.query(Markdown).last().source == "Hello you."
        assert "2 tok · 1,980 tok/s · first 4 ms · 12 cached · ctx ▓" in foot(app)


async def test_esc_stops_and_the_partial_text_stays(until) -> None:
    node = node_that_says("part", " never")
    node.service.hold_after = 1
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        await until(pilot, lambda: "tok" in foot(app))
        await pilot.press("escape")
        await until(pilot, lambda: ended(app))
        assert node.service.generations[0].cancelled
        assert foot(app).startswith("stopped · 1 tok")
        assert app._chat.conversation.exchanges[0].answer == "part"
        assert app._chat.prompt.has_focus
        await pilot.press("escape")
        assert not app._chat.prompt.has_focus
        await pilot.press("escape")
        assert app.current_mode == "fleet"


async def test_a_question_waits_for_a_loading_model(until) -> None:
    node = node_that_says("here", state=ModelState.LOADING)
    worker = node.fleet.workers["demo"]
    worker.progress = 0.5
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "early")
        waiting = app._chat.query_one(".waiting", Static)
        await until(pilot, lambda: "waiting for demo ◐ loading 50 %" in str(waiting.render()))
        assert not node.service.requests
        worker.state = ModelState.READY
        await until(pilot, lambda: ended(app))
        assert app._chat.conversation.exchanges[0].answer == "here"


async def test_esc_stops_the_waiting_too(until) -> None:
    node = node_that_says(state=ModelState.LOADING)
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "early")
        await pilot.press("escape")
        await until(pilot, lambda: ended(app))
        assert not node.service.requests
        assert "stopped" in foot(app)


async def test_a_question_to_a_model_on_disk_loads_it(until) -> None:
    node = node_that_says("awake", state=ModelState.ON_DISK)
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "wake")
        await until(pilot, lambda: "load demo" in node.calls)
        node.fleet.workers["demo"].state = ModelState.READY
        await until(pilot, lambda: ended(app))
        assert app._chat.conversation.exchanges[0].answer == "awake"


async def test_a_refused_load_ends_the_waiting(until) -> None:
    node = node_that_says(state=ModelState.ON_DISK)
    node.load_error = EngineFailed("no room")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "wake")
        await until(pilot, lambda: ended(app))
        assert "no room" in foot(app)


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (ContextLengthExceeded(n_prompt_tokens=1311, n_ctx=1024), "Ctrl+L begins a new conversation"),
        (QueueFull(model="demo", n_waiting=2000, capacity=2000, retry_after_s=7), "best in 7 s"),
        (EngineFailed("it [died]"), "demo's engine failed: it [died]"),
    ],
)
async def test_a_refusal_is_a_sentence_in_the_transcript(refusal: Exception, told: str, until) -> None:
    node = node_that_says()
    node.service.refusal = refusal
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "too much")
        await until(pilot, lambda: ended(app))
        assert told in foot(app)
        await pilot.press("up")
        assert app._chat.prompt.text == "too much"
        assert app._chat.conversation.exchanges[0].answer is None


async def test_an_engine_that_dies_in_the_answer_is_told(until) -> None:
    node = node_that_says("half")
    node.service.finish, node.service.error = "error", "decode returned -3"
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert "decode returned -3" in foot(app)


async def test_the_full_context_is_told(until) -> None:
    node = node_that_says("a")
    node.service.finish = "length"
    node.fleet.workers["demo"].settings = node.fleet.workers["demo"].settings.model_copy(update={"ctx_size": 53})
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert "the context is full, Ctrl+L" in foot(app)


async def test_again_replaces_the_last_answer(until) -> None:
    node = node_that_says("first")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "q")
        await until(pilot, lambda: ended(app))
        node.service.chunks = [SampleChunk(text="second")]
        await pilot.press("ctrl+r")
        await until(pilot, lambda: len(node.service.requests) == 2 and ended(app))
        assert [message.content for message in node.service.requests[1].messages] == ["q"]
        assert len(app._chat.query(AnswerTurn)) == 1
        await pilot.press("ctrl+b")
        assert app.clipboard == "second"


async def test_a_question_while_one_is_answered_stays_in_the_input(until) -> None:
    node = node_that_says("a", "b")
    node.service.hold_after = 1
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "one")
        await ask(pilot, "two")
        assert app._chat.prompt.text == "two"
        node.service.generations[0].release()
        await until(pilot, lambda: ended(app))
        assert len(node.service.requests) == 1


async def test_a_paste_keeps_its_lines_and_shift_enter_makes_one() -> None:
    app = sample_app(node_that_says())
    async with app.run_test() as pilot:
        await pilot.press("f2")
        app.post_message(events.Paste("one\ntwo\n\tthree"))
        await pilot.pause()
        await pilot.press("shift+enter", "x")
        assert app._chat.prompt.text == "one\ntwo\n\tthree\nx"
        assert app._chat.prompt.size.height == 4


async def test_history_goes_back_and_returns_to_the_draft(until) -> None:
    app = sample_app(node_that_says("ok"))
    async with app.run_test() as pilot:
        await pilot.press("f2")
        for text in ("first", "second"):
            await ask(pilot, text)
            await until(pilot, lambda: ended(app))
        app._chat.prompt.text = "draft"
        texts = []
        for key in ("up", "up", "up", "down", "down"):
            await pilot.press(key)
            texts.append(app._chat.prompt.text)
        assert texts == ["second", "first", "first", "second", "draft"]


async def test_clear_asks_when_the_conversation_is_long(until) -> None:
    app = sample_app(node_that_says("ok"))
    async with app.run_test() as pilot:
        await pilot.press("f2")
        for index in range(3):
            await ask(pilot, f"q{index}")
            await until(pilot, lambda: ended(app))
        await pilot.press("ctrl+l")
        assert isinstance(app.screen, Question)
        await pilot.press("y")
        await until(pilot, lambda: not app._chat.query(AnswerTurn))
        assert not app._chat.conversation.exchanges
        await ask(pilot, "new")
        await until(pilot, lambda: ended(app))
        await pilot.press("ctrl+l")
        await until(pilot, lambda: not app._chat.query(AnswerTurn))


async def test_the_model_is_chosen_from_a_list(until) -> None:
    app = sample_app(busy_node())
    async with app.run_test() as pilot:
        await pilot.press("f2")
        assert app._chat.model == "demo"
        await pilot.press("ctrl+o")
        assert isinstance(app.screen, ModelPicker)
        await pilot.press("down", "enter")
        await until(pilot, lambda: app._chat.model == "gemma3-270m")


async def test_settings_are_checked_and_used(until) -> None:
    node = node_that_says("ok")
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2", "ctrl+s")
        dialog = app.screen
        dialog.query_one("#temperature", Input).value = "3"
        await pilot.press("enter")
        assert "temperature" in str(dialog.query_one(".problem", Static).render())
        dialog.query_one("#temperature", Input).value = "0"
        dialog.query_one("#seed", Input).value = "7"
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.screen is app._chat)
        await ask(pilot, "q")
        await until(pilot, lambda: ended(app))
        assert node.service.requests[0].params.temperature == 0
        assert node.service.requests[0].params.seed == 7


async def test_a_thousand_chunks_are_shown_in_few_updates(until, monkeypatch: pytest.MonkeyPatch) -> None:
    node = node_that_says(*[f"word{index} " for index in range(1000)])
    appended: list[str] = []
    append = Markdown.append
    monkeypatch.setattr(Markdown, "append", lambda self, text: (appended.append(text), append(self, text))[1])
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        await until(pilot, lambda: bool(node.service.requests) and ended(app))
        assert app._chat.query(Markdown).last().source.split()[-1] == "word999"
        assert len(appended) < 40


async def test_the_transcript_follows_until_the_user_scrolls_up(until) -> None:
    node = node_that_says(*[f"line {index}\n\n" for index in range(60)], "last")
    node.service.hold_after = 60
    app = sample_app(node)
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        transcript = app._chat.query_one(Transcript)
        await until(pilot, lambda: transcript.max_scroll_y > 40 and transcript.scroll_y == transcript.max_scroll_y)
        await pilot.press("pageup")
        await until(pilot, lambda: transcript.scroll_y < transcript.max_scroll_y)
        at = transcript.scroll_y
        node.service.generations[0].release()
        await until(pilot, lambda: ended(app))
        await pilot.pause()
        assert transcript.scroll_y == at


async def test_escape_sequences_of_a_model_do_not_reach_the_terminal(until) -> None:
    app = sample_app(node_that_says("a\x1b[2Jb\x07c"))
    async with app.run_test() as pilot:
        await pilot.press("f2")
        await ask(pilot, "go")
        await until(pilot, lambda: ended(app))
        assert app._chat.query(Markdown).last().source == "a[2Jbc"


def test_failed_exchanges_are_not_repeated_to_the_model() -> None:
    conversation = Conversation()
    conversation.ask("lost")
    conversation.ask("kept").answer = "yes"
    conversation.ask("now")
    messages = conversation.messages(ChatSettings(system="be short"))
    assert messages == (
        Message(role="system", content="be short"),
        Message(role="user", content="kept"),
        Message(role="assistant", content="yes"),
        Message(role="user", content="now"),
    )
