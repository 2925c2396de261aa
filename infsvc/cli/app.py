"""`infsvc-tui`: the full-screen app, which owns the node."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from typing import TYPE_CHECKING

import click

from infsvc import __version__
from infsvc.cli.outcome import fail, friendly

if TYPE_CHECKING:
    from infsvc.home import Home
    from transports.node import Node


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.version_option(__version__, prog_name="infsvc-tui")
@friendly
def app(models: tuple[str, ...]) -> None:
    """Open the full-screen app: it loads models, talks to them, and serves them over HTTP and NATS.

    MODEL names envs/worker.<MODEL>.env. With none, those that ran last are loaded; on a first run the demo model.
    """
    from tui.terminal import terminal_problem

    problem = terminal_problem(os.environ, sys.stdin.isatty() and sys.stdout.isatty(), shutil.get_terminal_size())
    if problem is not None:
        fail(problem)
    from infsvc.cli.build import prepare_home

    sys.exit(asyncio.run(_run(prepare_home(), models)))


async def _run(home: Home, models: tuple[str, ...]) -> int:
    from infsvc.cli.signals import on_stop
    from tui.app import InfsvcApp

    async def open_node() -> Node:
        from infsvc.cli.build import build_node

        return await asyncio.to_thread(build_node, home, models, log_to_stdout=False)

    screen = InfsvcApp(open_node)
    on_stop(asyncio.get_running_loop(), screen.shut_down)
    await screen.run_async()
    return screen.return_code or 0
