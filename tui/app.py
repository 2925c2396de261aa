"""The app: the node's face. Paints first, opens and starts the node after that, and ends with the node's own close.

What takes long to import — the engine's rooms, the doors, the screens with their charts and markdown — comes after
the first frame, in a thread beside the loop.

The node runs inside one worker that enters and leaves it, so that every way out — a key, a signal, an error — drains
it in the same way. The app decides nothing about models: it hands requests to the node and tells its errors.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.screen import Screen
from textual.widgets import Static
from textual.worker import Worker

from infsvc.errors import InfsvcError, UnknownModel
from tui.messages import (
    ChatRequested,
    LoadRequested,
    NewWorkerRequested,
    PullRequested,
    RemoveRequested,
    UnloadRequested,
)
from tui.themes import DARK, LIGHT

if TYPE_CHECKING:
    from infsvc.events import Event
    from tui.context import Context
    from tui.node_view import NodeView
    from tui.screens.chat import ChatScreen
    from tui.screens.fleet import FleetScreen
    from tui.screens.logs import LogsScreen
    from tui.screens.models import ModelsScreen


_FUNCTION_KEY = re.compile(r"f\d+")


def _node_commands() -> type[Provider]:
    from tui.commands import NodeCommands

    return NodeCommands


def _now() -> datetime:
    return datetime.now().astimezone()


class InfsvcApp(App[int]):
    """The full-screen app over one node; its return value is the process' exit code.

    Args:
        open_node: makes the node, after the first frame; the app starts it, and closes it before it ends.
        clock: the wall time that is shown.
        monotonic: seconds, for durations that are shown.
        animate: False for still pictures: no animation, no blinking cursor.
    """

    TITLE = "infsvc"
    CSS_PATH = "app.tcss"
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_node_commands}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "go('fleet')", show=False, priority=True, id="app.fleet", tooltip="Fleet (also 1)"),
        Binding("f2", "go('chat')", show=False, priority=True, id="app.chat", tooltip="Chat (also 2)"),
        Binding("f4", "go('models')", show=False, priority=True, id="app.models", tooltip="Models (also 4)"),
        Binding("f5", "go('logs')", show=False, priority=True, id="app.logs", tooltip="Logs (also 5)"),
        Binding("f6", "go('queue')", show=False, priority=True, id="app.queue", tooltip="Queue (also 6)"),
        # No screen has 3; who asks the demo model is told that it shows requests, and this one does.
        Binding("f3", "go('queue')", show=False, priority=True, id="app.queue.f3"),
        Binding("3", "go('queue')", show=False, id="app.queue.three"),
        Binding("1", "go('fleet')", show=False, id="app.fleet.digit"),
        Binding("2", "go('chat')", show=False, id="app.chat.digit"),
        Binding("4", "go('models')", show=False, id="app.models.digit"),
        Binding("5", "go('logs')", show=False, id="app.logs.digit"),
        Binding("6", "go('queue')", show=False, id="app.queue.digit"),
        Binding("question_mark,f12", "help", "help", key_display="?", id="app.help", tooltip="These keys (also F12)"),
        Binding("ctrl+p", "command_palette", show=False, priority=True, id="app.palette", tooltip="Find a command"),
        Binding("ctrl+q", "quit", "quit", priority=True, id="app.quit", tooltip="End the node; asks if it is busy"),
    ]  # fmt: skip

    def __init__(
        self,
        open_node: Callable[[], Awaitable[NodeView]],
        *,
        clock: Callable[[], datetime] = _now,
        monotonic: Callable[[], float] = time.monotonic,
        animate: bool = True,
    ) -> None:
        super().__init__()
        self.context: Context | None = None
        self._open_node = open_node
        self._clock, self._monotonic, self._animated = clock, monotonic, animate
        self._leaving = asyncio.Event()
        if not animate:
            self.animation_level = "none"
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name
        self._fleet: FleetScreen | None = None
        self._chat: ChatScreen | None = None
        self._models: ModelsScreen | None = None
        self._logs: LogsScreen | None = None

    def compose(self) -> ComposeResult:
        """The first frame: what there is before the node can be shown."""
        yield Static("infsvc\n\nthe node starts", id="curtain")

    def on_mount(self) -> None:
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        # The function, not its coroutine: an app that ends before the worker begins then leaves none unawaited.
        _: Worker[None] = self.run_worker(
            self._run_node, name="node", group="node", thread=False, exclusive=True, exit_on_error=True
        )

    async def _run_node(self) -> None:
        """Opens the node, starts it, waits for the end, closes it, and ends the app."""
        try:
            context = self.context or await self.show_node(await self._open_node())
            async with context.node:
                if context.phase == "starting":
                    context.phase = "running"
                await self._leaving.wait()
        except InfsvcError as error:
            code = 2 if isinstance(error, UnknownModel) else 1
            self.exit(code, return_code=code, message=_clean(str(error)))
        else:
            self.exit(0)

    async def show_node(self, node: NodeView) -> Context:
        """Puts the screens up over the node, which has not started yet."""
        from tui.context import Context
        from tui.screens.chat import ChatScreen
        from tui.screens.fleet import FleetScreen
        from tui.screens.logs import LogsScreen
        from tui.screens.models import ModelsScreen
        from tui.screens.queue import QueueScreen

        context = Context(node, self._clock, self._monotonic, self._animated)
        if self._leaving.is_set():
            context.phase = "draining"
        self._fleet, self._chat, self._logs = FleetScreen(context), ChatScreen(context), LogsScreen(context)
        self._models = ModelsScreen(context)
        for screen in (self._fleet, self._chat, self._models, self._logs, QueueScreen(context)):
            self.add_mode(screen.NAME, lambda screen=screen: screen)  # type: ignore[misc]
        await self.switch_mode("fleet")
        node.events.listen(self._hear)
        self.context = context
        return context

    def _hear(self, event: Event) -> None:
        """Tells what the user should not miss on another screen. Called inline by the bus."""
        from infsvc.events import BrokerStateChanged, ModelStateChanged
        from infsvc.types import ModelState

        if self._exit:
            return
        if isinstance(event, ModelStateChanged) and event.state is ModelState.FAILED:
            if self.current_mode in ("fleet", "models"):
                return  # it stands there, with its reason
            self._warn(f"{event.model} failed", event.reason or "")
        elif isinstance(event, BrokerStateChanged) and event.state == "down":
            self.log.warning(f"broker down: {event.reason}")

    def _warn(self, title: str, told: str) -> None:
        self.notify(_clean(told), title=_clean(title), severity="error", timeout=8, markup=False)

    @property
    def _node(self) -> NodeView:
        """The node, for what only its screens can ask for."""
        assert self.context is not None
        return self.context.node

    def shut_down(self) -> None:
        """Begins the end: the node's close drains what runs, then the app exits. May be called twice."""
        if self.context is not None:
            self.context.phase = "draining"
        self._leaving.set()

    async def action_go(self, name: str) -> None:
        """Changes to a screen, out of any dialog above the present one; keys typed meanwhile wait for it."""
        if self.context is None:
            return
        while len(self.screen_stack) > 1:
            await self.pop_screen()
        await self.switch_mode(name)

    async def action_quit(self) -> None:
        if self.context is None:
            self.shut_down()
            return
        from tui.node_view import n_running
        from tui.screens.dialogs import Question
        from tui.wording import plural

        n = n_running(self.context.node)
        if not n or self.context.phase == "draining":
            self.shut_down()
        elif not isinstance(self.screen, Question):

            def decide(yes: bool | None) -> None:
                if yes:
                    self.shut_down()

            told = f"{plural(n, 'request')} {'is' if n == 1 else 'are'} at work. They get 3 s, then end as cancelled."
            self.push_screen(Question(told, "quit"), decide)

    def action_help(self) -> None:
        from tui.screens.dialogs import Help

        if self.context is not None and not isinstance(self.screen, Help):
            self.push_screen(Help(self._keys()))

    def _keys(self) -> Iterable[tuple[str, str]]:
        """Key and sentence of every binding that works on this screen and has one."""
        own: dict[str, str] = {}
        everywhere: dict[str, str] = {}
        for active in self.screen.active_bindings.values():
            binding = active.binding
            told = active.tooltip or binding.description
            if binding.id and told:
                rows = everywhere if active.node is self else own
                rows.setdefault(told, self.get_key_display(binding))
        order = [getattr(binding, "tooltip", "") for binding in self.BINDINGS]
        for rows in (own, dict(sorted(everywhere.items(), key=lambda row: order.index(row[0])))):
            yield from ((key, told) for told, key in rows.items())

    def get_key_display(self, binding: Binding) -> str:
        """As Textual's, with function keys as they stand on the keyboard."""
        shown = super().get_key_display(binding)
        return shown.upper() if _FUNCTION_KEY.fullmatch(shown) else shown

    def action_toggle_theme(self) -> None:
        self.theme = LIGHT.name if self.theme == DARK.name else DARK.name

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """None of Textual's own: the palette shows the node's commands."""
        return ()

    def on_load_requested(self, message: LoadRequested) -> None:
        self._begin(self._load(message.model), f"load-{message.model}")

    def on_unload_requested(self, message: UnloadRequested) -> None:
        from tui.screens.dialogs import Question
        from tui.wording import plural

        worker = self._node.fleet.workers.get(message.model)
        n = worker.n_active + worker.n_waiting if worker else 0
        if not n:
            self._begin(self._unload(message.model), f"unload-{message.model}")
            return

        def decide(yes: bool | None) -> None:
            if yes:
                self._begin(self._unload(message.model), f"unload-{message.model}")

        told = f"{plural(n, 'request')} at work on {message.model}. They get 30 s, then end as cancelled."
        self.push_screen(Question(told, "unload"), decide)

    def on_pull_requested(self, message: PullRequested) -> None:
        self._begin(self._pull(message.model), f"pull-{message.model}")

    def on_remove_requested(self, message: RemoveRequested) -> None:
        from engine.model_source import describe
        from tui.screens.dialogs import Question

        worker = self._node.fleet.workers.get(message.model)
        if worker is None:
            return

        def decide(yes: bool | None) -> None:
            if yes:
                self._begin(self._remove(message.model), f"remove-{message.model}")

        again = (
            "It can be fetched again." if describe(worker.settings) else "Nothing says where to fetch it from again."
        )
        self.push_screen(Question(f"Remove the file {_clean(str(worker.path))}? {again}", "remove"), decide)

    async def on_new_worker_requested(self, message: NewWorkerRequested) -> None:
        from tui.screens.new_worker import NewWorkerDialog

        def tell(name: str | None) -> None:
            if name is not None and self._models is not None:
                self._models.show_model(name)
                self.notify("p fetches its file, l loads it", title=_clean(f"{name} is there"), markup=False)

        if self.context is None or isinstance(self.screen, NewWorkerDialog):
            return
        await self.action_go("models")
        self.push_screen(NewWorkerDialog(self._node, blink=self._animated), tell)

    async def on_chat_requested(self, message: ChatRequested) -> None:
        from tui.node_view import can_chat

        worker = self._node.fleet.workers.get(message.model)
        if message.host is None and worker is not None and not can_chat(worker):
            self._warn(f"{message.model} cannot chat", "It only embeds: `infsvc embed` or /v1/embeddings asks it.")
            return
        if self._chat is not None:
            self._chat.model, self._chat.host = message.model, message.host
        await self.action_go("chat")

    def _begin(self, work: object, name: str) -> None:
        self.run_worker(
            cast("asyncio.Future[None]", work),
            name=name,
            group="lifecycle",
            thread=False,
            exclusive=False,
            exit_on_error=True,
        )

    async def _load(self, model: str) -> None:
        try:
            await self._node.load(model)
        except InfsvcError as error:
            self._warn(f"{model} was not loaded", str(error))

    async def _pull(self, model: str) -> None:
        from infsvc.types import ModelState

        try:
            worker = await self._node.pull(model)
            if worker.state is not ModelState.DOWNLOADING and worker.state is not ModelState.VERIFYING:
                self.notify(_clean(str(worker.path)), title=_clean(f"{model}'s file is there"), markup=False)
        except InfsvcError as error:
            self._warn(f"{model} is not fetched", str(error))

    async def _remove(self, model: str) -> None:
        from tui.wording import size

        try:
            freed = await self._node.remove_file(model)
        except InfsvcError as error:
            self._warn("nothing was removed", str(error))
        else:
            self.notify(f"{size(freed)} are free", title=_clean(f"{model}'s file is gone"), markup=False)

    async def _unload(self, model: str) -> None:
        try:
            await self._node.unload(model)
        except InfsvcError as error:
            self._warn(f"{model} was not unloaded", str(error))


def _clean(text: str) -> str:
    from tui.wording import clean

    return clean(text)
