"""`infsvc models`: the worker files and their model files. A node that runs on this home is asked; without one these
commands do the same by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx2

from infsvc.cli.outcome import fail, friendly
from infsvc.cli.progress import ProgressLine
from infsvc.cli.remote import checked, node_client
from infsvc.errors import InfsvcError, UnknownModel, human_bytes
from infsvc.home import Home
from infsvc.settings import WorkerSettings, load_node_settings, load_workers

_POLL_S = 0.25
_ON_THE_WAY = ("downloading", "verifying")


@click.group()
def models() -> None:
    """List the models, fetch and remove their files."""


@dataclass(frozen=True)
class _Model:
    """A worker file with what is on the disk, and what the running node says of it."""

    settings: WorkerSettings
    path: Path
    service: dict[str, Any] | None

    @property
    def size_bytes(self) -> int | None:
        return self.path.stat().st_size if self.path.is_file() else None

    @property
    def source(self) -> str:
        from engine.model_file import origin

        return origin(self.settings, self.path)

    @property
    def part_bytes(self) -> int:
        """What has come of an unfinished download."""
        from engine.model_file import part_of

        with suppress(OSError):
            return part_of(self.path).stat().st_size
        return 0

    @property
    def state(self) -> str:
        if self.service is not None:
            state = str(self.service["state"]).replace("_", " ")
            progress = self.service.get("progress")
            return state if progress is None else f"{state} {int(progress * 100)} %"
        if self.size_bytes is not None:
            return "on disk"
        return f"absent, {human_bytes(self.part_bytes)} kept" if self.part_bytes else "absent"


def _home_models() -> tuple[Home, dict[str, _Model]]:
    """This home's models, with the running node's word on each."""
    home = Home.locate()
    services: dict[str, Any] = {}
    with _running(home) as client:
        if client is not None:
            services = {each["model_name"]: each for each in checked(client.get("/api/services"))["services"]}
    workers = load_workers(home, load_node_settings())
    return home, {
        name: _Model(settings, home.find(settings.model_path), services.get(name)) for name, settings in workers.items()
    }


def _named(models: dict[str, _Model], name: str) -> _Model:
    if name not in models:
        raise UnknownModel(name, sorted(models))
    return models[name]


@contextmanager
def _running(home: Home) -> Iterator[httpx2.Client | None]:
    """A client of the node that runs on this home, or None."""
    running = home.running_node()
    if running is None:
        yield None
        return
    if not running.get("gateway"):
        raise InfsvcError("the node that runs on this home is still starting or stopping: try again")
    with node_client(None) as client:
        yield client


@models.command("list")
@friendly
def list_models() -> None:
    """List every worker file with its state, file, port and source."""
    _, found = _home_models()
    rows = [("MODEL", "STATE", "SIZE", "PORT", "CTX", "SOURCE")]
    for name, model in found.items():
        address = model.settings.address
        rows.append(
            (
                name,
                model.state,
                "-" if model.size_bytes is None else human_bytes(model.size_bytes),
                str(address.port) if address else "-",
                str(model.settings.ctx_size or "model's"),
                model.source or ("-" if model.size_bytes is not None else "none: put the file there"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@models.command()
@click.argument("model")
@friendly
def show(model: str) -> None:
    """Say what MODEL is: its file, source, figures from its header, and the memory it takes."""
    from engine import memory_fit
    from engine.model_info import read_model_info
    from engine.scheduler import N_BATCH
    from infsvc.types import human_count

    home, found = _home_models()
    each = _named(found, model)
    settings = each.settings
    worker_files = {load_name: str(path) for load_name, path in home.worker_files().items()}
    facts = {
        "worker file": worker_files.get(model, "-"),
        "state": each.state,
        "reason": (each.service or {}).get("reason") or "",
        "file": f"{each.path}  {human_bytes(each.size_bytes)}"
        if each.size_bytes is not None
        else f"{each.path}, absent",
        "kept": f"{human_bytes(each.part_bytes)} of an unfinished download" if each.part_bytes else "",
        "source": each.source or "none",
        "sha256": settings.model_sha256 or ("the hub's" if settings.model_repo and not settings.model_url else ""),
        "endpoint": (each.service or {}).get("endpoint") or settings.http_addr or "gateway only",
        "subject": settings.subject,
    }
    if each.size_bytes is not None:
        try:
            info = read_model_info(each.path)
        except InfsvcError as error:
            facts["header"] = str(error)
        else:
            need = memory_fit.estimate(
                info, n_ctx=settings.ctx_size, n_slots=settings.worker_concurrency, n_batch=N_BATCH
            )
            facts |= {
                "architecture": info.architecture,
                "parameters": f"{human_count(info.n_params)}  {info.quantization}",
                "context": f"{settings.ctx_size or info.n_ctx_train} tokens a sequence, {settings.worker_concurrency} "
                f"sequences; trained on {info.n_ctx_train}",
                "memory": f"{human_bytes(need.total_bytes)} (weights {human_bytes(need.weight_bytes)}, "
                f"KV {human_bytes(need.kv_bytes)}, compute {human_bytes(need.compute_bytes)})",
                "licence": info.license or "not stated",
            }
    for key, value in facts.items():
        if value:
            click.echo(f"{key:<13} {value}")


@models.command()
@click.argument("model")
@friendly
def pull(model: str) -> None:
    """Fetch MODEL's file. What has come is kept when it is stopped, and the next pull goes on from there."""
    home, found = _home_models()
    each = _named(found, model)
    with _running(home) as client, ProgressLine(model) as line:
        try:
            if client is not None:
                _pull_from_node(client, model, line)
            else:
                _pull(home, each, line)
        except KeyboardInterrupt:
            told = f"the node goes on: `infsvc stop {model}` stops it" if client else "what has come is kept"
            line.end()
            fail(f"stopped; {told}")
    path = home.find(each.settings.model_path)
    click.echo(f"{model} is on disk: {path}  {human_bytes(path.stat().st_size)}")


def _pull_from_node(client: httpx2.Client, model: str, line: ProgressLine) -> None:
    checked(client.post(f"/api/models/{model}/pull"))
    while True:
        service = checked(client.get(f"/api/services/{model}"))
        if service["state"] not in _ON_THE_WAY:
            break
        show_pull(line, service)
        time.sleep(_POLL_S)
    if service["state"] == "failed":
        fail(str(service.get("reason")))
    if service["file"]["size_bytes"] is None:
        fail("the download was stopped; what has come is kept: pull again")


def show_pull(line: ProgressLine, service: dict[str, Any]) -> None:
    """Draws a download from a service document."""
    file = service["file"]
    line.show(
        service["state"],
        file.get("done_bytes") or 0,
        file.get("total_bytes") or 0,
        bytes_per_s=file.get("bytes_per_s"),
        eta_s=file.get("eta_s"),
    )


def _pull(home: Home, each: _Model, line: ProgressLine) -> None:
    """Fetches without a node."""
    from engine.download import Download, Progress

    if each.path.is_file():
        return

    def show(progress: Progress) -> None:
        word = "verifying" if progress.verifying else "downloading"
        line.show(
            word, progress.done_bytes, progress.total_bytes, bytes_per_s=progress.bytes_per_s, eta_s=progress.eta_s
        )

    home.make()
    download = Download(
        each.settings,
        home.root / each.settings.model_path,
        on_progress=show,
        on_note=lambda level, code, msg: line.say(msg),
    )
    download.start()
    try:
        fetched = download.done.result()
    except BaseException:
        download.stop()
        raise
    finally:
        download.join(5)
    if fetched.verified != "sha256":
        line.say(f"{each.settings.model_name}: no MODEL_SHA256 is set, so its content was not verified")


@models.command()
@click.argument("model")
@click.option("--yes", is_flag=True, help="Do not ask.")
@friendly
def rm(model: str, yes: bool) -> None:
    """Remove MODEL's file and what has come of an unfinished download. The worker file stays."""
    home, found = _home_models()
    each = _named(found, model)
    n_bytes = (each.size_bytes or 0) + each.part_bytes
    if not yes and n_bytes:
        again = (
            "It can be fetched again."
            if each.source not in ("", "ships")
            else "Nothing says where it could be fetched from again."
        )
        click.confirm(f"Remove {each.path} ({human_bytes(n_bytes)})? {again}", abort=True)
    with _running(home) as client:
        if client is not None:
            freed = int(checked(client.delete(f"/api/models/{model}/file"))["freed_bytes"])
        else:
            from engine.model_file import remove_file

            freed = remove_file(home, each.settings)
    click.echo(f"{model}: {human_bytes(freed)} are free")
