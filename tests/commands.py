"""A place where the shell lines of our pages run as they stand: a home of its own, and a folder of commands in front of
PATH.

`make` there works on the checkout and installs nothing; `curl` fails on an error status; the addresses that a page
names (5780, 5700, …) become those of the place's own node, so that nothing else on this machine is asked instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx2

from tests.nodes import free_port

ROOT = Path(__file__).resolve().parents[1]
_START_S = 60.0
_CURL = 'curl() { command curl --fail-with-body "$@"; }'
"""In the lines themselves, not in the scripts they call: those show an error on purpose."""

_SQLITE = """
import sqlite3, sys
db = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
for row in db.execute(sys.argv[2]):
    print(*("" if cell is None else cell for cell in row), sep="|")
"""
"""What the `sqlite3` tool prints, for machines that lack it."""


class Place:
    """A home and its commands.

    Args:
        folder: where both are made.
        models: models whose own ports are moved, as `{name: the port that pages name}`.
        keep: whether the pages' own ports are used, not free ones in their place.
    """

    def __init__(self, folder: Path, *, models: Mapping[str, int], keep: bool = False) -> None:
        self.home, self._bin = folder / "home", folder / "bin"
        self.home.mkdir(parents=True)
        for shown in ("examples", "docs"):
            (self.home / shown).symlink_to(ROOT / shown)
        documented = {5780: "gateway", 5700: "broker", 8080: "dashboard"} | {
            port: name for name, port in models.items()
        }
        self.ports = {port: port if keep else free_port() for port in documented}
        self.gateway = f"http://127.0.0.1:{self.ports[5780]}"
        self._make_commands()
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith(("INFSVC", "MODEL"))}
        self.environ |= {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "INFSVC_HOME": str(self.home),
            "INFSVC_GATEWAY": f":{self.ports[5780]}",
            "INFSVC_NATS_URL": f"nats://127.0.0.1:{self.ports[5700]}",
            "INFSVC_NODE": "alpha",
        }
        for name, port in models.items():
            key = name.upper().replace("-", "_").replace(".", "_")
            self.environ[f"INFSVC__{key}__HTTP_ADDR"] = f":{self.ports[port]}"

    def _make_commands(self) -> None:
        python = sys.executable
        self._command("python", f'exec {python} "$@"')
        self._command("infsvc", f'exec {python} -m infsvc "$@"')
        self._command("infsvc-tui", f"exec {python} -c 'from infsvc.__main__ import main_tui; main_tui()' \"$@\"")
        self._command("lint-imports", f"cd {ROOT} && exec {Path(python).with_name('lint-imports')}")
        self._command("make", f'exec {shutil.which("make")} -s --no-print-directory -C {ROOT} BIN={self._bin} "$@"')
        if shutil.which("sqlite3") is None:
            (self._bin / "sqlite3.py").write_text(_SQLITE)
            self._command("sqlite3", f'exec {python} {self._bin}/sqlite3.py "$@"')
        # What the Makefile marks as installed, in the order of its rules.
        version = next(
            line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("LLAMA_VERSION")
        )
        for stamp in (".venv", f".llama-{version.split()[-1]}", ".client", ".node", ".dev"):
            (self._bin / stamp).touch()

    def _command(self, name: str, text: str) -> None:
        self._bin.mkdir(exist_ok=True)
        path = self._bin / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """The text with this place's addresses for those that the pages name."""
        for port, own in self.ports.items():
            for host in ("localhost", "127.0.0.1"):
                text = text.replace(f"{host}:{port}", f"127.0.0.1:{own}")
        return text

    def documented(self, text: str) -> str:
        """The other way round: the pages' ports for this place's own."""
        for port, own in self.ports.items():
            text = text.replace(f":{own}", f":{port}")
        return text

    def run(self, script: str, *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Runs shell lines in the home; output and errors come together."""
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{_CURL}\n{self.here(script)}"],
            cwd=self.home,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    @contextmanager
    def node(self, *models: str, ready: str = "/healthz") -> Iterator[int]:
        """`infsvc serve` on this home; gives its process id once `ready` answers 200."""
        log = self.home / "serve.out"
        with log.open("wb") as stream:
            child = subprocess.Popen(
                ["infsvc", "serve", *models], cwd=self.home, env=self.environ, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=stream, executable=str(self._bin / "infsvc"),
            )  # fmt: skip
        try:
            self._until(ready, child, log)
            yield child.pid
        finally:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _until(self, path: str, child: subprocess.Popen[bytes], log: Path) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and child.poll() is None:
            try:
                if httpx2.get(self.gateway + path, trust_env=False).status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the node did not become ready:\n{log.read_text()[-4000:]}")
