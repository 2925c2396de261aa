"""Several models in one node, measured: how long each takes to load and how much memory, what concurrent requests gain,
and that models do not hold each other up.

`python -m tests.benchmarks.load [--rounds 3]`. The models are the demo model, a random-weight one of about 0.4B
parameters (Q4_K_M, vocabulary 152k), and all-MiniLM-L6-v2 where its package is installed. Medians are printed, as rows
of Markdown tables.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import psutil

from engine import memory_fit
from engine.model_info import read_model_info
from engine.scheduler import N_BATCH
from tests.benchmarks.throughput import write_model
from tests.bert_files import load_minilm, minilm_folder, write_bert
from tests.commands import ROOT, Place
from tests.nodes import add_worker

DEMO = ROOT / "data/models/demo/model.gguf"
N_OUT = {"demo": 128, "middle": 32}
WIDTHS = (2, 4, 8, 16)
N_CTX, N_SLOTS = 512, 16
MIB = 2**20


class Measure:
    """The node that is measured, over HTTP."""

    def __init__(self, http: httpx2.AsyncClient, pid: int, rounds: int, estimated: dict[str, int]) -> None:
        self._http, self._process, self._rounds = http, psutil.Process(pid), rounds
        self._estimated = estimated

    async def rss(self) -> int:
        """Bytes, once nothing moves any more."""
        last = 0
        while abs((now := self._process.memory_info().rss) - last) > MIB // 2:
            last = now
            await asyncio.sleep(0.5)
        return now

    async def _until(self, model: str, *states: str) -> dict[str, Any]:
        while True:
            service: dict[str, Any] = (await self._http.get(f"/api/services/{model}")).json()
            if service["state"] in states:
                return service
            if service["state"] == "failed":
                raise SystemExit(f"{model}: {service['reason']}")
            await asyncio.sleep(0.005)

    async def load(self, model: str) -> float:
        """Seconds from the request to ready."""
        begun = time.perf_counter()
        (await self._http.post(f"/api/models/{model}/load")).raise_for_status()
        await self._until(model, "ready")
        return time.perf_counter() - begun

    async def unload(self, model: str) -> None:
        (await self._http.post(f"/api/models/{model}/unload")).raise_for_status()
        await self._until(model, "on_disk")

    async def ask(self, model: str, n_tokens: int) -> float:
        """One streamed answer of `n_tokens`; the milliseconds to its first piece."""
        params = {"max_tokens": n_tokens, "ignore_eos": True, "temperature": 0}
        body = {"model": model, "input": f"Number {time.perf_counter_ns()}", "stream": True, "params": params}
        begun, first = time.perf_counter(), 0.0
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    first = first or time.perf_counter() - begun
        return first * 1000

    async def burst(self, model: str, width: int) -> tuple[float, float]:
        """Tokens/s of `width` answers at once, and the median time to the first piece in ms."""
        begun = time.perf_counter()
        firsts = await asyncio.gather(*(self.ask(model, N_OUT[model]) for _ in range(width)))
        return width * N_OUT[model] / (time.perf_counter() - begun), statistics.median(firsts)

    async def memory(self, models: list[str]) -> None:
        base = await self.rss()
        print(f"\nnode without a model: {base / MIB:.0f} MiB\n")
        print(
            "| model | file | load | memory, resting | memory, estimated before | left after the unload |\n"
            "|---|---|---|---|---|---|"
        )
        for model in models:
            times, grown, left = [], [], []
            for _ in range(self._rounds):
                before = await self.rss()
                times.append(await self.load(model))
                grown.append(await self.rss() - before)
                size = (await self._until(model, "ready"))["file"]["size_bytes"]
                await self.unload(model)
                left.append(await self.rss() - before)
            told = self._estimated[model]
            print(
                f"| {model} | {size / MIB:.0f} MiB | {statistics.median(times):.2f} s | "
                f"{statistics.median(grown) / MIB:.0f} MiB | {told / MIB:.0f} MiB | "
                f"{statistics.median(left) / MIB:.0f} MiB |",
                flush=True,
            )  # fmt: skip

    async def concurrency(self) -> None:
        print("\n| model | one after another | " + " | ".join(f"{width} at once" for width in WIDTHS) + " |")
        print("|---" * (len(WIDTHS) + 2) + "|")
        for model in N_OUT:
            await self.ask(model, 8)
            alone = statistics.median([(await self.burst(model, 1))[0] for _ in range(2 * self._rounds)])
            cells = []
            for width in WIDTHS:
                speed = statistics.median([(await self.burst(model, width))[0] for _ in range(self._rounds)])
                cells.append(f"{speed:.0f} tok/s, {speed / alone:.1f}×")
            print(f"| {model} | {alone:.0f} tok/s | {' | '.join(cells)} |", flush=True)

    async def side_by_side(self) -> None:
        """Each model alone, and both at once; and how long the small one takes to begin while the other is full."""
        rows: dict[str, list[float]] = {
            key: [] for key in ("demo", "middle", "demo beside", "middle beside", "first", "first beside")
        }

        async def until_stopped(model: str, stop: asyncio.Event) -> float:
            begun, drawn = time.perf_counter(), 0

            async def lane() -> None:
                nonlocal drawn
                while not stop.is_set():
                    await self.ask(model, N_OUT[model])
                    drawn += N_OUT[model]

            await asyncio.gather(*(lane() for _ in range(4)))
            return drawn / (time.perf_counter() - begun)

        async def alone(model: str) -> float:
            stop = asyncio.Event()
            asyncio.get_running_loop().call_later(4.0, stop.set)
            return await until_stopped(model, stop)

        for _ in range(self._rounds):
            for model in ("demo", "middle"):
                rows[model].append(await alone(model))
            demo, middle = await asyncio.gather(alone("demo"), alone("middle"))
            rows["demo beside"].append(demo)
            rows["middle beside"].append(middle)
            rows["first"].append(statistics.median([await self.ask("demo", 8) for _ in range(10)]))
            stop = asyncio.Event()
            busy = asyncio.create_task(until_stopped("middle", stop))
            await asyncio.sleep(0.5)
            rows["first beside"].append(statistics.median([await self.ask("demo", 8) for _ in range(10)]))
            stop.set()
            await busy
        mid = {key: statistics.median(values) for key, values in rows.items()}
        print("\n| four streams each | alone | both models at once |\n|---|---|---|")
        for model in ("demo", "middle"):
            print(f"| {model} | {mid[model]:.0f} tok/s | {mid[f'{model} beside']:.0f} tok/s |")
        print(
            f"| demo's first token, beside four streams of middle | {mid['first']:.1f} ms | "
            f"{mid['first beside']:.1f} ms |"
        )
        shares = mid["demo beside"] / mid["demo"] + mid["middle beside"] / mid["middle"]
        print(
            f"\nshares of the speed alone, added up: {shares:.2f} "
            "(1 is the machine well shared, 2 that both had all of it)"
        )


def estimated(name: str, path: Path) -> int:
    """Bytes that the node sets aside for the model before it loads it."""
    info = read_model_info(path)
    if name == "minilm":
        return memory_fit.estimate_embedding(info, n_ctx=N_CTX, weights=True).total_bytes
    return memory_fit.estimate(info, n_ctx=N_CTX, n_slots=N_SLOTS, n_batch=N_BATCH).total_bytes


async def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {"demo": DEMO, "middle": write_model(Path(folder))}
        minilm = minilm_folder()
        if minilm is not None:
            files["minilm"] = write_bert(Path(folder) / "minilm.gguf", load_minilm(minilm))
        place = Place(Path(folder) / "place", models={})
        for name, path in files.items():
            keys: dict[str, object] = {"MODEL_FORMAT": "embedding"} if name == "minilm" else {}
            threads = 1 if name == "demo" else os.cpu_count() or 1
            add_worker(place.home, name, None, MODEL_PATH=path, WORKER_CONCURRENCY=N_SLOTS,
                       CTX_SIZE=N_CTX, MODEL_THREADS=threads, **keys)  # fmt: skip
        (place.home / "data/run").mkdir(parents=True)
        (place.home / "data/run/state.json").write_text(json.dumps({"models": []}))
        with place.node(ready="/api/services") as pid:
            async with httpx2.AsyncClient(base_url=place.gateway, timeout=600, trust_env=False) as http:
                measure = Measure(
                    http, pid, options.rounds, {name: estimated(name, path) for name, path in files.items()}
                )
                # Once before: the probe runs, and what is imported at the first load is there.
                for name in files:
                    await measure.load(name)
                    await measure.unload(name)
                await measure.memory(list(files))
                for name in N_OUT:
                    await measure.load(name)
                await measure.concurrency()
                await measure.side_by_side()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
