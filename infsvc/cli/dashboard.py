"""`infsvc dashboard`: the web dashboard on a port of its own, for the node that runs here or another one."""

from __future__ import annotations

import asyncio
import os

import click

from infsvc.cli.outcome import fail, friendly
from infsvc.cli.remote import named_node, node_url
from infsvc.cli.signals import on_stop


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N",
              help="The port to listen on, on this machine; 0 takes a free one.")  # fmt: skip
@click.option("--url", metavar="U", help="The node (default: INFSVC_URL, else the one of this home).")
@friendly
def dashboard(port: int, url: str | None) -> None:
    """Serve the web dashboard. The node's gateway serves the same page at /."""
    try:
        asyncio.run(_serve(port, node_url(named_node(url))))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "psutil", "transports"):
            raise
        fail("the dashboard's server needs the extra `node`: pip install 'infsvc[node]', or open the gateway's /")


async def _serve(port: int, gateway: str) -> None:
    from infsvc.settings import Address
    from transports.http.dashboard_proxy import build_proxy
    from transports.http.server import HttpServer

    stop = asyncio.Event()
    on_stop(asyncio.get_running_loop(), stop.set)
    verify = os.environ.get("INFSVC_TLS_CERT") or True
    app, client = build_proxy(gateway, verify=verify)
    async with client:
        server = HttpServer(app, Address("127.0.0.1", port), setting="--port")
        await server.start()
        try:
            click.echo(f"the dashboard of {gateway} is at http://127.0.0.1:{server.port}/ (Ctrl+C ends it)")
            await stop.wait()
        finally:
            await server.close()
