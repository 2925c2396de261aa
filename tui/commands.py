"""What the command palette offers: the screens, each model's load, unload and chat, the theme, quitting."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.types import IgnoreReturnCallbackType

from engine.model_source import describe
from infsvc.types import ModelState
from tui.messages import (
    ChatRequested,
    LoadRequested,
    NewWorkerRequested,
    PullRequested,
    RemoveRequested,
    UnloadRequested,
)
from tui.node_view import can_chat
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
            elif worker.state is ModelState.ABSENT and describe(worker.settings):
                load = partial(app.post_message, LoadRequested(worker.name))
                yield f"Load {worker.name}", "Fetch its file, then make this model ready", load
            elif worker.state in (ModelState.DOWNLOADING, ModelState.VERIFYING):
                stop = partial(app.post_message, UnloadRequested(worker.name))
                yield f"Stop the pull of {worker.name}", "What has come is kept", stop
            elif worker.state in (ModelState.READY, ModelState.LOADING):
                unload = partial(app.post_message, UnloadRequested(worker.name))
                yield f"Unload {worker.name}", "Drain this model and free its memory", unload
            if worker.state in (ModelState.ABSENT, ModelState.FAILED) and describe(worker.settings):
                pull = partial(app.post_message, PullRequested(worker.name))
                yield f"Pull {worker.name}", "Fetch this model's file", pull
            if worker.state is ModelState.ON_DISK:
                remove = partial(app.post_message, RemoveRequested(worker.name))
                yield f"Remove the file of {worker.name}", "Asks first", remove
            if can_chat(worker):
                chat = partial(app.post_message, ChatRequested(worker.name))
                yield f"Chat with {worker.name}", "Go to Chat with this model", chat
        for far in app._node.far_chat.models():
            if far.status == "online":
                chat = partial(app.post_message, ChatRequested(far.model_name, far.node))
                yield f"Chat with {far.model_name} @{far.node}", "Go to Chat with this model of another node", chat
        yield "New worker", "Write a worker file for another model", partial(app.post_message, NewWorkerRequested())
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
