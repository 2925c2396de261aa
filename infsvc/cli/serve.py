"""`infsvc serve`: the node with no screen."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from infsvc.cli.build import build_node, prepare_home
from infsvc.cli.outcome import friendly
from infsvc.cli.signals import on_stop

if TYPE_CHECKING:
    from transports.node import Node


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--quiet", is_flag=True, help="Leave standard output alone: the log goes to data/logs/node.jsonl only.")
@friendly
def serve(models: tuple[str, ...], quiet: bool) -> None:
    """Run a node without a screen; each log line is a JSON object on standard output.

    MODEL names envs/worker.<MODEL>.env. With none, those that ran last are loaded; on a first run the demo model.
    SIGTERM and SIGINT let running work go on for 3 seconds, then end it.
    """
    asyncio.run(_serve(build_node(prepare_home(), models, log_to_stdout=not quiet)))


async def _serve(node: Node) -> None:
    stop = asyncio.Event()
    on_stop(asyncio.get_running_loop(), stop.set)
    async with node:
        await stop.wait()
