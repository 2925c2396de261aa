"""What is left of the speed while other processes keep the cores busy: `python -m tests.benchmarks.beside_busy`.

Eight streams of the 0.4B model over HTTP, quiet and beside `--busy` processes that never rest, in turn; where
`LLAMA_SERVER` names a binary, llama-server does the same. With as many busy processes as cores, half is a fair share.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.benchmarks.peers import burst, llama_server, node
from tests.benchmarks.throughput import N_OUT, prompts, write_model


@contextmanager
def busy(n: int) -> Iterator[None]:
    """`n` processes that compute all the time."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--busy", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    n_threads, server = os.cpu_count() or 1, os.environ.get("LLAMA_SERVER")
    with tempfile.TemporaryDirectory() as name, ExitStack() as running:
        folder = Path(name)
        model, n = write_model(folder), options.streams
        peers = [running.enter_context(node(model, folder / "home", n_slots=n, n_ctx=1024, MODEL_THREADS=n_threads))]
        if server:
            log = folder / "llama-server.log"
            peers.append(
                running.enter_context(
                    llama_server(Path(server), model, log, n_slots=n, n_ctx=1024, n_threads=n_threads)
                )
            )
        speeds: dict[str, list[tuple[float, float]]] = {peer.name: [] for peer in peers}
        for peer in peers:
            burst(peer, prompts(1, 32, seed=0), 4)
        for number in range(options.rounds):
            asked = prompts(n, 64, seed=number + 1)
            for peer in peers:
                quiet = burst(peer, asked, N_OUT).tokens_per_s
                with busy(options.busy):
                    beside = burst(peer, [prompt[::-1] for prompt in asked], N_OUT).tokens_per_s
                speeds[peer.name].append((quiet, beside))
                print(f"round {number + 1}  {peer.name:12}  quiet {quiet:6.1f} tok/s  beside {beside:6.1f}", flush=True)
    print(f"\nbeside {options.busy} busy processes, {n} streams: what is left")
    for kind, pairs in speeds.items():
        kept = [beside / quiet for quiet, beside in pairs]
        print(f"{kind:12}  {statistics.median(kept):.2f} ({min(kept):.2f} to {max(kept):.2f})")


if __name__ == "__main__":
    main()
