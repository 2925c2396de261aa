"""The app: the node's face. Paints first, starts the node after the first frame, and ends with the node's own close.

The node runs inside one worker that enters and leaves it, so that every way out — a key, a signal, an error — drains
it in the same way. The app decides nothing about models: it hands requests to the node and tells its errors.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import ClassVar, cast

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.command import Provider
from textual.screen import Screen

from infsvc.errors import InfsvcError
from infsvc.events import BrokerStateChanged, Event, ModelStateChanged
from infsvc.types import ModelState
from tui.commands import NodeCommands
from tui.context import Context
from tui.messages import ChatRequested, LoadRequested, UnloadRequested
from tui.node_view import NodeView, n_running
from tui.screens.chat import ChatScreen
from tui.screens.dialogs import Help, Question
from tui.screens.fleet import FleetScreen
from tui.screens.logs import LogsScreen
from tui.themes import DARK, LIGHT
from tui.wording import clean, plural


def _now() -> datetime:
    return datetime.now().astimezone()


class InfsvcApp(App[int]):
    """The full-screen app over one node; its return value is the process' exit code.

    Args:
        node: started after the first frame, closed before the app ends.
        clock: the wall time that is shown.
        monotonic: seconds, for durations that are shown.
        animate: False for still pictures: no animation, no blinking cursor.
    """

    TITLE = "infsvc"
    CSS_PATH = "app.tcss"
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {NodeCommands}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "go('fleet')", show=False, priority=True, id="app.fleet", tooltip="Fleet (also 1)"),
        Binding("f2", "go('chat')", show=False, priority=True, id="app.chat", tooltip="Chat (also 2)"),
        Binding("f5", "go('logs')", show=False, priority=True, id="app.logs", tooltip="Logs (also 5)"),
        Binding("1", "go('fleet')", show=False, id="app.fleet.digit"),
        Binding("2", "go('chat')", show=False, id="app.chat.digit"),
        Binding("5", "go('logs')", show=False, id="app.logs.digit"),
        Binding("question_mark,f12", "help", "help", key_display="?", id="app.help", tooltip="These keys (also F12)"),
        Binding("ctrl+p", "command_palette", show=False, priority=True, id="app.palette", tooltip="Find a command"),
        Binding("ctrl+q", "quit", "quit", priority=True, id="app.quit", tooltip="End the node; asks if it is busy"),
    ]  # fmt: skip

    def __init__(
        self,
        node: NodeView,
        *,
        clock: Callable[[], datetime] = _now,
        monotonic: Callable[[], float] = time.monotonic,
        animate: bool = True,
    ) -> None:
        super().__init__()
        self.context = Context(node, clock, monotonic, animate)
        self._leaving = asyncio.Event()
        if not animate:
            self.animation_level = "none"
        self.register_theme(DARK)
        self.register_theme(LIGHT)
        self.theme = DARK.name
        self._fleet = FleetScreen(self.context)
        self._chat = ChatScreen(self.context)
        self._logs = LogsScreen(self.context)
        for screen in (self._fleet, self._chat, self._logs):
            self.add_mode(screen.NAME, lambda screen=screen: screen)  # type: ignore[misc]

    async def on_mount(self) -> None:
        await self.switch_mode("fleet")
        self.context.node.events.listen(self._hear)
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        self.run_worker(self._run_node(), name="node", group="node", thread=False, exclusive=True, exit_on_error=True)

    async def _run_node(self) -> None:
        """Starts the node, waits for the end, closes it, and ends the app."""
        try:
            async with self.context.node:
                if self.context.phase == "starting":
                    self.context.phase = "running"
                await self._leaving.wait()
        except InfsvcError as error:
            self.exit(1, return_code=1, message=clean(str(error)))
        else:
            self.exit(0)

    def _hear(self, event: Event) -> None:
        """Tells what the user should not miss on another screen. Called inline by the bus."""
        if self._exit:
            return
        if isinstance(event, ModelStateChanged) and event.state is ModelState.FAILED:
            if self.current_mode == "fleet":
                return  # it stands there, with its reason
            self._warn(f"{event.model} failed", event.reason or "")
        elif isinstance(event, BrokerStateChanged) and event.state == "down":
            self.log.warning(f"broker down: {event.reason}")

    def _warn(self, title: str, told: str) -> None:
        self.notify(clean(told), title=clean(title), severity="error", timeout=8, markup=False)

    def shut_down(self) -> None:
        """Begins the end: the node's close drains what runs, then the app exits. May be called twice."""
        self.context.phase = "draining"
        self._leaving.set()

    async def action_go(self, name: str) -> None:
        """Changes to a screen, out of any dialog above the present one; keys typed meanwhile wait for it."""
        while len(self.screen_stack) > 1:
            await self.pop_screen()
        await self.switch_mode(name)

    async def action_quit(self) -> None:
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
        if not isinstance(self.screen, Help):
            self.push_screen(Help(self._keys()))

    def _keys(self) -> Iterable[tuple[str, str]]:
        """Key and sentence of every binding that works on this screen and has one."""
        seen: set[str] = set()
        for active in self.screen.active_bindings.values():
            binding = active.binding
            told = active.tooltip or binding.description
            if binding.id and told and told not in seen:
                seen.add(told)
                yield self.get_key_display(binding), told

    def action_toggle_theme(self) -> None:
        self.theme = LIGHT.name if self.theme == DARK.name else DARK.name

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """None of Textual's own: the palette shows the node's commands."""
        return ()

    def on_load_requested(self, message: LoadRequested) -> None:
        self._begin(self._load(message.model), f"load-{message.model}")

    def on_unload_requested(self, message: UnloadRequested) -> None:
        worker = self.context.node.fleet.workers.get(message.model)
        n = worker.n_active + worker.n_waiting if worker else 0
        if not n:
            self._begin(self._unload(message.model), f"unload-{message.model}")
            return

        def decide(yes: bool | None) -> None:
            if yes:
                self._begin(self._unload(message.model), f"unload-{message.model}")

        told = f"{plural(n, 'request')} at work on {message.model}. They get 3 s, then end as cancelled."
        self.push_screen(Question(told, "unload"), decide)

    async def on_chat_requested(self, message: ChatRequested) -> None:
        self._chat.model = message.model
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
            await self.context.node.load(model)
        except InfsvcError as error:
            self._warn(f"{model} was not loaded", str(error))

    async def _unload(self, model: str) -> None:
        try:
            await self.context.node.unload(model)
        except InfsvcError as error:
            self._warn(f"{model} was not unloaded", str(error))
