"""No grammar and no schema ends the process: mutated ones by the hundred, in a child, which lives to tell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def fuzz(seed: int, n: int, last_words: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.engine.fuzz_constraints", str(seed), str(n), str(last_words)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, f"{child.stderr[-2000:]}\nthe last case: {last_words.read_text()[:2000]}"
    told: dict[str, Any] = json.loads(child.stdout)
    assert told["cases"] == n
    return told


def test_hundreds_of_mutated_grammars_and_schemas(tmp_path: Path) -> None:
    told = fuzz(1, 600, tmp_path / "last")
    assert told["compiled"] > 50
    assert told["refused"] > 100
    assert told["rss_mb"] < 1000


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_tens_of_thousands(tmp_path: Path, seed: int) -> None:
    assert fuzz(seed, 15_000, tmp_path / "last")["rss_mb"] < 1500
