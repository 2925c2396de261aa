"""What sharing a prompt's beginning is worth, in the engine: `python -m tests.benchmarks.prefix_sharing [--layers 8]`.

Time to the first token after 512 shared tokens against a cold prompt of the same length, the same after a restart with
the state on disk, and 16 requests with one beginning of 1,000 tokens against the same work with sharing off. Random
weights; medians of the rounds, the two sides taking turns.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from engine.engine import Engine
from engine.options import EngineOptions
from engine.sequence import Sequence, SequenceEvent, SequenceFinished, TokenEmitted
from tests.engine.parts import spec
from tests.tiny_models import write_tiny_model

N_VOCAB = 32_000


class Clock:
    """A listener that keeps when its sequence drew its first token and when it ended."""

    def __init__(self) -> None:
        self.first_s: float | None = None
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()

    def __call__(self, event: SequenceEvent) -> None:
        if isinstance(event, TokenEmitted) and self.first_s is None:
            self.first_s = event.at_s
            self.begun.set()
        if isinstance(event, SequenceFinished):
            assert event.error is None, event.error
            self.ended.set()


def tokens(seed: int, n: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(300, N_VOCAB) for _ in range(n)]


async def opened(
    model: Path, *, share: bool, n_slots: int, n_threads: int, n_ctx: int, folder: Path | None = None
) -> Engine:
    options = EngineOptions(
        path=model,
        n_ctx=n_ctx,
        n_slots=n_slots,
        n_threads=n_threads,
        share_prefixes=share,
        prefix_cache_bytes=2**28,
        state_folder=folder,
        state_folder_bytes=2**30,
    )
    engine = Engine("bench", options, asyncio.get_running_loop())
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    return engine


async def closed(engine: Engine) -> None:
    engine.close()
    await asyncio.to_thread(engine.join, 20.0)


def submit(engine: Engine, prompt: list[int], max_tokens: int) -> Clock:
    clock = Clock()
    engine.submit(
        Sequence(
            prompt=prompt,
            sampler=spec(n_ctx=engine.n_ctx),
            max_tokens=max_tokens,
            n_ctx=engine.n_ctx,
            listener=clock,
            ignore_eos=True,
        )
    )
    return clock


async def ask(engine: Engine, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float]]:
    """Seconds for all, and each one's to its first token."""
    begun = time.perf_counter()
    clocks = [submit(engine, prompt, max_tokens) for prompt in prompts]
    for clock in clocks:
        await clock.ended.wait()
    return time.perf_counter() - begun, [(clock.first_s or begun) - begun for clock in clocks]


async def first_token(model: Path, rounds: int, n_threads: int) -> None:
    engine = await opened(model, share=True, n_slots=4, n_threads=n_threads, n_ctx=2048)
    cold, in_place, copied, turns = [], [], [], []
    for at in range(rounds):
        system = tokens(at, 512)
        cold += (await ask(engine, [[*system, *tokens(1000 + at, 16)]], 1))[1]
        in_place += (await ask(engine, [[*system, *tokens(2000 + at, 16)]], 1))[1]
        # While one with the same beginning is being decoded.
        busy = submit(engine, [*system, *tokens(3000 + at, 16)], 40)
        await busy.begun.wait()
        copied += (await ask(engine, [[*system, *tokens(4000 + at, 16)]], 1))[1]
        await busy.ended.wait()
        history = [*system, *tokens(5000 + at, 200)]
        await ask(engine, [history], 1)
        turns += (await ask(engine, [[*history, *tokens(6000 + at, 30)]], 1))[1]
    base = statistics.median(cold)
    print(f"first token, 512 + 16 tokens cold       {base * 1000:8.1f} ms")
    for name, values in (("slot idle", in_place), ("slot busy, copied", copied), ("chat of 712 goes on", turns)):
        middle = statistics.median(values)
        print(f"  {name:<38}{middle * 1000:8.1f} ms   {middle / base:.3f} of cold")
    await closed(engine)


def dropped(path: Path) -> None:
    """Has the system forget what it has of a file in memory, so that it is read from the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def restarted(model: Path, rounds: int, n_threads: int) -> None:
    """A prompt of 512 + 16 tokens whose beginning an engine before this one has left in a file."""
    cold, cached, uncached, n_bytes = [], [], [], 0
    for at in range(rounds):
        system = tokens(at, 512)
        for drop, times in ((False, cached), (True, uncached)):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                given = {"share": True, "n_slots": 4, "n_threads": n_threads, "n_ctx": 2048, "folder": folder}
                engine = await opened(model, **given)  # type: ignore[arg-type]
                cold += (await ask(engine, [[*system, *tokens(1000 + at, 16)]], 1))[1]
                await closed(engine)
                (path,) = folder.iterdir()
                n_bytes = path.stat().st_size
                if drop:
                    dropped(path)
                engine = await opened(model, **given)  # type: ignore[arg-type]
                times += (await ask(engine, [[*system, *tokens(2000 + at, 16)]], 1))[1]
                assert engine.counters.n_states_read == 1
                await closed(engine)
    base = statistics.median(cold)
    print(f"after a restart, a state of {n_bytes / 2**20:.0f} MiB on disk, 512 + 16 tokens; cold {base * 1000:.1f} ms")
    for name, values in (("file in the page cache", cached), ("file on the disk", uncached)):
        middle = statistics.median(values)
        print(f"  {name:<38}{middle * 1000:8.1f} ms   {middle / base:.3f} of cold")


async def together(model: Path, rounds: int, n_threads: int, n_slots: int) -> None:
    ratios: list[float] = []
    for at in range(rounds):
        system = tokens(100 + at, 1000)
        prompts = [[*system, *tokens(1000 * at + n, 16)] for n in range(16)]
        seconds: dict[bool, float] = {}
        for share in (False, True) if at % 2 else (True, False):
            engine = await opened(model, share=share, n_slots=n_slots, n_threads=n_threads, n_ctx=2048)
            seconds[share], first = await ask(engine, prompts, 32)
            read = engine.counters.n_prefill_tokens
            await closed(engine)
            name = "shared" if share else "off"
            print(
                f"16 × (1,000 shared + 16), 32 out, {n_slots} slots, {name:<7} {seconds[share]:7.2f} s   "
                f"{read:,} prompt tokens read, first token p50 {statistics.median(first):.2f} s"
            )
        ratios.append(seconds[False] / seconds[True])
    print(f"  {n_slots} slots: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("MODEL_THREADS") or os.cpu_count() or 1))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(
            Path(folder) / "model.gguf",
            n_vocab=N_VOCAB,
            n_embd=1024,
            n_layer=given.layers,
            n_head=16,
            n_head_kv=8,
            n_ff=2816,
            n_ctx=4096,
        )
        asyncio.run(first_token(model, given.rounds, given.threads))
        asyncio.run(restarted(model, given.rounds, given.threads))
        for n_slots in (16, 4):
            asyncio.run(together(model, given.rounds, given.threads, n_slots))


if __name__ == "__main__":
    main()
