"""Real nodes for tests: a home of their own with a tiny model, free ports, and a broker of their own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from infsvc.home import Home
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


def add_worker(home: Path, name: str, model: Path | None, **keys: Any) -> None:
    """Writes a worker file, and puts a model's file where it looks for it."""
    settings = {"HTTP_ADDR": ":0", "MODEL_THREADS": 1, "WORKER_CONCURRENCY": 4, "CTX_SIZE": 1024} | keys
    text = "".join(f"{key}={value}\n" for key, value in settings.items())
    (home / "envs").mkdir(parents=True, exist_ok=True)
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
