"""`infsvc status`: what runs, once."""

from __future__ import annotations

import json
from typing import Any

import click

from infsvc.cli.outcome import friendly
from infsvc.cli.remote import checked, node_client

_COLUMNS = ("MODEL", "STATUS", "ARCH", "PARAMS", "QUANT", "CTX", "WAIT", "ACT", "LEVEL", "DONE", "ENDPOINT")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the documents as JSON.")
@click.option("--url", metavar="U", help="The node to ask (default: the one of this home, else http://127.0.0.1:5780).")
@friendly
def status(as_json: bool, url: str | None) -> None:
    """Say what runs, once: each model with its state, queue and endpoint."""
    with node_client(url, timeout_s=10) as client:
        services = checked(client.get("/api/services"))["services"]
    if as_json:
        click.echo(json.dumps(services, indent=2, ensure_ascii=False))
        return
    rows = [_COLUMNS, *(_row(service) for service in services)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(_COLUMNS))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for service in services:
        if service.get("reason"):
            click.echo(f"{service['model_name']}: {service['reason']}")


def _row(service: dict[str, Any]) -> tuple[str, ...]:
    info = service.get("model_info") or {}
    queue = service["queue_metrics"]
    return (
        service["model_name"],
        service["status"],
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
