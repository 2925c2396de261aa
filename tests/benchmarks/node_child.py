"""A node for the benchmarks, with or without its screen, that measures how late its own event loop runs while it
decodes.

`python -m tests.benchmarks.node_child serve|tui MODEL RESULT`: ends on SIGTERM and writes `{worst_ms, p99_ms}` to
RESULT.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from infsvc.cli.build import build_node, prepare_home
from infsvc.cli.signals import on_stop
from transports.node import Node

_TICK_S = 0.005


async def watch(node: Node, late_ms: list[float]) -> None:
    """Notes how late each tick comes while a request runs."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _TICK_S
        await asyncio.sleep(_TICK_S)
        if any(worker.n_active for worker in node.fleet.workers.values()):
            late_ms.append((loop.time() - due) * 1000)


async def run(mode: str, model: str, result: Path) -> None:
    node = build_node(prepare_home(), [model], log_to_stdout=False)
    late_ms: list[float] = []
    watching = asyncio.create_task(watch(node, late_ms))
    if mode == "tui":
        from tui.app import InfsvcApp

        async def open_node() -> Node:
            return node

        screen = InfsvcApp(open_node)
        on_stop(asyncio.get_running_loop(), screen.shut_down)
        await screen.run_async()
    else:
        stop = asyncio.Event()
        on_stop(asyncio.get_running_loop(), stop.set)
        async with node:
            await stop.wait()
    watching.cancel()
    late_ms.sort()
    told = {"worst_ms": late_ms[-1], "p99_ms": late_ms[int(len(late_ms) * 0.99)]} if late_ms else {}
    result.write_text(json.dumps(told))


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
