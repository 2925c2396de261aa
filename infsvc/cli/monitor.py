"""`infsvc monitor`: every model of every node on a broker, live. It needs the bus alone, no node on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time

import click

from infsvc import board
from infsvc.cli.broker import broker_login
from infsvc.cli.outcome import fail, friendly
from infsvc.onlooker import Onlooker

_REDRAW_S = 1.0
_CLEAR = "\x1b[H\x1b[2J"


@click.command()
@click.option("--url", metavar="U", help="The broker (default: INFSVC_NATS_URL, else nats://127.0.0.1:5700).")
@click.option("--plain", is_flag=True, help="A table printed once a second, without the full screen.")
@click.option("--sort", "sort_by", type=click.Choice(board.SORTS), default=board.SORTS[0], show_default=True,
              help="What the plain table is sorted by.")  # fmt: skip
@friendly
def monitor(url: str | None, plain: bool, sort_by: str) -> None:
    """Watch every model of every node on a broker: state, queue, speed, response time.

    Keys: s sorts, / filters, enter shows everything known of a model, q quits.
    """
    login = broker_login(url)
    onlooker = Onlooker(login)
    if not plain and not (sys.stdin.isatty() and sys.stdout.isatty()):
        fail("the monitor needs a terminal: use --plain, or `infsvc status` for a single look")
    if not plain and os.environ.get("TERM", "") not in ("", "dumb"):
        try:
            from tui.monitor.app import MonitorApp
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in ("textual", "rich", "tui"):
                raise
            click.echo("infsvc: the full screen needs the extra `node` (pip install 'infsvc[node]'); plain table:",
                       err=True)  # fmt: skip
        else:
            MonitorApp(onlooker, shown_url=login.shown).run()
            return
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_plain(onlooker, login.shown, sort_by))


async def _plain(onlooker: Onlooker, url: str, sort_by: str) -> None:
    watching = asyncio.create_task(onlooker.run(), name="onlooker")
    clear = _CLEAR if sys.stdout.isatty() else ""
    try:
        while not watching.done():
            width = shutil.get_terminal_size((120, 30)).columns
            click.echo(clear + "\n".join(_lines(onlooker, url, width, sort_by)))
            await asyncio.wait({watching}, timeout=_REDRAW_S)
        await watching
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def _lines(onlooker: Onlooker, url: str, width: int, sort_by: str) -> list[str]:
    now_s = time.time()
    state = "●" if onlooker.state == "connected" else f"✕ {board.clean(onlooker.reason) or onlooker.state}"
    widths = board.layout(width)
    return [
        f"infsvc monitor  {url} {state}  {board.headline(onlooker.roster, now_s)}",
        " ".join(board.heading(key, room) for key, room in widths.items()).rstrip(),
        *(
            " ".join(board.cell(row, key, room)[0] for key, room in widths.items()).rstrip()
            for row in board.rows(onlooker.roster, now_s, sort_by=sort_by)
        ),
        *([dead] if (dead := board.dead_line(onlooker.roster)) else []),
        "",
    ]
