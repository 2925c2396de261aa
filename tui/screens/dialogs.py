"""The small boxes: a question with yes and no, the help of a screen, a model's detail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from tui.messages import ChatRequested, LoadRequested, PullRequested, UnloadRequested
from tui.node_view import NodeView
from tui.screens.base import Dialog
from tui.widgets.model_facts import detail
from tui.wording import clean, hang


class Question(Dialog[bool]):
    """Answers True for yes; Enter and Esc are no, so that nothing is lost by a habit."""

    HEADING = "Sure?"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "answer(True)", "yes", id="question.yes", tooltip="Do it"),
        Binding("n,enter", "answer(False)", "no", id="question.no", tooltip="Leave things as they are"),
    ]

    def __init__(self, question: str, yes: str) -> None:
        super().__init__()
        self._question, self._yes = question, yes

    def compose_box(self) -> ComposeResult:
        yield Static(Content(self._question), classes="question")
        yield Static(
            Content.assemble(("y", "$accent bold"), f" {self._yes}    ", ("n", "$accent bold"), " no"), classes="hint"
        )

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Help(Dialog[None]):
    """The keys that work on a screen, as their bindings describe them."""

    HEADING = "Keys"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("question_mark,f12", "leave", "close", id="help.close", tooltip="Close this list"),
    ]

    def __init__(self, bindings: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self._rows = list(bindings)

    def compose_box(self) -> ComposeResult:
        with VerticalScroll():
            yield Static("", id="keys")
        yield Static(Content("digits and ? work outside inputs · esc closes"), classes="hint")

    def on_mount(self) -> None:
        self._fill()

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._fill)

    def _fill(self) -> None:
        table = self.query_one("#keys", Static)
        width = table.content_size.width or 72
        rows = [Content.assemble((f"{key:<8}", "$accent bold"), hang(told, 8, width)) for key, told in self._rows]
        table.update(Content("\n").join(rows))


class ModelDetail(Dialog[None]):
    """Everything known of one model; brought up to date each second."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "load", "load", id="detail.load", tooltip="Load this model"),
        Binding("u", "unload", "unload", id="detail.unload", tooltip="Unload this model"),
        Binding("p", "pull", "pull", id="detail.pull", tooltip="Fetch this model's file"),
        Binding("t", "chat", "chat", id="detail.chat", tooltip="Chat with this model"),
    ]

    def __init__(self, node: NodeView, model: str) -> None:
        super().__init__()
        self._node, self._model = node, model

    def compose_box(self) -> ComposeResult:
        with VerticalScroll():
            yield Static("", id="facts")
        hint = Content.assemble(("l", "$accent bold"), " load  ", ("u", "$accent bold"), " unload  ",
                                ("p", "$accent bold"), " pull  ",
                                ("t", "$accent bold"), " chat  ", ("esc", "$accent bold"), " close")  # fmt: skip
        yield Static(hint, classes="hint")

    def on_mount(self) -> None:
        self.query_one(".box").border_title = clean(self._model)
        self.query_one(VerticalScroll).focus()
        self._look()
        self.set_interval(1.0, self._look, name="detail")

    def on_resize(self, event: events.Resize) -> None:
        self.call_after_refresh(self._look)

    def _look(self) -> None:
        worker = self._node.fleet.workers.get(self._model)
        self.query_one("#facts", Static).update(
            detail(worker, self.query_one("#facts").content_size.width or 72)
            if worker
            else "this model is no longer there"
        )

    def action_load(self) -> None:
        self.app.post_message(LoadRequested(self._model))

    def action_unload(self) -> None:
        self.app.post_message(UnloadRequested(self._model))

    def action_pull(self) -> None:
        self.app.post_message(PullRequested(self._model))

    def action_chat(self) -> None:
        self.dismiss(None)
        self.app.post_message(ChatRequested(self._model))
