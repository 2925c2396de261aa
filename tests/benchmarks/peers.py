"""The servers that a benchmark compares, each a process of its own on a free port: this project's node, with or without
its screen, and llama-server built from the same source package.

All speak OpenAI's `/v1/completions`; prompts go as token ids, so that everyone reads the same ones.
"""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.nodes import add_worker, free_port, node_environ

ROOT = Path(__file__).resolve().parents[2]
_START_S = 180.0


@dataclass(frozen=True)
class Peer:
    """A running server."""

    name: str
    url: str
    pid: int


@dataclass(frozen=True)
class Load:
    """What a burst of equal requests came to: tokens/s of all together, and the median time to the first token."""

    tokens_per_s: float
    ttft_ms: float
    wall_s: float


@contextmanager
def node(model: Path, home: Path, *, n_slots: int, n_ctx: int, mode: str = "serve", **keys: object) -> Iterator[Peer]:
    """This project's node over `model`; `mode` "tui" opens its screen in a terminal of 200×50."""
    port = free_port()
    if not (home / "envs/worker.bench.env").exists():
        add_worker(home, "bench", None)
    settings = {"HTTP_ADDR": ":0", "MODEL_PATH": model, "WORKER_CONCURRENCY": n_slots, "CTX_SIZE": n_ctx} | keys
    (home / "envs/worker.bench.env").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    environ = os.environ | node_environ(home, gateway=f":{port}", embedded_nats="auto")
    environ |= {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    command = [sys.executable, "-m", "tests.benchmarks.node_child", mode, "bench", str(home / "result.json")]
    with (
        _terminal() as terminal,
        _running("infsvc" if mode == "serve" else "infsvc-tui", command, environ, terminal) as child,
    ):
        yield _answering(
            Peer("infsvc" if mode == "serve" else "infsvc-tui", f"http://127.0.0.1:{port}", child.pid),
            child,
            "/healthz",
        )


@contextmanager
def llama_server(binary: Path, model: Path, log: Path, *, n_slots: int, n_ctx: int, n_threads: int) -> Iterator[Peer]:
    """llama-server with the same slots, context of one sequence and threads."""
    port = free_port()
    command = [
        str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-np", str(n_slots),
        "-c", str(n_ctx * n_slots), "-cb", "-t", str(n_threads), "-tb", str(n_threads), "--no-webui",
    ]  # fmt: skip
    with log.open("wb") as stream, _running("llama-server", command, dict(os.environ), stream.fileno()) as child:
        yield _answering(Peer("llama-server", f"http://127.0.0.1:{port}", child.pid), child, "/health")


@contextmanager
def _terminal() -> Iterator[int]:
    ours, theirs = pty.openpty()

    def drink() -> None:
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            pass

    threading.Thread(target=drink, name="terminal", daemon=True).start()
    try:
        yield theirs
    finally:
        os.close(theirs)


@contextmanager
def _running(name: str, command: list[str], environ: dict[str, str], output: int) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        command, cwd=ROOT, env=environ, stdin=output if name == "infsvc-tui" else subprocess.DEVNULL,
        stdout=output, stderr=output, start_new_session=True,
    )  # fmt: skip
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answering(peer: Peer, child: subprocess.Popen[bytes], path: str) -> Peer:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            if httpx2.get(peer.url + path, trust_env=False).status_code == 200:
                return peer
        except httpx2.HTTPError:
            pass
        if child.poll() is not None:
            raise SystemExit(f"{peer.name} ended with {child.returncode}")
        time.sleep(0.05)
    raise SystemExit(f"{peer.name} did not answer within {_START_S:g} s")


async def _stream(client: httpx2.AsyncClient, prompt: list[int], n_tokens: int) -> float:
    """One streamed answer; the milliseconds to its first token."""
    body = {
        "model": "bench", "prompt": prompt, "max_tokens": n_tokens, "stream": True, "ignore_eos": True,
        "temperature": 0, "stream_options": {"include_usage": True},
    }  # fmt: skip
    begun, first, drawn = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            first = first or time.perf_counter() - begun
            at = line.find('"completion_tokens":')
            if at >= 0:
                drawn = int(line[at + 20 :].split(",")[0].split("}")[0])
    if drawn != n_tokens:
        raise SystemExit(f"{drawn} tokens were drawn instead of {n_tokens}")
    return first * 1000


def burst(peer: Peer, prompts: list[list[int]], n_tokens: int) -> Load:
    """All prompts at once, each answered with `n_tokens` tokens."""

    async def all_of_them() -> Load:
        async with httpx2.AsyncClient(base_url=peer.url, timeout=1200, trust_env=False) as client:
            begun = time.perf_counter()
            firsts = await asyncio.gather(*(_stream(client, prompt, n_tokens) for prompt in prompts))
            wall_s = time.perf_counter() - begun
        return Load(len(prompts) * n_tokens / wall_s, statistics.median(firsts), wall_s)

    return asyncio.run(all_of_them())
