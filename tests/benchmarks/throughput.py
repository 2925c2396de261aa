"""Tokens/s and time to the first token of this project's node over HTTP, audit on, beside llama-server on one file.

`python -m tests.benchmarks.throughput [--widths 1,2,4,8,16] [--prompts 64,512] [--rounds 3] [--shared 0]`.
`LLAMA_SERVER` names the binary (`make llama-server` builds it); without one the run says so and measures the node and
`llama_cpp.Llama` behind a lock alone. The model is a random-weight one of about 0.4B parameters, vocabulary 152k,
Q4_K_M. Both servers are up and take turns burst by burst; ratios are taken round by round, and their median is printed
with its spread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import plotext

from tests.benchmarks.peers import ROOT, Load, burst, llama_server, node
from tests.tiny_models import write_large_model

N_OUT = 64
_REST_S = 2.0
"""Before each burst: what works right after another is slower, whoever it is."""
N_VOCAB = 151_936

_LOCKED = """
import json, sys, threading, time
from llama_cpp import Llama
model, n_ctx, n_threads, n_out = sys.argv[1], *map(int, sys.argv[2:5])
prompts = json.loads(sys.stdin.read())
llama, lock = Llama(model, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, verbose=True), threading.Lock()
def ask(prompt):
    with lock:
        llama.reset()
        for n, _ in enumerate(llama.generate(prompt, temp=0.0, reset=True), 1):
            if n == n_out:
                break
begun = time.perf_counter()
threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(len(prompts) * n_out / (time.perf_counter() - begun)))
"""


def write_model(folder: Path) -> Path:
    """The 0.4B model as Q4_K_M."""
    import ctypes

    import llama_cpp

    full, small = folder / "q8.gguf", folder / "model.gguf"
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(0), ctypes.c_void_p(0))
    write_large_model(full)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.allow_requantize = True
    kept, quiet = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # llama.cpp tells of each tensor
    try:
        rc = llama_cpp.llama_model_quantize(str(full).encode(), str(small).encode(), ctypes.byref(params))
    finally:
        os.dup2(kept, 2)
    if rc != 0:
        raise SystemExit("the model could not be quantised")
    full.unlink()
    return small


def prompts(n: int, length: int, seed: int, n_shared: int = 0) -> list[list[int]]:
    """Random prompts that share their first `n_shared` tokens and nothing of the `length` behind them."""
    drawn = random.Random(seed)
    shared = [drawn.randrange(300, N_VOCAB) for _ in range(n_shared)]
    return [shared + [drawn.randrange(300, N_VOCAB) for _ in range(length)] for _ in range(n)]


def locked(model: Path, asked: list[list[int]], n_ctx: int, n_threads: int) -> float:
    """Tokens/s of `llama_cpp.Llama` behind a lock."""
    command = [sys.executable, "-c", _LOCKED, str(model), str(n_ctx), str(n_threads), str(N_OUT)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="1,2,4,8,16")
    parser.add_argument("--prompts", default="64,512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shared", type=int, default=0, help="tokens that all prompts of a burst begin with")
    parser.add_argument("--json", type=Path, default=ROOT / ".build/bench.json")
    options = parser.parse_args()
    n_threads = os.cpu_count() or 1
    server = os.environ.get("LLAMA_SERVER")
    if not server:
        print("LLAMA_SERVER names no binary: only this project's node and the locked Llama are measured")
    rows: dict[tuple[int, int], dict[str, list[Load]]] = defaultdict(lambda: defaultdict(list))
    locked_tokens: list[float] = []
    widths = [int(word) for word in options.widths.split(",")]
    lengths = [int(word) for word in options.prompts.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        model, home = write_model(Path(folder)), Path(folder) / "home"
        for length in lengths:
            n_ctx = 1024 if options.shared + length <= 512 else 2 * (options.shared + length)
            for width in widths:
                with ExitStack() as running:
                    peers = [
                        running.enter_context(node(model, home, n_slots=width, n_ctx=n_ctx, MODEL_THREADS=n_threads))
                    ]
                    if server:
                        log = Path(folder) / "llama-server.log"
                        peers.append(
                            running.enter_context(
                                llama_server(Path(server), model, log, n_slots=width, n_ctx=n_ctx, n_threads=n_threads)
                            )
                        )
                    for peer in peers:
                        burst(peer, prompts(1, 32, seed=width), 4)
                    for number in range(options.rounds):
                        asked = prompts(width, length, hash((number, length, width)), options.shared)
                        for peer in peers if number % 2 == 0 else reversed(peers):
                            time.sleep(_REST_S)
                            load = burst(peer, asked, N_OUT)
                            rows[length, width][peer.name].append(load)
                            print(
                                f"round {number + 1}  prompt {length:4}  streams {width:2}  {peer.name:12}  "
                                f"{load.tokens_per_s:7.1f} tok/s  first {load.ttft_ms:8.0f} ms",
                                flush=True,
                            )
        if 16 in widths:
            for number in range(min(options.rounds, 3)):
                slow = locked(model, prompts(16, lengths[0], seed=number), 1024, n_threads)
                locked_tokens.append(slow)
                print(f"round {number + 1}  prompt {lengths[0]:4}  streams 16  locked Llama  {slow:7.1f} tok/s")
    report(rows, locked_tokens, lengths, options.json)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):6.3f} ({min(values):.3f} to {max(values):.3f})"


def report(
    rows: dict[tuple[int, int], dict[str, list[Load]]], locked_tokens: list[float], lengths: list[int], path: Path
) -> None:
    """The table, the chart and the file."""
    print("\nprompt streams   infsvc tok/s  llama-server   ratio (spread)              first token, ratio (spread)")
    told = []
    for (length, width), kinds in sorted(rows.items()):
        ours, theirs = kinds["infsvc"], kinds.get("llama-server", [])
        mine = statistics.median(load.tokens_per_s for load in ours)
        line = f"{length:6} {width:7} {mine:14.1f}"
        entry: dict[str, object] = {"prompt": length, "streams": width, "infsvc_tokens_per_s": mine}
        if theirs:
            peer = statistics.median(load.tokens_per_s for load in theirs)
            speed = [a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True)]
            first = [a.ttft_ms / b.ttft_ms for a, b in zip(ours, theirs, strict=True)]
            line += f" {peer:13.1f}  {_spread(speed)}  {_spread(first)}"
            entry |= {"llama_server_tokens_per_s": peer, "ratios": speed, "ttft_ratios": first}
        print(line)
        told.append(entry)
    wide = rows.get((lengths[0], 16), {}).get("infsvc", [])
    if locked_tokens and wide:
        ratios = [load.tokens_per_s / slow for load, slow in zip(wide, locked_tokens, strict=False)]
        print(f"16 streams against Llama behind a lock: {_spread(ratios)}")
        told.append({"streams": 16, "locked_ratios": ratios})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1))
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(80, 18)
    plotext.title(f"tokens/s by streams, prompt {lengths[0]}")
    for kind in ("infsvc", "llama-server"):
        points = [
            (w, statistics.median(x.tokens_per_s for x in k[kind]))
            for (n, w), k in sorted(rows.items())
            if n == lengths[0] and k.get(kind)
        ]
        if points:
            plotext.plot(*zip(*points, strict=True), label=kind)
    plotext.show()


if __name__ == "__main__":
    main()
