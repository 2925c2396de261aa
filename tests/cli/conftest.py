"""`infsvc serve` as a process of its own, with what it says and a way to end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes import add_worker, free_port, node_environ
from tests.tiny_models import write_tiny_model

ROOT = Path(__file__).resolve().parents[2]


class Served:
    """A running `infsvc serve`; `wait_for` reads its JSON log."""

    def __init__(self, *models: str, environ: dict[str, str]) -> None:
        self.environ = environ
        self.process = subprocess.Popen(
            [sys.executable, "-m", "infsvc", "serve", *models],
            cwd=ROOT,
            env=os.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[dict[str, Any]] = []

    def wait_for(self, code: str) -> dict[str, Any]:
        """The first log line with that code, now or later."""
        for line in self.lines:
            if line["code"] == code:
                return line
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.lines.append(json.loads(text))
            if self.lines[-1]["code"] == code:
                return self.lines[-1]
        raise AssertionError(f"the node ended without {code}: {self.lines[-5:]}")

    @property
    def gateway(self) -> str:
        return next(line["meta"]["gateway"] for line in self.lines if line["code"] == "services.init")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "long.gguf", n_ctx=65536)


@pytest.fixture
def environ(tmp_path: Path, long_model: Path) -> dict[str, str]:
    """A home with the model `tiny`, a gateway and a broker on ports of their own."""
    add_worker(tmp_path, "tiny", long_model, CTX_SIZE=16384)
    return node_environ(tmp_path, gateway=f":{free_port()}")


@pytest.fixture
def serve(environ: dict[str, str]) -> Iterator[Callable[..., Served]]:
    """Starts `infsvc serve` on the home; what still runs at the end is killed."""
    running: list[Served] = []

    def start(*models: str, **settings: str) -> Served:
        running.append(Served(*models, environ=environ | settings))
        return running[-1]

    yield start
    for served in running:
        served.close()


@pytest.fixture
def infsvc(environ: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs an `infsvc` command to its end."""

    def run(*arguments: str, stdin: str | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infsvc", *arguments],
            cwd=ROOT,
            env=os.environ | environ | settings,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
