"""What the command palette offers: the screens, each model's load, unload and chat, the theme, quitting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.types import IgnoreReturnCallbackType

from infsvc.types import ModelState
from tui.messages import ChatRequested, LoadRequested, UnloadRequested
from tui.widgets.tab_line import SCREENS

if TYPE_CHECKING:
    from tui.app import InfsvcApp

Command = tuple[str, str, IgnoreReturnCallbackType]


class NodeCommands(Provider):
    """One list feeds both what is shown at once and what is found by typing."""

    def _commands(self) -> Iterator[Command]:
        app = cast("InfsvcApp", self.app)
        for _, name, title in SCREENS:
            yield f"Go to {title}", f"Screen {title}", partial(app.action_go, name)
        workers = app.context.node.fleet.workers if app.context is not None else {}
        for worker in workers.values():
            if worker.state in (ModelState.ON_DISK, ModelState.FAILED):
                yield (
                    f"Load {worker.name}",
                    "Make this model ready",
                    partial(app.post_message, LoadRequested(worker.name)),
                )
            elif worker.state in (ModelState.READY, ModelState.LOADING):
                unload = partial(app.post_message, UnloadRequested(worker.name))
                yield f"Unload {worker.name}", "Drain this model and free its memory", unload
            chat = partial(app.post_message, ChatRequested(worker.name))
            yield f"Chat with {worker.name}", "Go to Chat with this model", chat
        yield "Toggle theme", "Dark or light", app.action_toggle_theme
        yield "Help", "The keys of this screen", app.action_help
        yield "Quit", "End the node; asks when requests run", app.action_quit

    async def discover(self) -> Hits:
        for title, told, call in self._commands():
            yield DiscoveryHit(title, call, help=told)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for title, told, call in self._commands():
            if (score := matcher.match(title)) > 0:
                yield Hit(score, matcher.highlight(title), call, help=told)
