"""The house's direction, proven from outside: what an import loads, and what may import what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LIGHT = (
    "infsvc",
    "infsvc.types",
    "infsvc.errors",
    "infsvc.events",
    "infsvc.settings",
    "infsvc.home",
    "infsvc.subjects",
    "infsvc.roster",
    "infsvc.watch",
    "infsvc.client",
    "infsvc.nats_link",
    "infsvc.nats_login",
    "infsvc.http_link",
)
NETWORK = {"nats", "httpx2", "httpx", "httpcore2"}
HEAVY = {
    "engine",
    "storage",
    "transports",
    "tui",
    "textual",
    "llama_cpp",
    "numpy",
    "starlette",
    "uvicorn",
    "aiosqlite",
    "jinja2",
}


@pytest.mark.parametrize("module", LIGHT)
def test_the_ground_loads_neither_engine_nor_screen(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert HEAVY.isdisjoint(told.stdout.split())


def test_the_client_loads_a_network_library_when_it_is_opened() -> None:
    code = (
        "import sys, infsvc; names = set(sys.modules); from infsvc import Client; Client('nats://x'); "
        "print('pydantic' in names, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    early, *loaded = told.stdout.split()
    assert early == "False"
    assert NETWORK.isdisjoint(loaded)
    assert HEAVY.isdisjoint(loaded)


def test_the_rooms_load_no_screen() -> None:
    code = "import sys, engine.service, storage.audit_log, transports; print('textual' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout == "False\n"


def test_the_import_contracts_hold() -> None:
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=80,
    )
    assert told.returncode == 0, told.stdout + told.stderr
