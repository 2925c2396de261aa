"""What the screen costs: tokens/s of eight streams over HTTP with the screen open, against the same node without it,
in one run.

`python -m tests.benchmarks.screen_cost [--rounds 3] [--tokens 64]`. The model is a random-weight one of about 0.4B
parameters with a vocabulary of 152k. The two kinds take turns; medians and their ratio are printed, and how late the
node's event loop ran meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pty
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.nodes import add_worker, free_port, node_environ
from tests.tiny_models import write_large_model

ROOT = Path(__file__).resolve().parents[2]
N_STREAMS = 8


@dataclass
class Round:
    """One node's run."""

    tokens_per_s: float
    ttft_ms: float
    ready_s: float
    worst_ms: float
    p99_ms: float


async def stream(client: httpx2.AsyncClient, n_tokens: int) -> float:
    """One streamed answer; returns the seconds to its first event."""
    body = {
        "input": "Write something.",
        "stream": True,
        "params": {"max_tokens": n_tokens, "ignore_eos": True, "temperature": 0},
    }
    begun, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                first = first or time.perf_counter() - begun
    return first


async def load(url: str, n_tokens: int) -> tuple[float, float]:
    """Tokens/s of all streams together, and the median time to the first event in milliseconds."""
    async with httpx2.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        await stream(client, 4)
        begun = time.perf_counter()
        firsts = await asyncio.gather(*(stream(client, n_tokens) for _ in range(N_STREAMS)))
        return N_STREAMS * n_tokens / (time.perf_counter() - begun), statistics.median(firsts) * 1000


def drink(descriptor: int) -> None:
    """Reads a terminal's other end until it is closed, so that the screen never waits."""
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:
        pass


def measure(mode: str, home: Path, n_tokens: int) -> Round:
    """Starts a node in a terminal of 200×50, loads it, ends it."""
    port = free_port()
    environ = os.environ | node_environ(home, gateway=f":{port}", embedded_nats="auto")
    environ |= {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    result = home / "result.json"
    ours, theirs = pty.openpty()
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.node_child", mode, "large", str(result)],
        cwd=ROOT,
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    threading.Thread(target=drink, args=(ours,), daemon=True).start()
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                if httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200:
                    break
            except httpx2.HTTPError:
                pass
            if child.poll() is not None:
                raise SystemExit(f"the node ended with {child.returncode}; see {home}/data/logs")
            time.sleep(0.05)
        ready_s = time.perf_counter() - begun
        tokens_per_s, ttft_ms = asyncio.run(load(url, n_tokens))
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(15)
    late = json.loads(result.read_text())
    return Round(tokens_per_s, ttft_ms, ready_s, late["worst_ms"], late["p99_ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        add_worker(home, "large", None, WORKER_CONCURRENCY=N_STREAMS, CTX_SIZE=1024, MODEL_THREADS=0)
        model = home / "data/models/large/model.gguf"
        model.parent.mkdir(parents=True)
        write_large_model(model)
        rounds: dict[str, list[Round]] = {"serve": [], "tui": []}
        for number in range(options.rounds):
            for mode, done in rounds.items():
                done.append(measure(mode, home, options.tokens))
                print(f"round {number + 1} {mode:5} {done[-1]}", flush=True)
    for name in ("tokens_per_s", "ttft_ms", "ready_s", "worst_ms", "p99_ms"):
        serve, tui = (statistics.median(getattr(each, name) for each in rounds[mode]) for mode in ("serve", "tui"))
        ratios = sorted(
            getattr(b, name) / getattr(a, name) for a, b in zip(rounds["serve"], rounds["tui"], strict=True)
        )
        print(
            f"{name:12} serve {serve:8.2f}  tui {tui:8.2f}  ratio {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
