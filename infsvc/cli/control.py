"""`infsvc start` and `infsvc stop`: one node a home, models come and go in it. `make start` and `make stop` call
these.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
import httpx2

from infsvc.cli.models import show_pull
from infsvc.cli.outcome import fail, friendly
from infsvc.cli.progress import ProgressLine
from infsvc.cli.remote import checked, node_client
from infsvc.errors import InfsvcError
from infsvc.home import Home, app_root
from infsvc.settings import load_node_settings, load_workers

_POLL_S = 0.2
_START_S = 30.0
_LOAD_S = 600.0
_STOP_S = 15.0
_OUTPUT_BYTES = 2**20


@click.command()
@click.argument("model")
@click.option("--force", is_flag=True, help="Load it even if it seems not to fit into memory.")
@friendly
def start(model: str, force: bool) -> None:
    """Load MODEL: in the node that runs on this home, or in a new one in the background. Waits until it is ready.

    A missing model file is fetched first.
    """
    home = Home.locate()
    if home.running_node() is None:
        _spawn(home, model)
    _await_gateway(home)
    with node_client(None) as client:
        checked(client.post(f"/api/models/{model}/load", json={"force": force}))
        _await_ready(client, model)
    click.echo(f"{model} is ready")


@click.command()
@click.argument("model", required=False)
@friendly
def stop(model: str | None) -> None:
    """Unload MODEL once its running work is done; without MODEL, end the node."""
    running = Home.locate().running_node()
    if running is None:
        click.echo("no node runs on this home")
        return
    if model is not None:
        with node_client(None, timeout_s=60) as client:
            checked(client.post(f"/api/models/{model}/unload"))
        click.echo(f"{model} is unloaded")
        return
    pid = running.get("pid")
    if not isinstance(pid, int):
        fail("the node that runs on this home is still starting or stopping: try again")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_S
    while Home.locate().running_node() is not None:
        if time.monotonic() > deadline:
            fail(f"the node (pid {pid}) has not ended within {_STOP_S:g} s")
        time.sleep(_POLL_S)
    click.echo("the node has ended")


def _spawn(home: Home, model: str) -> None:
    """Starts `infsvc serve MODEL` as a process of its own and waits until its gateway answers."""
    load_workers(home, load_node_settings())
    home.make()
    # Its log is in node.jsonl, which is rotated; here goes what keeps it from starting, and what Python complains of.
    output = home.logs / "serve.out"
    with suppress(FileNotFoundError):  # there is none yet, or another start has moved it
        if output.stat().st_size > _OUTPUT_BYTES:
            output.replace(output.with_suffix(".out.1"))
    with output.open("ab") as stream:
        child = subprocess.Popen(
            [sys.executable, "-m", "infsvc", "serve", "--quiet", model],
            cwd=home.root,
            env=os.environ | {"INFSVC_HOME": str(home.root), "PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if child.poll() is not None:
            # Another start may have been quicker: its node is as good.
            if home.running_node() is not None:
                return
            raise InfsvcError(f"the node ended at once: {_last_line(output)} (see {output})")
        running = home.running_node()
        if running and running.get("pid") == child.pid:
            return
        time.sleep(_POLL_S)
    fail(f"the node has not started within {_START_S:g} s: see {output}")


def _await_gateway(home: Home) -> None:
    """Waits until the node that holds this home says where its gateway is."""
    deadline = time.monotonic() + _START_S
    while not (running := home.running_node()) or not running.get("gateway"):
        if running is None or time.monotonic() > deadline:
            fail("the node that ran on this home has ended, or does not start: see its log")
        time.sleep(_POLL_S)


def _python_path() -> str:
    """So that `python -m infsvc` finds this very package, wherever the home is."""
    root = app_root()
    package = root.parent.parent if root.name == "_app" else root
    return os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("infsvc: ") if lines else "it said nothing"


def _await_ready(client: httpx2.Client, model: str) -> None:
    """Waits for the model. A download may take as long as it takes; a load may not."""
    deadline = time.monotonic() + _LOAD_S
    with ProgressLine(model) as line:
        while time.monotonic() < deadline:
            service = checked(client.get(f"/api/services/{model}"))
            if service["status"] == "online":
                return
            if service["status"] in ("failed", "offline"):
                fail(f"{model} is {service['status']}: {service.get('reason') or 'it was unloaded'}")
            if service["state"] in ("downloading", "verifying"):
                show_pull(line, service)
                deadline = time.monotonic() + _LOAD_S
            time.sleep(_POLL_S)
    fail(f"{model} is not ready after {_LOAD_S:g} s: see `infsvc status`")
