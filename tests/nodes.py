"""Real nodes for tests: a home of their own with a tiny model, free ports, and a broker of their own."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from engine.probe import probe
from infsvc.events import BrokerStateChanged, EventBus
from infsvc.home import Home, app_root
from infsvc.settings import load_node_settings, load_workers
from transports.node import Node

ENDLESS = {"max_tokens": 100_000, "ignore_eos": True, "temperature": 0}
"""Parameters of an answer that does not end by itself within a test."""


def free_port() -> int:
    """A port that nobody listens on now, nor any test beside this one, nor the system for a connection's own end: those
    come from 32768 up."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + worker % 8 * 2_500
    while True:
        port = first + secrets.randbelow(2_500)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@cache
def _probed() -> bytes:
    """What a node's first start would find out about this machine; found out once a run."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as beside_the_loop:
        kept = Path(folder) / "probe.json"
        beside_the_loop.submit(asyncio.run, probe(app_root() / "data/models/demo/model.gguf", kept)).result()
        return kept.read_bytes()


def add_worker(home: Path, name: str, model: Path | None, **keys: Any) -> None:
    """Writes a worker file, and puts a model's file where it looks for it."""
    settings = {"HTTP_ADDR": ":0", "MODEL_THREADS": 1, "WORKER_CONCURRENCY": 4, "CTX_SIZE": 1024} | keys
    text = "".join(f"{key}={value}\n" for key, value in settings.items())
    for folder in ("envs", "data/run"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    (home / "data/run/probe.json").write_bytes(_probed())
    (home / f"envs/worker.{name}.env").write_text(text)
    if model is not None:
        target = home / f"data/models/{name}/model.gguf"
        target.parent.mkdir(parents=True)
        shutil.copy(model, target)


def node_environ(home: Path, **settings: Any) -> dict[str, str]:
    """`INFSVC_…` settings of a node that takes no port of another."""
    environ = {
        "INFSVC_HOME": str(home),
        "INFSVC_GATEWAY": ":0",
        "INFSVC_NATS_URL": f"nats://127.0.0.1:{free_port()}",
        "INFSVC_NODE": "alpha",
    }
    return environ | {f"INFSVC_{key.upper()}": str(value) for key, value in settings.items()}


def build(folder: Path, *chosen: str, **settings: Any) -> Node:
    """A node over a home made by `add_worker`; nothing of the checkout's own is in it."""
    home = Home(folder, folder)
    node_settings = load_node_settings(node_environ(folder, **settings))
    return Node(home, node_settings, load_workers(home, node_settings, {}), chosen)


async def connected(events: EventBus) -> None:
    """Waits until a node is on its broker."""
    subscription = events.subscribe(replay=True)
    try:
        async for event in subscription:
            if isinstance(event, BrokerStateChanged) and event.state == "connected":
                return
    finally:
        subscription.close()
