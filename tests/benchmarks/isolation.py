"""What a process of its own costs a model: `python -m tests.benchmarks.isolation [--rounds 9] [--tokens 256]`.

The demo model twice in one node's engine rooms, as a thread and as a process, in turn within a round: tokens/s of
1 and 8 streams, milliseconds to the first token, and those of a call for the vocabulary. The demo model has the
quickest steps there are (a third of a millisecond), so any other model pays less.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from engine.service import InferenceRequest
from infsvc.types import Params
from tests.engine.parts import Node, running_node, worker_settings

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo/model.gguf"
KINDS = ("thread", "process")


async def streamed(node: Node, model: str, n_tokens: int) -> float:
    """One streamed answer; returns the milliseconds to its first token."""
    params = Params(max_tokens=n_tokens, ignore_eos=True, temperature=0)
    generation = await node.service.submit(InferenceRequest(model=model, input="Write something.", params=params))
    async for _ in generation:
        pass
    return generation.ttft_ms or 0.0


async def measured(node: Node, model: str, width: int, n_tokens: int) -> tuple[float, float]:
    """Tokens/s of `width` streams together, and the median time to the first token."""
    begun = time.perf_counter()
    first = await asyncio.gather(*(streamed(node, model, n_tokens) for _ in range(width)))
    return width * n_tokens / (time.perf_counter() - begun), statistics.median(first)


async def main(n_rounds: int, n_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = []
        for kind in KINDS:
            target = Path(folder) / f"data/models/{kind}/model.gguf"
            target.parent.mkdir(parents=True)
            target.symlink_to(DEMO)
            keys = {"ctx_size": 1024, "worker_concurrency": 8, "prefix_cache_mb": 0}
            settings.append(worker_settings(kind, engine_isolation=kind, **keys))
        async with running_node(Path(folder), *settings) as node:
            for kind in KINDS:
                begun = time.perf_counter()
                await node.loaded(kind)
                print(f"{kind}: loaded in {time.perf_counter() - begun:.2f} s")
                await measured(node, kind, 8, 32)
            for width in (1, 8):
                rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
                firsts: dict[str, list[float]] = {kind: [] for kind in KINDS}
                for n in range(n_rounds):
                    for kind in KINDS if n % 2 else KINDS[::-1]:
                        rate, first = await measured(node, kind, width, n_tokens)
                        rates[kind].append(rate)
                        firsts[kind].append(first)
                ratios = sorted(there / here for here, there in zip(*rates.values(), strict=True))
                for kind in KINDS:
                    rate, first = statistics.median(rates[kind]), statistics.median(firsts[kind])
                    print(f"{width} streams, {kind}: {rate:.0f} tok/s, first token {first:.1f} ms")
                print(
                    f"{width} streams, process / thread: {statistics.median(ratios):.2f} "
                    f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
                )
            for kind in KINDS:
                engine = node.fleet.get(kind).engine
                assert engine is not None
                begun = time.perf_counter()
                for _ in range(200):
                    await asyncio.to_thread(engine.model.tokenize, "some words", add_special=True, parse_special=True)
                print(f"{kind}: a call for the vocabulary {(time.perf_counter() - begun) * 5:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    asyncio.run(main(options.rounds, options.tokens))
