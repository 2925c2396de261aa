"""`infsvc queue`: what waits in the durable queue, and the requests that could not be answered."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import click

from infsvc.cli.outcome import friendly
from infsvc.cli.remote import checked, named_node, node_client

_URL = click.option("--url", metavar="U", help="The node to ask (default: INFSVC_URL, else the one of this home).")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the documents as JSON.")
_PAGE = 100


@click.group()
def queue() -> None:
    """Look into the durable queue on the broker, and at its dead letters."""


@queue.command("list")
@_JSON
@_URL
@friendly
def list_queues(as_json: bool, url: str | None) -> None:
    """Show each model's queue: what waits, what is being worked on, how much it takes."""
    with node_client(named_node(url), timeout_s=10) as client:
        queues = checked(client.get("/api/queue"))["queues"]
    if as_json:
        _print_json(queues)
        return
    if not queues:
        click.echo("no model is served")
        return
    rows = [("MODEL", "WAIT", "TAKEN", "CAPACITY", "SUBJECT")]
    for one in queues:
        cells = (one["model"], one.get("waiting", "-"), one.get("taken", "-"), one["capacity"], one["subject"])
        rows.append(tuple(str(cell) for cell in cells))  # type: ignore[arg-type]
    _print_table(rows)
    for one in queues:
        if one.get("reason"):
            click.echo(f"{one['model']}: {one['reason']}")
        if one.get("foreign_streams"):
            names = ", ".join(one["foreign_streams"])
            click.echo(f"{one['model']}: the stream {names} answers its callers with a receipt")


@queue.command()
@click.option("-m", "--model", metavar="MODEL", help="Only this model's.")
@_JSON
@_URL
@friendly
def dead(model: str | None, as_json: bool, url: str | None) -> None:
    """List the requests that could not be answered, with the reason."""
    letters: list[dict[str, Any]] = []
    with node_client(named_node(url)) as client:
        while True:
            params = {"limit": str(_PAGE), "after": str(letters[-1]["id"] if letters else 0)}
            if model is not None:
                params["model"] = model
            page = checked(client.get("/api/dead", params=params))["dead"]
            letters += page
            if len(page) < _PAGE:
                break
    if as_json:
        _print_json(letters)
        return
    if not letters:
        click.echo("no dead letters")
        return
    rows = [("ID", "DIED", "MODEL", "REQ_ID", "TRIED", "REASON")]
    for one in letters:
        cells = (one["id"], one["died"], one["model"], one["req_id"] or "-", one["deliveries"], one["reason"])
        rows.append(tuple(str(cell) for cell in cells))  # type: ignore[arg-type]
    _print_table(rows)


@queue.command()
@click.argument("number", metavar="ID", type=click.IntRange(min=1))
@_URL
@friendly
def replay(number: int, url: str | None) -> None:
    """Put dead letter ID back into its queue; it is answered where it says."""
    with node_client(named_node(url), timeout_s=10) as client:
        told = checked(client.post(f"/api/dead/{number}/replay"))
    click.echo(f"{told['req_id'] or f'dead letter {number}'} waits for {told['model']} again")


@queue.command()
@click.argument("model", required=False)
@click.option("--dead", "number", metavar="ID", type=click.IntRange(min=1), help="Forget this dead letter instead.")
@_URL
@friendly
def purge(model: str | None, number: int | None, url: str | None) -> None:
    """Remove what waits for MODEL and no node has taken; each caller is told. With --dead, forget a dead letter."""
    if (model is None) == (number is None):
        raise click.UsageError("name a MODEL, or a dead letter with --dead ID")
    with node_client(named_node(url)) as client:
        if number is not None:
            checked(client.delete(f"/api/dead/{number}"))
            click.echo(f"dead letter {number} is forgotten")
        else:
            told = checked(client.delete(f"/api/queue/{quote(model or '', safe='')}"))
            click.echo(f"{told['removed']} requests for {model} were removed")


def _print_json(documents: Any) -> None:
    click.echo(json.dumps(documents, indent=2, ensure_ascii=False))


def _print_table(rows: list[Any]) -> None:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
