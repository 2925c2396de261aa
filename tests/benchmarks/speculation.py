"""What guessing ahead is worth: `python -m tests.benchmarks.speculation [--model FILE …] [--widths 1,2,4,8]`.

Tokens/s with guesses over tokens/s without, on text that repeats itself (the greedy answer is held to go round a
passage of its prompt), on text that repeats bits of 3 to 12 tokens of it, each broken off by a token at random, and on
text that repeats nothing (drawn at random from the whole vocabulary). The engine alone,
both sides in turn within a round, medians. Before that, what a step of k tokens costs in steps of one.

`--model` names GGUF files; without one: the demo model, and random weights of about 0.4B parameters as Q8_0.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.engine import Engine
from engine.llama import DECODE_OK, Batch, LlamaContext, LlamaModel
from engine.options import EngineOptions
from engine.sampling import SamplerSpec
from engine.sequence import Sequence
from engine.speculation import MAX_ROWS, N_GUESSES
from infsvc.types import Params
from tests.benchmarks.prefix_sharing import Clock, closed
from tests.tiny_models import write_large_model

DEMO = Path(__file__).resolve().parents[2] / "data/models/demo/model.gguf"
N_CTX, N_PROMPT, N_OUT = 512, 64, 160


KINDS = ("repeats its prompt", "repeats bits of it", "repeats nothing")


def in_bits(prompt: list[int], drawn: random.Random, n_vocab: int) -> list[int]:
    """The worst that a text can do to guesses: it begins to copy, and stops."""
    text: list[int] = []
    while len(text) < N_OUT:
        at = drawn.randrange(len(prompt) - 12)
        text += [*prompt[at : at + drawn.randint(3, 12)], drawn.randrange(300, n_vocab)]
    return text


class Copying:
    """Stands for a model that copies: a constraint that lets only the next token of a round through. The engine draws,
    checks and delivers as ever."""

    def __init__(self, passage: list[int]) -> None:
        self._passage, self._at, self.finished = passage, 0, False

    def choose(self, logits: object, token: int, redraw: object) -> int:
        self._at += 1
        return self._passage[(self._at - 1) % len(self._passage)]


def curve(model: Path, n_threads: int, widths: list[int], *, flash_attention: bool, clock: Callable[[], float]) -> None:
    """Prints what steps cost: rows of equally many tokens for each sequence."""
    loaded = LlamaModel(model)
    context = LlamaContext(
        loaded,
        n_ctx=N_CTX,
        n_slots=max(widths),
        n_batch=512,
        n_threads=n_threads,
        flash_attention=flash_attention,
    )
    batch = Batch(512, max(widths))
    for slot in range(max(widths)):
        batch.clear()
        batch.add([10] * N_PROMPT, start=0, slot=slot, draws=True)
        assert context.decode(batch) == DECODE_OK

    def step(width: int, n_tokens: int, slots: Iterable[int] = ()) -> float:
        slots = slots or range(width)
        seconds = []
        for _ in range(7):
            batch.clear()
            for slot in slots:
                batch.add([11] * n_tokens, start=N_PROMPT, slot=slot, draws=True, every=True)
            begun = clock()
            assert context.decode(batch) == DECODE_OK
            seconds.append(clock() - begun)
            for slot in slots:
                context.cut(slot, N_PROMPT)
        return statistics.median(seconds)

    for width in widths:
        one = step(width, 1)
        costs = [(n + 1, step(width, n + 1) / one) for n in N_GUESSES if width * (n + 1) <= MAX_ROWS]
        told = "   ".join(f"{n} tokens {ratio:.2f}" for n, ratio in costs)
        print(f"  a step of {width} sequences, {one * 1000:.2f} ms;  {told}")
    if max(widths) >= 8:
        one = step(4, 1)
        for name, slots in (("in reverse", (3, 2, 1, 0)), ("with gaps", (0, 2, 4, 6))):
            print(f"  a step of 4 sequences whose slots stand {name}: {step(4, 1, slots) / one:.2f}")
    context.close()
    loaded.close()


async def speed(
    engine: Engine, width: int, n_vocab: int, *, kind: str, draft_max: int, seed: int, clock: Callable[[], float]
) -> float:
    """Tokens/s of `width` requests together, the prompts' reading left out."""
    drawn = random.Random(seed)
    heard = []
    for at in range(width):
        prompt = [drawn.randrange(300, n_vocab) for _ in range(N_PROMPT)]
        text = in_bits(prompt, drawn, n_vocab) if kind == KINDS[1] else prompt if kind == KINDS[0] else None
        params = (
            Params(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=at) if text is None else Params(temperature=0.0)
        )
        listener = Clock()
        engine.submit(
            Sequence(
                prompt=prompt,
                sampler=SamplerSpec.from_params(params, n_ctx=N_CTX),
                max_tokens=N_OUT,
                n_ctx=N_CTX,
                listener=listener,
                ignore_eos=True,
                draft_max=draft_max,
                constraint=None if text is None else Copying(text),  # type: ignore[arg-type]
            )
        )
        heard.append(listener)
    for listener in heard:
        await listener.begun.wait()
    begun = clock()
    for listener in heard:
        await listener.ended.wait()
    return width * N_OUT / (clock() - begun)


async def compare(
    model: Path, n_threads: int, widths: list[int], rounds: int, *, flash_attention: bool, clock: Callable[[], float]
) -> None:
    for width in widths:
        options = EngineOptions(
            path=model,
            n_ctx=N_CTX,
            n_slots=width,
            n_threads=n_threads,
            flash_attention=flash_attention,
            share_prefixes=False,
        )
        engine = Engine("bench", options, asyncio.get_running_loop())
        engine.start()
        await asyncio.wrap_future(engine.loaded)
        n_vocab = engine.model.n_vocab
        await speed(engine, width, n_vocab, kind=KINDS[0], draft_max=0, seed=0, clock=clock)
        for kind in KINDS:
            ratios, plain = [], []
            drafted, accepted = engine.counters.n_drafted, engine.counters.n_accepted
            for at in range(rounds):
                found = {}
                for draft_max in (0, 15) if at % 4 in (0, 3) else (15, 0):
                    found[draft_max] = await speed(
                        engine, width, n_vocab, kind=kind, draft_max=draft_max, seed=1 + at, clock=clock
                    )
                ratios.append(found[15] / found[0])
                plain.append(found[0])
            drafted, accepted = engine.counters.n_drafted - drafted, engine.counters.n_accepted - accepted
            low, _, high = statistics.quantiles(ratios) if rounds > 1 else ratios * 3
            print(
                f"  {width} sequences, {kind:<19}{statistics.median(plain):8.1f} tok/s without,  "
                f"{statistics.median(ratios):.3f} times with (half of the rounds {low:.2f} to {high:.2f}); "
                f"{accepted:,} of {drafted:,} guesses held",
                flush=True,
            )
        await closed(engine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="*")
    parser.add_argument("--widths", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flash", action="store_true", help="with flash attention")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="seconds of this process on the CPU: with one thread, ratios that busy neighbours change little",
    )
    given = parser.parse_args()
    clock = time.process_time if given.cpu else time.perf_counter
    widths = [int(word) for word in given.widths.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        models = given.model or [DEMO, write_large_model(Path(folder) / "0.4B.gguf")]
        for model in models:
            n_threads = given.threads or (1 if model == DEMO else os.cpu_count() or 1)
            print(f"{model.parent.name}/{model.name}, {n_threads} threads", flush=True)
            curve(model, n_threads, widths, flash_attention=given.flash, clock=clock)
            asyncio.run(compare(model, n_threads, widths, given.rounds, flash_attention=given.flash, clock=clock))


if __name__ == "__main__":
    main()
