"""What is shared changes nothing: token for token what a cold engine draws, on every kind of memory.

llama.cpp does not promise the same last digits for a token read alone and in a batch, and keeps keys and values in 16
bits: on these files (F32 weights) log-probabilities differ by some 1e-4, with sharing as without. So each token's is
compared too, and where two candidates are closer than `TIE` in the cold run, either may be drawn; what comes after is
then another answer and is not compared.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from engine.engine import Engine
from engine.llama import LlamaContext
from engine.logprobs import StepLogprobs
from engine.options import EngineOptions
from engine.prefix_cache import MIN_SHARED, Costs
from engine.sequence import Sequence, TokenEmitted
from engine.service import InferenceRequest
from infsvc.types import Params
from tests.engine.parts import Heard, run, running_node, sequence, worker_settings
from tests.tiny_families import FAMILIES, WINDOW

N_CTX = 512
TIE = 5e-3


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / f"{name}.gguf") for name, write in FAMILIES.items()}


@pytest.fixture(autouse=True)
def copies_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a tiny model's tokens costs next to nothing, and what is measured on a busy machine is no matter here."""
    monkeypatch.setattr(Costs, "pays", lambda self, n_gained, n_moved: n_gained >= MIN_SHARED)


@asynccontextmanager
async def engine_on(path: Path, *, n_slots: int = 3, n_ctx: int = N_CTX, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(
        "tiny",
        EngineOptions(path=path, n_ctx=n_ctx, n_slots=n_slots, n_threads=1, **options),
        asyncio.get_running_loop(),
    )
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    try:
        yield engine
    finally:
        engine.close()
        assert await asyncio.to_thread(engine.join, 20.0)


def asked(prompt: list[int], *, max_tokens: int = 12) -> Sequence:
    return sequence(prompt=prompt, max_tokens=max_tokens, n_ctx=N_CTX, n_logprobs=20)


Answer = list[StepLogprobs]


async def answer_of(each: Sequence) -> Answer:
    heard = each.listener
    assert isinstance(heard, Heard)
    end = await heard.finished()
    assert end.error is None
    return [event.logprobs for event in heard.events if isinstance(event, TokenEmitted) and event.logprobs is not None]


async def cold(path: Path, prompts: list[list[int]], *, max_tokens: int = 12) -> list[Answer]:
    """What an engine answers that reads each prompt from its first token, one after another."""
    async with engine_on(path, n_slots=1, share_prefixes=False) as engine:
        answers = []
        for prompt in prompts:
            each = asked(prompt, max_tokens=max_tokens)
            await run(engine, each)
            answers.append(await answer_of(each))
        assert engine.counters.n_cached_tokens == 0
        assert engine.counters.prefix_reuse == "off"
        return answers


def compare(found: Answer, expected: Answer) -> int:
    """Fails where they differ by more than a tie; returns 1 where a tie went the other way, else 0."""
    assert len(found) == len(expected)
    for at, (mine, cold_one) in enumerate(zip(found, expected, strict=True)):
        if mine.drawn.token != cold_one.drawn.token:
            rival = next((top.logprob for top in cold_one.top if top.token == mine.drawn.token), -math.inf)
            assert cold_one.drawn.logprob - rival < TIE, (at, mine, cold_one)
            return 1
        assert mine.drawn.logprob == pytest.approx(cold_one.drawn.logprob, abs=TIE), at
    return 0


def compare_all(found: list[Answer], expected: list[Answer]) -> None:
    n_ties = sum(compare(*pair) for pair in zip(found, expected, strict=True))
    assert n_ties <= 1 + len(found) // 20


def made_up(seed: int, n: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(256) for _ in range(n)]


SYSTEM = made_up(0, 300)


def mixed_prompts(seed: int, n: int) -> list[list[int]]:
    """Prompts of one of three beginnings, or of one another's, with ends of their own."""
    random = Random(seed)
    beginnings = [SYSTEM, made_up(1, 200), SYSTEM[:150]]
    prompts: list[list[int]] = []
    for _ in range(n):
        if prompts and random.random() < 0.3:
            base = random.choice(prompts)
            prompts.append(base[: random.randint(len(base) // 2, len(base))] or base)
        else:
            base = random.choice(beginnings)
            prompts.append([*base, *made_up(random.randrange(10**6), random.randint(0, 90))])
    return prompts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n_batch", "swa_full"), [(512, True), (32, False)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 25))])
async def test_random_mixes_draw_what_a_cold_engine_draws(
    families: dict[str, Path], family: str, n_batch: int, swa_full: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some together, some after one another, some cancelled at any moment, with a store that keeps only a few."""
    # A small batch makes the sliding window's ring small, and cuts prompts at many places.
    monkeypatch.setattr("engine.engine.N_BATCH", n_batch)
    path = families[family]
    prompts = mixed_prompts(n_batch + 1000 * seed, 40)
    expected = await cold(path, prompts)
    assert len({tuple(step.drawn.token for step in answer) for answer in expected}) > len(prompts) // 2
    found: dict[int, Answer] = {}
    random = Random(seed)
    async with engine_on(path, prefix_cache_bytes=400_000, swa_full=swa_full) as engine:
        waiting = list(enumerate(prompts))
        while waiting:
            group = [waiting.pop(0) for _ in range(min(len(waiting), random.randint(1, 6)))]
            sequences = [(at, asked(prompt)) for at, prompt in group]
            leaving = [asked([*random.choice(prompts)], max_tokens=100) for _ in range(random.randint(0, 2))]
            for each in random.sample(leaving + [each for _, each in sequences], len(leaving) + len(sequences)):
                engine.submit(each)
            for each in leaving:
                if random.random() < 0.5:
                    await asyncio.wait(
                        [asyncio.ensure_future(w.listener.tokens.wait()) for w in (each, sequences[0][1])],  # type: ignore[attr-defined]
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                engine.cancel(each)
            for at, each in sequences:
                found[at] = await answer_of(each)
            for each in leaving:
                await each.listener.finished()  # type: ignore[attr-defined]
        compare_all([found[at] for at in range(len(prompts))], expected)
        counters = engine.counters
        assert counters.n_cached_tokens > 2000
        assert counters.n_states_saved > 0
        assert 0 < counters.store_bytes <= 400_000


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_conversation_never_reads_its_history_again(families: dict[str, Path], family: str) -> None:
    path = families[family]
    async with engine_on(path) as engine:
        history = made_up(3, 60)
        turns = []
        for turn in range(4):
            each = asked(history, max_tokens=16)
            read_before = engine.counters.n_prefill_tokens
            await run(engine, each)
            turns.append((list(history), await answer_of(each)))
            n_new = engine.counters.n_prefill_tokens - read_before
            if turn:
                # The message itself, and the answer's last token, which nobody had evaluated.
                assert n_new == 11
                assert each.n_cached == len(history) - 11
            # The next turn's prompt holds the answer: its bytes are its tokens.
            history = [*history, *drawn(engine, each), *made_up(40 + turn, 10)]
    expected = await cold(path, [prompt for prompt, _ in turns], max_tokens=16)
    compare_all([answer for _, answer in turns], expected)


def drawn(engine: Engine, each: Sequence) -> list[int]:
    """The tokens that a finished sequence drew: those in its slot, and the last."""
    held = next(
        engine._prefixes.held(slot)
        for slot in range(engine.options.n_slots)
        if engine._prefixes.held(slot)[: each.n_prompt].tolist() == each.prompt
    )
    return [*held[each.n_prompt :].tolist(), each.last_token]


@pytest.mark.parametrize("family", FAMILIES)
async def test_requests_that_arrive_together_read_their_beginning_once(families: dict[str, Path], family: str) -> None:
    prompts = [[*SYSTEM, *made_up(seed, 12)] for seed in range(1, 7)]
    expected = await cold(families[family], prompts)
    async with engine_on(families[family], n_slots=6) as engine:
        together = [asked(prompt) for prompt in prompts]
        for each in together:
            engine.submit(each)
        compare_all([await answer_of(each) for each in together], expected)
        assert engine.counters.n_prefill_tokens == len(SYSTEM) + 6 * 12
        assert engine.counters.n_cached_tokens == 5 * len(SYSTEM)
        assert engine.counters.n_prefix_hits == 5
        assert [each.n_cached for each in together] == [0, *[len(SYSTEM)] * 5]


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_follower_of_one_that_was_cancelled_is_right(families: dict[str, Path], family: str) -> None:
    prompts = [[*SYSTEM, *made_up(seed, 12)] for seed in range(1, 4)]
    expected = await cold(families[family], prompts)
    for n_before in range(4):
        async with engine_on(families[family]) as engine:
            leaving, *staying = [asked(prompt) for prompt in prompts]
            started = asyncio.Event()
            leaving.listener = lambda event, started=started: started.set()  # type: ignore[misc]
            engine.submit(leaving)
            if n_before:
                await started.wait()
            for each in staying:
                engine.submit(each)
            engine.cancel(leaving)
            compare_all([await answer_of(each) for each in staying], expected[1:])


async def test_the_same_prompt_again_reads_one_token(families: dict[str, Path]) -> None:
    for family, path in families.items():
        async with engine_on(path) as engine:
            first = asked(SYSTEM)
            await run(engine, first)
            read = engine.counters.n_prefill_tokens
            again = asked(SYSTEM)
            await run(engine, again)
            compare_all([await answer_of(again)], [await answer_of(first)])
            assert engine.counters.n_prefill_tokens == read + 1, family
            assert again.n_cached == len(SYSTEM) - 1


async def test_an_evicted_conversation_comes_back_from_the_store(families: dict[str, Path]) -> None:
    for family, path in families.items():
        async with engine_on(path, n_slots=1) as engine:
            first = asked([*SYSTEM, 1, 2, 3])
            await run(engine, first)
            history = [*first.prompt, *drawn(engine, first), 9, 9]
            for seed in range(3):
                await run(engine, asked(made_up(100 + seed, 200)))
            assert engine.counters.n_states_saved > 0, family
            back = asked(history)
            await run(engine, back)
            assert engine.counters.n_states_restored > 0, family
            # A hybrid's store has the state of the prompt already, and does without the answer's few tokens.
            assert back.n_cached in (len(history) - 3, first.n_prompt - 1), family
        compare_all([await answer_of(back)], await cold(path, [history]))


async def test_a_window_that_has_moved_on_is_not_reused_and_says_so(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second prompt branches off where the window is gone: it reads all, and leaves the state for the third."""
    monkeypatch.setattr("engine.engine.N_BATCH", 32)
    path = families["gemma3"]
    tails = [made_up(seed, 300) for seed in (1, 2, 3)]
    prompts = [[*SYSTEM[:150], *tail] for tail in tails]
    expected = await cold(path, prompts)
    async with engine_on(path, n_slots=1, swa_full=False) as engine:
        sequences = [asked(prompt) for prompt in prompts]
        for each in sequences:
            await run(engine, each)
        compare_all([await answer_of(each) for each in sequences], expected)
        assert [each.n_cached for each in sequences] == [0, 0, 150]
        assert engine.counters.n_prefix_refused == 1
        assert "sliding window" in engine.counters.prefix_reuse
    assert WINDOW < 150


async def test_a_recurrent_state_is_not_cut_and_says_so(families: dict[str, Path]) -> None:
    prompts = [[*SYSTEM, *made_up(seed, 40)] for seed in (1, 2, 3)]
    expected = await cold(families["lfm2"], prompts)
    async with engine_on(families["lfm2"], n_slots=1) as engine:
        sequences = [asked(prompt) for prompt in prompts]
        for each in sequences:
            await run(engine, each)
        compare_all([await answer_of(each) for each in sequences], expected)
        assert [each.n_cached for each in sequences] == [0, 0, len(SYSTEM)]
        assert engine.counters.n_prefix_refused == 1
        assert "recurrent" in engine.counters.prefix_reuse


async def test_without_a_store_slots_still_share(families: dict[str, Path]) -> None:
    for path in families.values():
        async with engine_on(path, n_slots=2, prefix_cache_bytes=0) as engine:
            for _ in range(2):
                await run(engine, asked([*SYSTEM, *made_up(4, 20)]))
            assert engine.counters.n_states_saved == engine.counters.store_bytes == 0
        async with engine_on(path, n_slots=2, share_prefixes=False) as engine:
            for _ in range(2):
                await run(engine, asked(SYSTEM))
            assert engine.counters.n_cached_tokens == engine.counters.n_prefix_hits == 0
            assert engine.counters.n_prefill_tokens == 2 * len(SYSTEM)


async def test_a_cancel_in_a_hybrid_aborts_nobody_elses_batch(families: dict[str, Path]) -> None:
    """Half of an aborted batch may be in a recurrent state, which has no way back."""
    path = families["lfm2"]
    staying = [made_up(seed, 100) for seed in range(4)]
    expected = await cold(path, staying)
    async with engine_on(path, n_slots=4) as engine:
        for turn in range(30):
            leaving = asked(made_up(1000 + turn, 40), max_tokens=200)
            engine.submit(leaving)
            if turn % 3:
                await leaving.listener.tokens.wait()  # type: ignore[attr-defined]
            each = asked(staying[turn % 4])
            engine.submit(each)
            engine.cancel(leaving)
            compare_all([await answer_of(each)], [expected[turn % 4]])
            await leaving.listener.finished()  # type: ignore[attr-defined]


async def test_a_state_that_cannot_be_restored_is_read_anew(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[*SYSTEM, *made_up(seed, 12)] for seed in range(1, 4)]
    for path in families.values():
        expected = await cold(path, prompts)

        def forced_failure(context: LlamaContext, slot: int, blob: object) -> bool:
            context.forget(slot)
            return False

        with monkeypatch.context() as patch:
            patch.setattr(LlamaContext, "restore", forced_failure)
            async with engine_on(path) as engine:
                filling = [asked(made_up(90 + slot, 350)) for slot in range(3)]
                for each in filling:
                    engine.submit(each)
                for each in filling:
                    await answer_of(each)
                together = [asked(prompt) for prompt in prompts]
                for each in together:
                    engine.submit(each)
                compare_all([await answer_of(each) for each in together], expected)
                assert [each.n_cached for each in together] == [0, 0, 0]


async def test_a_state_over_the_whole_budget_is_not_kept(families: dict[str, Path]) -> None:
    async with engine_on(families["lfm2"], n_slots=1, prefix_cache_bytes=1000) as engine:
        for seed in range(3):
            await run(engine, asked(made_up(seed, 100)))
        assert engine.counters.n_states_saved == engine.counters.store_bytes == 0


async def test_only_what_can_go_back_is_aborted(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    aborts: list[str] = []
    abort = LlamaContext.abort
    for family in ("qwen3", "lfm2"):

        def noted(context: LlamaContext, family: str = family) -> None:
            aborts.append(family)
            abort(context)

        async with engine_on(families[family]) as engine:
            each = asked(SYSTEM, max_tokens=200)
            engine.submit(each)
            await each.listener.tokens.wait()  # type: ignore[attr-defined]
            with monkeypatch.context() as patch:
                patch.setattr(LlamaContext, "abort", noted)
                engine.cancel(each)
                await each.listener.finished()  # type: ignore[attr-defined]
    assert aborts == ["qwen3"]


async def test_what_was_cached_is_told_everywhere(tmp_path: Path, families: dict[str, Path]) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(families["qwen3"].read_bytes())
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        request = InferenceRequest(model="a", input="x" * 100, raw=True, params=Params(max_tokens=2, temperature=0))
        replies = [await node.service.complete(request) for _ in range(2)]
        assert [reply.tokens_cached for reply in replies] == [0, 99]
        assert replies[0].text == replies[1].text
        assert [row.tokens_cached for row in node.sinks["a"].rows] == [0, 99]
        finished = [event for event in node.events if event.type == "request.finished"]
        assert [event.tokens_cached for event in finished] == [0, 99]  # type: ignore[attr-defined]
        assert node.fleet.get("a").counters.n_cached_tokens == 99
    async with running_node(tmp_path, worker_settings("a", prefix_cache_mb=0)) as node:
        await node.loaded("a")
        assert [(await node.service.complete(request)).tokens_cached for _ in range(2)] == [0, 0]
