"""What a constraint costs: tokens of eight streams whose answers are constrained, against the same eight that are
free, on one engine with a vocabulary of 152k; for each second of the engine thread's own processor time, on one thread,
so that busy neighbours do not count.

`python -m tests.benchmarks.constraint_cost [--rounds 3] [--tokens 64] [--layers 24]`. The kinds take turns; medians are
printed: the ratio to free, which other load on the machine blurs, and the time spent in the constraints themselves. The
model has random weights, so nearly every token it draws is refused and a mask is made for each: a trained model, whose
first candidate mostly fits, pays less. `--layers 2` makes the model itself cheap, and the cost look large.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.constraint import Constraints, Matcher
from engine.engine import Engine
from engine.options import EngineOptions
from engine.sampling import SamplerSpec
from engine.sequence import Sequence
from infsvc.types import Params
from tests.engine.parts import Heard
from tests.tiny_models import byte_symbols, write_tiny_model

N_STREAMS = 8
N_VOCAB = 151_936
ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 300, "maxLength": 900},
        "tags": {"type": "array", "items": {"type": "string"}},
        "age": {"type": "integer"},
    },
    "required": ["name", "tags", "age"],
    "additionalProperties": False,
}
NUMBERS = 'root ::= "[" number ("," number){400,} "]"\nnumber ::= "-"? [0-9]{1,6} ("." [0-9]{1,6})?'


def words(n: int) -> list[str]:
    """Made-up tokens whose lengths and letters are about those of a real vocabulary."""
    pick = random.Random(1)
    symbols = byte_symbols()
    found: dict[str, None] = {}
    while len(found) < n:
        kind = pick.random()
        if kind < 0.88:
            letters = pick.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=pick.randint(2, 9))
            text = (" " if pick.random() < 0.5 else "") + "".join(letters)
        elif kind < 0.93:
            text = "".join(pick.choices("0123456789", k=pick.randint(2, 4)))
        elif kind < 0.97:
            text = "".join(pick.choices("(){}[]<>\"'.,;:!?/*-+= \n_", k=pick.randint(2, 4)))
        else:
            text = "".join(chr(pick.randint(0x4E00, 0x9FFF)) for _ in range(pick.randint(1, 3)))
        found["".join(symbols[byte] for byte in text.encode())] = None
    return list(found)


class Timed:
    """A matcher that counts its own processor time, on the engine's thread."""

    def __init__(self, matcher: Matcher) -> None:
        self._matcher, self.spent_s = matcher, 0.0

    @property
    def finished(self) -> bool:
        return self._matcher.finished

    def choose(self, *given: Any) -> int:
        begun = time.thread_time()
        try:
            return self._matcher.choose(*given)
        finally:
            self.spent_s += time.thread_time() - begun


async def run(
    engine: Engine, matchers: list[Timed | None], n_tokens: int, *, greedy: bool
) -> tuple[float, float, float]:
    """One turn: tokens for each second of the engine thread's processor time, the constraints' share of that time, and
    their microseconds a token."""
    assert engine._thread.ident is not None
    clock = time.pthread_getcpuclockid(engine._thread.ident)
    params = Params(temperature=0.0) if greedy else Params(temperature=0.8, top_k=40, seed=1)
    sequences = []
    for i, matcher in enumerate(matchers):
        sequences.append(
            Sequence(
                prompt=[1 + (31 * i + 17 * j) % 250 for j in range(16)],
                sampler=SamplerSpec.from_params(params, n_ctx=1024),
                max_tokens=n_tokens,
                n_ctx=1024,
                listener=Heard(),
                ignore_eos=matcher is None,
                constraint=matcher,  # type: ignore[arg-type]
            )
        )
    begun = time.clock_gettime(clock)
    for each in sequences:
        engine.submit(each)
    for each in sequences:
        end = await each.listener.finished()  # type: ignore[attr-defined]
        assert end.reason in ("length", "stop"), end.error
    n_drawn = sum(each.n_drawn for each in sequences)
    total_s = time.clock_gettime(clock) - begun
    spent_s = sum(each.spent_s for each in matchers if each is not None)
    return n_drawn / total_s, spent_s / total_s, spent_s / n_drawn * 1e6


async def main(rounds: int, n_tokens: int, n_layers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny_model(
            Path(folder) / "m.gguf", n_vocab=N_VOCAB, n_embd=1024, n_layer=n_layers, n_head=16, n_head_kv=8, n_ff=2816,
            words=words(N_VOCAB),
        )  # fmt: skip
        options = EngineOptions(path=path, n_ctx=1024, n_slots=N_STREAMS, n_threads=1)
        engine = Engine("bench", options, asyncio.get_running_loop())
        engine.start()
        await asyncio.wrap_future(engine.loaded)
        begun = time.perf_counter()
        known = Constraints(engine.model.texts, engine.model.eog.tolist())
        known.schema(SCHEMA)
        print(f"vocabulary of {engine.model.n_vocab}: ready in {time.perf_counter() - begun:.2f} s")
        json_text = (ROOT / "data/grammars/default/json.gbnf").read_text()
        kinds: dict[str, Any] = {
            "free": lambda: None,
            "schema": lambda: known.schema(SCHEMA),
            "json grammar": lambda: known.grammar(json_text),
            "numbers": lambda: known.grammar(NUMBERS),
        }
        for greedy in (True, False):
            turns: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
            for i in range(rounds):
                # Another one goes first in each round.
                for kind in [*kinds][i % len(kinds) :] + [*kinds][: i % len(kinds)]:
                    made = [kinds[kind]() for _ in range(N_STREAMS)]
                    matchers = [None if each is None else Timed(each) for each in made]
                    turns[kind].append(await run(engine, matchers, n_tokens, greedy=greedy))
            free = statistics.median(speed for speed, *_ in turns["free"])
            for kind, each in turns.items():
                speed, share, us = (statistics.median(column) for column in zip(*each, strict=True))
                print(
                    f"{'greedy' if greedy else 'drawn':7} {kind:13} {speed:7.1f} tokens/s, {speed / free:.3f} of free; "
                    f"the constraint: {us:4.0f} µs a token, {100 * share:.1f} % of the time"
                )
        engine.close()
        await asyncio.to_thread(engine.join, 20.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=24)
    given = parser.parse_args()
    asyncio.run(main(given.rounds, given.tokens, given.layers))
