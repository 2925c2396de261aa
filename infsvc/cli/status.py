"""`infsvc status`: what runs, once."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from infsvc import board
from infsvc.cli.broker import broker_client
from infsvc.cli.outcome import friendly
from infsvc.cli.remote import NoNode, checked, named_node, node_client
from infsvc.errors import Unreachable

_COLUMNS = ("MODEL", "NODE", "STATUS", "ARCH", "PARAMS", "QUANT", "CTX", "WAIT", "ACT", "LEVEL", "DONE", "ENDPOINT")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the documents as JSON.")
@click.option(
    "--url",
    metavar="U",
    help="A node, http://…, or a broker, nats://… (default: INFSVC_URL, else this home's node, else the broker).",
)
@friendly
def status(as_json: bool, url: str | None) -> None:
    """Say what runs, once: each model with its state, queue and endpoint.

    Without a node here, the broker is asked, and every node on it answers.
    """
    url = named_node(url)
    services = _from_bus(url) if url and "://" in url and not url.startswith("http") else _services(url)
    if as_json:
        click.echo(json.dumps(services, indent=2, ensure_ascii=False))
        return
    if not services:
        click.echo("no model: no worker file is known here, and no node is on the broker")
        return
    rows = [_COLUMNS, *(_row(service) for service in services)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for service in services:
        if service.get("reason"):
            click.echo(board.clean(f"{service['model_name']}: {service['reason']}"))


def _services(url: str | None) -> list[dict[str, Any]]:
    """From the gateway, else from the bus."""
    try:
        with node_client(url, timeout_s=10) as client:
            services: list[dict[str, Any]] = checked(client.get("/api/services"))["services"]
            return services
    except NoNode:
        if url:
            raise
        try:
            return _from_bus(None)
        except Unreachable:
            pass
        raise


def _from_bus(url: str | None) -> list[dict[str, Any]]:
    async def look() -> list[dict[str, Any]]:
        async with broker_client(url) as client:
            return [service.model_dump() for service in await client.list_models()]

    return asyncio.run(look())


def _row(service: dict[str, Any]) -> tuple[str, ...]:
    info = service.get("model_info") or {}
    queue = service["queue_metrics"]
    return (
        board.clean(service["model_name"]),
        board.clean(service["node"]),
        board.clean(service["status"]),
        info.get("architecture", "-"),
        info.get("parameter_count", "-"),
        info.get("quantization", "-"),
        str(info.get("context_size", "-")),
        str(queue["pending_messages"]),
        str(queue["active_processing"]),
        service["backpressure_status"]["level"],
        str(queue["total_processed"]),
        service.get("endpoint") or "-",
    )
