"""`infsvc logs`: a model's audit rows, read from its file; no node need run."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from datetime import datetime
from typing import Any, get_args

import click

from infsvc.audit import AuditStatus
from infsvc.cli.outcome import friendly
from infsvc.errors import UnknownModel
from infsvc.home import Home
from infsvc.settings import load_node_settings, load_workers

_FOLLOW_S = 0.5
_INPUT_CELLS = 60


@click.command()
@click.argument("model")
@click.option("-n", "n_rows", type=click.IntRange(1, 100_000), default=20, show_default=True, help="The newest N rows.")
@click.option("--status", type=click.Choice(get_args(AuditStatus)), help="Only rows that ended so.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new rows as they come, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print each row whole, as a JSON object a line.")
@friendly
def logs(model: str, n_rows: int, status: str | None, follow: bool, as_json: bool) -> None:
    """Print MODEL's audit rows, the oldest first."""
    home = Home.locate()
    workers = load_workers(home, load_node_settings())
    if model not in workers:
        raise UnknownModel(model, sorted(workers))
    with suppress(KeyboardInterrupt):
        asyncio.run(
            _print(home, model, workers[model].db_path, n_rows=n_rows, status=status, follow=follow, as_json=as_json)
        )


async def _print(
    home: Home, model: str, db_path: str, *, n_rows: int, status: str | None, follow: bool, as_json: bool
) -> None:
    from storage.audit_log import AuditLog, AuditReader

    path = home.root / db_path
    reader = AuditReader({model: AuditLog(path)})
    rows = await reader.rows(model, limit=n_rows, status=status)
    if not rows and not follow:
        click.echo(f"no rows in {path}", err=True)
    last = 0
    while True:
        for row in reversed(rows):
            last = max(last, int(row["id"]))
            click.echo(json.dumps(row, ensure_ascii=False) if as_json else _line(row))
        if not follow:
            return
        await asyncio.sleep(_FOLLOW_S)
        rows = await reader.rows(model, limit=1000, status=status, after_id=last)


def _line(row: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(row["ts"]).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    text = " ".join(str(row["raw_input"] or "").split())
    text = text if len(text) <= _INPUT_CELLS else text[: _INPUT_CELLS - 1] + "…"
    told = row["error"] or text
    figures = f"{row['tokens_in'] or 0:>6} in {row['tokens_out'] or 0:>6} out {row['dur_ms'] or 0:>8.0f} ms"
    clean = "".join(character for character in told if character.isprintable())
    return f"{at}  {row['status']:<9} {row['req_id']:<16}  {row['source'] or '-':<5} {figures}  {clean}"
