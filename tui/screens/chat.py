"""Screen 2, Chat: a conversation with one model of this node or another, through the same door as every other client.

A question waits for a model that is loading; what goes wrong stands in the transcript as a sentence that says what to
do.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static
from textual.worker import Worker as Task

from infsvc.errors import EngineFailed, InfsvcError, NodeLost
from infsvc.types import ModelState
from tui.context import Context
from tui.conversation import ChatSettings, Conversation, Exchange
from tui.messages import PromptSubmitted, TranscriptScrolled
from tui.node_view import GenerationView, ready_first
from tui.partner import FarModel, OwnModel, Partner
from tui.screens.base import NodeScreen
from tui.screens.chat_settings import ChatSettingsDialog
from tui.screens.dialogs import Question
from tui.screens.model_picker import ModelPicker
from tui.widgets.prompt import Prompt
from tui.widgets.transcript import AnswerTurn, QuestionTurn, Transcript
from tui.wording import plural

N_EXCHANGES_LONG = 3
_WAIT_S = 0.1


@dataclass
class Answering:
    """The one answer that is on its way."""

    exchange: Exchange
    turn: AnswerTurn
    generation: GenerationView | None = None
    stopped: bool = False
    task: Task[None] | None = None


class ChatScreen(NodeScreen):
    NAME = "chat"
    CSS_PATH = "chat.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "stop", id="chat.stop", tooltip="Stop the answer, else leave the input, or go back"),
        Binding("ctrl+o", "model", "model", id="chat.model", tooltip="Choose the model to talk to"),
        Binding("ctrl+r", "again", "again", id="chat.again", tooltip="Ask for the last answer once more"),
        Binding("ctrl+b", "copy", "copy", id="chat.copy", tooltip="Copy the last answer"),
        Binding("ctrl+s", "settings", "settings", id="chat.settings", tooltip="Temperature, length, seed, system"),
        Binding("ctrl+l", "clear", "clear", id="chat.clear", tooltip="Begin a new conversation"),
        Binding("i", "write", "write", show=False, id="chat.write", tooltip="Back to the input"),
    ]  # fmt: skip

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.model: str | None = None
        self.host: str | None = None
        """The node whose model it is; None for this one."""
        self.settings = ChatSettings()
        self.conversation = Conversation()
        self._answering: Answering | None = None

    def compose_body(self) -> ComposeResult:
        yield Transcript()
        with Horizontal(id="ask"):
            yield Static("› ", classes="mark")
            yield Prompt(blink=self.context.animate)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def partner(self) -> Partner | None:
        """Who is talked to, as it is now."""
        if self.model is not None and self.host is not None:
            return FarModel(self.node, self.model, self.host)
        worker = self.node.fleet.workers.get(self.model or "")
        return OwnModel(self.node, worker) if worker is not None else None

    def on_screen_resume(self) -> None:
        self.prompt.focus()

    def choose(self, model: str, host: str | None = None) -> None:
        """Talks to this model, of this node or of `host`, from the next question on; what was said goes with it."""
        self.model, self.host = model, host
        self.look()

    def look(self) -> None:
        if self.model is None and (workers := ready_first(self.node.fleet.workers.values())):
            self.model = workers[0].name
        partner = self.partner
        if partner is None:
            self.tell("no model")
            others = " Ctrl+O chooses one of another node." if self.node.far_chat.models() else ""
            self.transcript.greet(Content(f"There is no model to talk to: add a worker file to envs/.{others}"))
            return
        state, settings = partner.shown, self.settings
        note = [(f"{partner.name} ", "$foreground bold"), (f"{state}", f"${state.tone}"), (" ▾", "$muted")]
        if self.size.width >= 72:
            note.append((f"   t {settings.temperature:g}  max {settings.max_tokens}", "$muted"))
        self.tell(Content.assemble(*note))
        self.prompt.placeholder = f"ask {partner.name} anything"
        self.transcript.greet(Content(partner.greeting()))

    async def on_prompt_submitted(self, message: PromptSubmitted) -> None:
        message.stop()
        if (partner := self.partner) is None:
            self.notify("Ctrl+O chooses a model first.", severity="warning")
        elif self._answering is not None:
            self.notify("The last answer is still coming: Esc stops it.", severity="warning")
        else:
            self.prompt.clear_sent()
            await self.transcript.add(QuestionTurn(message.text))
            await self._ask(self.conversation.ask(message.text), partner)

    def on_transcript_scrolled(self, message: TranscriptScrolled) -> None:
        message.stop()
        self.transcript.page(message.direction)

    async def _ask(self, exchange: Exchange, partner: Partner) -> None:
        turn = AnswerTurn(partner.name, self.context.monotonic)
        await self.transcript.add(turn)
        answering = self._answering = Answering(exchange, turn)
        answering.task = self.run_worker(
            self._answer(answering, partner), name=f"answer-{partner.name}", group="answer", thread=False,
            exclusive=True, exit_on_error=True,
        )  # fmt: skip

    async def _answer(self, answering: Answering, partner: Partner) -> None:
        """Waits for the model, asks, and shows what comes; every end but a shutdown leaves a finished turn."""
        turn, mark, problem = answering.turn, "", ""
        try:
            if await self._until_ready(answering, partner):
                mark = await self._stream(answering, partner)
            else:
                mark = "stopped"
        except InfsvcError as error:
            problem = partner.advice(error)
        answering.exchange.answer = turn.text if turn.text and not problem else None
        await turn.finish(mark, problem)
        if self._answering is answering:
            self._answering = None
        self.refresh_bindings()

    async def _until_ready(self, answering: Answering, partner: Partner) -> bool:
        """Waits until the model can answer; False when the user stops that. A model on disk is loaded."""
        was = partner.state
        if was is ModelState.ON_DISK and not partner.asked:
            await partner.load()
        while (state := partner.state) is not ModelState.READY:
            if answering.stopped:
                return False
            if state is ModelState.FAILED or state is ModelState.ABSENT:
                raise partner.unready()
            if state is ModelState.ON_DISK and was is not ModelState.ON_DISK:
                raise partner.unready()
            was = state
            answering.turn.wait(Content(f"waiting for {partner.name} {partner.shown}"))
            await asyncio.sleep(_WAIT_S)
        return not answering.stopped

    async def _stream(self, answering: Answering, partner: Partner) -> str:
        # The engine's modules are large; the first frame does not wait for them.
        from engine.service import InferenceRequest

        turn, settings = answering.turn, self.settings
        request = InferenceRequest(
            model=partner.model,
            messages=self.conversation.messages(settings),
            params=settings.params(),
            think=settings.think or None,
            source="chat",
        )
        n_ctx = partner.n_ctx
        async with await partner.submit(request) as generation:
            answering.generation = generation
            turn.follow(generation, n_ctx)
            if answering.stopped:
                generation.cancel()
            async for chunk in generation:
                turn.feed(chunk)
        reply = generation.reply
        if reply is not None and reply.finish_reason == "cancelled" and partner.node and not answering.stopped:
            raise NodeLost(partner.node, "broke its answer off")
        if reply is None or reply.finish_reason == "cancelled":
            return "stopped"
        if reply.finish_reason == "error":
            raise EngineFailed(reply.error or "the engine failed")
        if reply.finish_reason == "length":
            if n_ctx and generation.tokens_in + generation.tokens_out >= n_ctx - 1:
                return "the context is full, Ctrl+L begins a new conversation"
            return f"cut after {plural(settings.max_tokens, 'token')}, Ctrl+S allows more"
        return ""

    async def action_stop(self) -> None:
        answering = self._answering
        if answering is not None:
            answering.stopped = True
            if answering.generation is not None:
                answering.generation.cancel()
        elif self.prompt.has_focus:
            self.transcript.focus()
        else:
            await self.app.switch_mode("fleet")

    def action_write(self) -> None:
        self.prompt.focus()

    def action_model(self) -> None:
        def take(partner: Partner | None) -> None:
            if partner is not None:
                self.choose(partner.model, partner.node)

        self.app.push_screen(ModelPicker(self.node, self.partner, blink=self.context.animate), take)

    def action_settings(self) -> None:
        def take(settings: ChatSettings | None) -> None:
            if settings is not None:
                self.settings = settings
                self.look()

        self.app.push_screen(ChatSettingsDialog(self.settings, blink=self.context.animate), take)

    async def action_again(self) -> None:
        if self._answering is not None or not self.conversation.exchanges or (partner := self.partner) is None:
            self.notify("There is no finished answer to ask for again.", severity="warning")
            return
        exchange = self.conversation.exchanges[-1]
        exchange.answer = None
        turns = self.query(AnswerTurn)
        if turns:
            await turns.last().remove()
        await self._ask(exchange, partner)

    def action_copy(self) -> None:
        answers = [exchange.answer for exchange in self.conversation.exchanges if exchange.answer]
        if not answers:
            self.notify("There is no answer to copy yet.", severity="warning")
            return
        self.app.copy_to_clipboard(answers[-1])
        self.notify(f"Copied {plural(len(answers[-1]), 'character')}.")

    async def action_clear(self) -> None:
        if self._answering is not None:
            self.notify("The last answer is still coming: Esc stops it.", severity="warning")
        elif len(self.conversation.exchanges) < N_EXCHANGES_LONG:
            await self._begin_anew()
        else:
            n_said = plural(len(self.conversation.exchanges), "question")

            async def decide(yes: bool | None) -> None:
                if yes:
                    await self._begin_anew()

            self.app.push_screen(Question(f"Forget this conversation of {n_said}?", "forget it"), decide)

    async def _begin_anew(self) -> None:
        self.conversation.forget()
        await self.transcript.forget()
        self.look()
