"""How many guesses a step checks, alone; and that they change nothing of what is drawn, on every kind of memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engine.answer import Chunk
from engine.constraint import Constraints
from engine.engine import Engine
from engine.llama import LlamaContext
from engine.options import EngineOptions
from engine.prompt_lookup import PromptLookup
from engine.sampling import SamplerSpec
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.service import InferenceRequest
from engine.speculation import MAX_ROWS, N_GUESSES, SURE_STREAK, Outlook, Speculation
from infsvc.events import EventBus
from infsvc.types import CompletionReply, Params
from tests.engine.parts import Heard, Node, run, running_node, sequence, spec, worker_settings
from tests.engine.test_prefix_sharing import TIE, Answer, answer_of
from tests.tiny_families import FAMILIES
from transports.metrics import Metrics

N_CTX = 512
CUTTABLE = ["qwen3", "gemma3", "gpt-oss"]


# -- the choice, alone ------------------------------------------------------------------------------------------------


def learned(curve: dict[int, float], n_sequences: int = 1) -> Speculation:
    """One that has seen steps of these seconds by their guesses, all of which held."""
    made = Speculation()
    for n_guesses, seconds in curve.items():
        for _ in range(6):
            made.took(n_sequences, n_guesses, n_sequences * (n_guesses + 1), seconds)
    made.took(n_sequences, 0, n_sequences, curve[0])
    return made


SURE, UNSURE, NEW = Outlook(0.97, 100), Outlook(0.3, 100, 5), Outlook(0.9, 100, 5)


def test_nothing_is_guessed_before_a_plain_step_was_seen() -> None:
    assert Speculation().choose([SURE], n_max=15) == 0


def test_where_checks_cost_little_the_longest_is_taken_and_where_they_cost_all_none() -> None:
    assert learned({0: 1.0, 1: 1.01, 3: 1.02, 7: 1.05, 15: 1.1}).choose([SURE], n_max=15) == 15
    assert learned({0: 1.0, 1: 2.0, 3: 4.0, 7: 8.0, 15: 16.0}).choose([SURE], n_max=15) == 0


def test_a_guess_that_seldom_holds_is_checked_only_where_it_costs_nothing() -> None:
    assert learned({0: 1.0, 1: 1.4, 3: 2.0, 7: 3.0, 15: 5.0}).choose([UNSURE], n_max=15) == 0
    assert learned({0: 1.0, 1: 1.02, 3: 2.0, 7: 3.0, 15: 5.0}).choose([UNSURE], n_max=15) == 1


def test_what_was_not_tried_is_supposed_from_what_was() -> None:
    assert learned({0: 1.0}).choose([NEW], n_max=15) > 0
    assert learned({0: 1.0, 3: 4.0}).choose([NEW], n_max=15) == 0
    assert learned({0: 1.0, 3: 1.1}).choose([NEW], n_max=15) == 15


def test_where_guesses_are_sure_a_kind_is_tried_though_its_neighbour_is_dear() -> None:
    """Kernels work in tiles: on some machines 16 rows cost what 8 do."""
    made = learned({0: 1.0, 1: 2.0, 3: 4.0, 7: 8.0})
    assert made.choose([NEW], n_max=15) == 0
    assert made.choose([SURE], n_max=15) == 15
    for _ in range(3):
        made.took(1, 15, 16, 16.0)
    assert made.choose([SURE], n_max=15) == 0


def test_room_and_rows_bound_it() -> None:
    made = learned({0: 1.0})
    for n_max in range(16):
        assert made.choose([SURE], n_max=n_max) in (0, *(n for n in N_GUESSES if n <= n_max))
    assert made.choose([Outlook(0.97, 0)], n_max=15) == 0
    assert made.choose([Outlook(0.97, 2)], n_max=15) == 3
    for n_sequences in range(1, 40):
        flat = learned(dict.fromkeys((0, *N_GUESSES), 1.0), n_sequences)
        n = flat.choose([SURE] * n_sequences, n_max=15)
        assert n_sequences * (n + 1) <= max(MAX_ROWS, n_sequences)
        assert (n > 0) == (n_sequences <= MAX_ROWS // 2)


def test_one_that_repeats_itself_pays_for_others_only_where_they_cost_little() -> None:
    others = [Outlook(0.0, 100, 0)] * 3
    curve = {0: 1.0, 1: 1.2, 3: 1.6, 7: 2.4}
    assert learned(curve, 4).choose([SURE, *others], n_max=15) == 0
    assert learned(curve, 4).choose([SURE] * 4, n_max=15) > 0


def test_one_bad_measurement_does_not_last_and_is_tried_ever_more_rarely() -> None:
    made = learned({0: 1.0, 1: 1.4, 3: 1.9, 7: 3.0, 15: 6.0})
    for _ in range(30):
        for n in N_GUESSES:
            made.took(1, n, 1, 30.0)
    tries = []
    for at in range(5000):
        if n := made.choose([SURE], n_max=15):
            tries.append(at)
            made.took(1, n, n + 1, 30.0)
        made.took(1, 0, 1, 1.0)
    gaps = [later - earlier for earlier, later in pairwise(tries)]
    assert 3 < len(tries) < 12
    assert gaps[0] < gaps[1] < gaps[2]


def test_a_moment_of_a_busy_neighbour_counts_for_little() -> None:
    made = learned({0: 1.0, 1: 1.4, 3: 1.5, 7: 3.0, 15: 7.0})
    assert made.choose([SURE], n_max=15) == 3
    made.took(1, 3, 4, 100.0)
    assert made.price(1, 3) == pytest.approx(1.8)
    # What slows all steps down changes no price.
    for _ in range(20):
        made.took(1, 0, 1, 5.0)
    assert made.price(1, 3) == pytest.approx(1.8)


def test_a_change_of_kind_is_paid_for_there_and_back() -> None:
    made = learned({0: 1.0, 1: 1.1})
    assert made.choose([NEW], n_max=1) == 1
    for _ in range(40):
        made.took(1, 1, 2, 1.7)
        made.took(1, 0, 1, 1.6)
    assert made.price(1, 1) == pytest.approx(1.1, abs=0.05)
    assert made.choose([SURE], n_max=1) == 0
    made.took(1, 1, 2, 1.7)
    assert made.choose([SURE], n_max=1) == 1


def test_guesses_that_lost_are_checked_only_where_they_are_sure_until_the_loss_is_made_good() -> None:
    made = learned({0: 1.0, 1: 1.2, 3: 1.6, 7: 2.4})
    assert made.choose([NEW], n_max=7) == 7
    for _ in range(4):
        made.took(1, 7, 1, 2.4)
    assert made.balance_s < -2
    assert made.choose([NEW], n_max=7) == 0
    assert made.choose([SURE], n_max=7) == 7
    n_plain = 0
    while not made.choose([NEW], n_max=7):
        made.took(1, 0, 1, 1.0)
        n_plain += 1
    assert n_plain > 400


@pytest.mark.parametrize("seed", range(300))
def test_what_is_not_looked_at_would_not_have_been_taken(seed: int) -> None:
    random = Random(seed)
    n_sequences = random.randint(1, 16)
    price, curve = 1.0, {0: 1.0}
    for n in N_GUESSES[: random.randint(0, 4)]:
        price = curve[n] = price * random.uniform(1, 2)
    made = learned(curve, n_sequences)
    outlooks = [
        Outlook(random.uniform(0.3, 1) if random.random() < 0.8 else 0.0, random.randint(0, 15), random.randint(4, 30))
        for _ in range(n_sequences)
    ]
    sure = all(each.streak >= SURE_STREAK for each in outlooks)
    looked_at = made.may_pay(n_sequences, sum(each.hold for each in outlooks), sure=sure)
    assert looked_at or not made.choose(outlooks, n_max=15)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_the_text_and_the_machine_little_is_lost(seed: int) -> None:
    """Texts that repeat themselves in the worst way, on machines of any curve: simulated seconds with guesses over
    those without, and the gain where all is repeated."""
    random = Random(seed)
    for slope in (0.05, 0.3, 0.6, 1.0):
        for run_length in (4, 5, 6, 9, 17, 33, 5000):
            assert simulated(random, slope=slope, run_length=run_length, n_tokens=3000) < 1.03
    assert simulated(random, slope=0.05, run_length=5000, n_tokens=3000) < 0.3
    assert simulated(random, slope=0.3, run_length=5000, n_tokens=3000) < 0.5


def simulated(random: Random, *, slope: float, run_length: int, n_tokens: int) -> float:
    """One sequence whose text copies `run_length` tokens of its prompt, then says one that it never said."""
    speculation = Speculation()
    prompt = [random.randrange(10**6) for _ in range(5500)]
    lookup = PromptLookup(np.array(prompt, dtype=np.int32), n_max=10_000)
    text: list[int] = []
    while len(text) < n_tokens + 16:
        start = random.randrange(len(prompt) - run_length)
        text += [*prompt[start : start + run_length], random.randrange(10**6)]
    at, seconds, n_before = 0, 0.0, 0
    while at < n_tokens:
        n = 0
        if lookup.streak >= lookup.need:
            n = speculation.choose([Outlook(lookup.hold, min(15, lookup.streak), lookup.streak)], n_max=15)
        ready = n > 0
        guessed = lookup.guess(n)
        n_held = 0
        while n_held < n and guessed[n_held] == text[at + n_held]:
            n_held += 1
        for token in text[at : at + n_held + 1]:
            lookup.append(token)
        if ready:
            lookup.checked(n, n_held)
        at += n_held + 1
        price = random.gauss(1, 0.05) * (1 + slope * n) + 0.2 * (n != n_before)
        speculation.took(1, n, n_held + 1, price)
        seconds, n_before = seconds + price, n
    return seconds / at


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / f"{name}.gguf") for name, write in FAMILIES.items()}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses as many as there is room for, at random, whatever it costs: a tiny model's steps say nothing."""
    random = Random(5)

    def choose(self: Speculation, outlooks: list[Outlook], *, n_max: int) -> int:
        return min(n_max, random.choice(N_GUESSES), MAX_ROWS // len(outlooks) - 1)

    monkeypatch.setattr(Speculation, "choose", choose)
    monkeypatch.setattr(Speculation, "may_pay", lambda self, n_sequences, holds, *, sure: True)
    monkeypatch.setattr("engine.prompt_lookup._FIRST_NEED", 1)
    monkeypatch.setattr(PromptLookup, "checked", lambda self, n, n_held: None)


@asynccontextmanager
async def engine_on(path: Path, *, n_slots: int = 3, draft_max: int = 15, **options: Any) -> AsyncIterator[Engine]:
    engine = Engine(
        "tiny",
        EngineOptions(path=path, n_ctx=N_CTX, n_slots=n_slots, n_threads=1, draft_max=draft_max, **options),
        asyncio.get_running_loop(),
    )
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    try:
        yield engine
    finally:
        engine.close()
        assert await asyncio.to_thread(engine.join, 20.0)


def asked(prompt: list[int], **fields: Any) -> Sequence:
    """A greedy request whose answer repeats itself now and then, with the log-probability of every token."""
    given = {"sampler": narrow(), "max_tokens": 40, "n_ctx": N_CTX, "n_logprobs": 259}
    return sequence(prompt=prompt, **given | fields)


def narrow(**params: Any) -> SamplerSpec:
    """Only six tokens are likely: pairs and triples come again soon, and half of the guesses are wrong."""
    return spec(logit_bias=dict.fromkeys(range(97, 103), 30.0), **params)


def wordy(seed: int, n: int) -> list[int]:
    """A text of few words, each of which comes again and again."""
    random = Random(seed)
    words = [[random.randrange(256) for _ in range(random.randint(2, 9))] for _ in range(6)]
    text: list[int] = []
    while len(text) < n:
        text += random.choice(words)
    return text[:n]


def variants(seed: int, n: int) -> list[dict[str, Any]]:
    """What the requests of a random mix ask for, besides their prompts."""
    random = Random(seed)
    kinds: list[dict[str, Any]] = [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"max_tokens": 90},
        {"ignore_eos": False},
        {"stop": ("a",)},
        {"stop": ("\x00", "e ", "zz")},
        {"sampler": spec()},
        {"sampler": spec(repeat_penalty=1.3, repeat_last_n=32), "max_tokens": 90},
        {"sampler": narrow(presence_penalty=0.7, frequency_penalty=0.2)},
        {"draft_max": 0},
        {"draft_max": 2},
        {"n_ctx": 150, "max_tokens": 400},
    ]
    return [random.choice(kinds) for _ in range(n)]


def mix(seed: int, n: int) -> list[tuple[list[int], dict[str, Any]]]:
    random = Random(seed)
    prompts = [wordy(random.randrange(10**6), random.randint(1, 130)) for _ in range(n)]
    for at in range(1, n):
        if random.random() < 0.3:
            prompts[at] = [*prompts[at - 1][:100], *wordy(at, 20)]
    return list(zip(prompts, variants(seed, n), strict=True))


@dataclass
class Expected:
    """What an engine answers that guesses nothing: its steps, and what each token was drawn from (n_vocab,), with
    penalties and biases."""

    answer: Answer
    weighed: list[npt.NDArray[np.float32]]
    eog: list[int]
    text: str
    reason: str


async def alone(path: Path, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Expected]:
    """One request after another."""
    draw = Engine._draw
    weighed: list[npt.NDArray[np.float32]] = []

    def noted(
        self: Engine, context: LlamaContext, scheduler: Scheduler, each: Sequence, position: int, now: float
    ) -> None:
        draw(self, context, scheduler, each, position, now)
        weighed.append(context.logits(position).copy())  # changed in place by whatever is asked for

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "_draw", noted)
        async with engine_on(path, n_slots=1, draft_max=0, share_prefixes=False) as engine:
            answers = []
            for prompt, fields in requests:
                weighed.clear()
                each = asked(prompt, **{key: value for key, value in fields.items() if key != "draft_max"})
                heard = await run(engine, each)
                assert heard.n_tokens
                answer, reason = await answer_of(each), (await heard.finished()).reason
                answers.append(Expected(answer, list(weighed), engine.model.eog.tolist(), heard.text, reason))
            assert engine.counters.n_drafted == 0
    return answers


def parting(found: Answer, expected: Expected) -> tuple[int, float] | None:
    """Where two answers part, and how much further below the first candidate the one lay that was drawn instead; None
    where they are equal.

    Fails where that is no tie, and where a token's log-probability is another one before.
    """
    for at, mine in enumerate(found):
        theirs = expected.answer[at] if at < len(expected.answer) else None
        if theirs is None or mine.drawn.token != theirs.drawn.token:
            break
        assert mine.drawn.logprob == pytest.approx(theirs.drawn.logprob, abs=TIE), at
    else:
        at = len(found)
        if at == len(expected.answer):
            return None
    # A token that ends the answer has no step.
    drawn = [found[at].drawn.token] if at < len(found) else expected.eog
    gap = float(expected.weighed[at].max() - expected.weighed[at][drawn].max())
    assert 0 <= gap < TIE, (at, gap)
    return at, gap


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", [*CUTTABLE, "lfm2"])
@pytest.mark.parametrize(("n_batch", "swa_full"), [(512, True), (32, False)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 25))])
async def test_random_mixes_draw_what_is_drawn_without_guesses(
    families: dict[str, Path], family: str, n_batch: int, swa_full: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together and after one another, some cancelled at any moment, prompts that begin alike among them. Where an
    answer is another one, the candidates were so near that the size of a batch decides: each is told, with its gap."""
    monkeypatch.setattr("engine.engine.N_BATCH", n_batch)
    requests = mix(n_batch + 1000 * seed, 10)
    expected = await alone(families[family], requests)
    random = Random(seed)
    n_answers = n_tokens = 0
    async with engine_on(families[family], swa_full=swa_full) as engine:
        waiting = list(zip(requests, expected, strict=True))
        while waiting:
            group = [waiting.pop(0) for _ in range(min(len(waiting), random.randint(1, 5)))]
            sequences = [asked(prompt, **fields) for (prompt, fields), _ in group]
            leaving = [asked(random.choice(requests)[0], max_tokens=200) for _ in range(random.randint(0, 2))]
            for each in random.sample(leaving + sequences, len(leaving) + len(sequences)):
                engine.submit(each)
            for each in leaving:
                if random.random() < 0.5:
                    await asyncio.wait(
                        [asyncio.ensure_future(w.listener.tokens.wait()) for w in (each, sequences[0])],  # type: ignore[attr-defined]
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                engine.cancel(each)
            for each, (_, wanted) in zip(sequences, group, strict=True):
                found = await answer_of(each)
                n_answers, n_tokens = n_answers + 1, n_tokens + len(found)
                if (tie := parting(found, wanted)) is not None:
                    print(f"TIE {family} {n_batch} {swa_full} {seed}: token {tie[0]}, {tie[1]:.2e} apart")
                    continue
                heard = each.listener
                assert isinstance(heard, Heard)
                assert (heard.text, (await heard.finished()).reason) == (wanted.text, wanted.reason)
                assert heard.n_tokens >= len(wanted.answer)
            for each in leaving:
                await each.listener.finished()  # type: ignore[attr-defined]
        counters = engine.counters
        print(
            f"MIX {family} {n_batch} {swa_full} {seed}: {n_answers} answers, {n_tokens} tokens, "
            f"{counters.n_drafted} guesses, {counters.n_accepted} held"
        )
        if family == "lfm2":
            assert counters.n_drafted == 0
        else:
            assert counters.n_accepted > 0  # how many, the moments of the cancels decide
            assert counters.n_drafted > counters.n_accepted
            assert counters.n_steps < counters.n_decode_tokens


@pytest.mark.usefixtures("always")
async def test_a_seed_draws_the_same_text(families: dict[str, Path]) -> None:
    """Every token takes one random number, whether its place was guessed or not."""
    samplers = [narrow(temperature=t, top_k=k, top_p=p, seed=s) for t, k, p, s in (
        (0.7, 40, 0.95, 1), (1.0, 0, 1.0, 2), (0.3, 5, 0.9, 3), (1.5, 20, 0.8, 4),
    )]  # fmt: skip
    texts: dict[int, list[list[int]]] = {}
    for draft_max in (0, 15):
        async with engine_on(families["qwen3"], n_slots=4, draft_max=draft_max) as engine:
            together = [asked(wordy(at, 60), sampler=sampler, max_tokens=300) for at, sampler in enumerate(samplers)]
            for each in together:
                engine.submit(each)
            texts[draft_max] = [[step.drawn.token for step in await answer_of(each)] for each in together]
            assert (engine.counters.n_accepted > 0) == (draft_max > 0)
    same = [a == b for a, b in zip(texts[0], texts[15], strict=True)]
    assert sum(same) >= len(same) - 1


@pytest.mark.usefixtures("always")
async def test_a_grammar_holds_through_guesses(families: dict[str, Path]) -> None:
    grammar = 'root ::= "[" item ("," item){5,9} "]"\nitem ::= "\\"" [a-d]{3,4} "\\""'
    prompt = list(b'["abcd","abcd","abcd","abcd","abcd","abcd"]')
    answers: dict[int, list[tuple[str, str]]] = {}
    for draft_max in (0, 15):
        async with engine_on(families["qwen3"], draft_max=draft_max) as engine:
            model = engine.model
            constraints = Constraints(model.texts, model.eog.tolist())
            together = [
                asked(
                    prompt, max_tokens=200, ignore_eos=False, sampler=sampler, constraint=constraints.grammar(grammar)
                )
                for sampler in (spec(), spec(temperature=0.8, seed=7), spec(repeat_penalty=1.2))
            ]
            for each in together:
                engine.submit(each)
            ends = [await each.listener.finished() for each in together]  # type: ignore[attr-defined]
            answers[draft_max] = [
                (each.listener.text, end.reason)  # type: ignore[attr-defined]
                for each, end in zip(together, ends, strict=True)
            ]
            assert (engine.counters.n_accepted > 5) == (draft_max > 0)
    assert answers[0] == answers[15]
    assert all(text[0] == "[" and text[-1] == "]" and reason == "stop" for text, reason in answers[15])


@pytest.mark.usefixtures("always")
async def test_a_chat_goes_on_from_what_held_and_nothing_else(families: dict[str, Path]) -> None:
    """What is kept of an answer for the next prompt holds no token of a wrong guess."""
    for family in CUTTABLE:
        history = wordy(3, 60)
        turns: list[tuple[list[int], dict[str, Any]]] = []
        found = []
        async with engine_on(families[family]) as engine:
            for turn in range(4):
                each = asked(history)
                await run(engine, each)
                turns.append((list(history), {}))
                found.append(await answer_of(each))
                if turn:
                    assert each.n_cached == len(history) - 11
                history = [*history, *(step.drawn.token for step in found[-1]), *wordy(40 + turn, 10)]
            assert engine.counters.n_drafted > engine.counters.n_accepted > 0
        expected = await alone(families[family], turns)
        for answer, wanted in zip(found, expected, strict=True):
            parting(answer, wanted)


@pytest.mark.usefixtures("always")
async def test_a_recurrent_state_is_not_guessed_with_and_says_so(families: dict[str, Path]) -> None:
    async with engine_on(families["lfm2"]) as engine:
        await run(engine, asked(wordy(1, 100)))
        assert engine.counters.n_drafted == 0
        assert "recurrent" in engine.counters.speculation
    async with engine_on(families["qwen3"]) as engine:
        each = asked(wordy(1, 100))
        last = await (await run(engine, each)).finished()
        assert engine.counters.speculation == "on, where it pays"
        assert 0 < last.n_accepted < last.n_drafted
        assert (last.n_drafted, last.n_accepted) == (engine.counters.n_drafted, engine.counters.n_accepted)
        assert engine.counters.n_decode_tokens == 40


@pytest.mark.usefixtures("always")
async def test_a_request_may_ask_for_guesses_and_for_none(families: dict[str, Path]) -> None:
    for by_default, asked_for, some in ((0, None, False), (0, 4, True), (15, None, True), (15, 0, False)):
        async with engine_on(families["qwen3"], draft_max=by_default) as engine:
            await run(engine, asked(wordy(1, 100), draft_max=asked_for))
            assert (engine.counters.n_drafted > 0) == some


@pytest.mark.usefixtures("always")
async def test_nothing_is_guessed_while_a_prompt_is_read(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[int, int]] = []
    look_ahead = Engine._look_ahead

    def noted(self: Engine, shares: list[Any], n_batch: int) -> list[Any]:
        longer = look_ahead(self, shares, n_batch)
        steps.append((sum(len(share.tokens) for share in shares if not share.n_ahead and len(share.tokens) > 1),
                      sum(share.n_ahead for share in longer)))  # fmt: skip
        return longer

    monkeypatch.setattr(Engine, "_look_ahead", noted)
    async with engine_on(families["qwen3"]) as engine:
        first = asked(wordy(1, 100), max_tokens=300)
        engine.submit(first)
        await first.listener.tokens.wait()  # type: ignore[attr-defined]
        await run(engine, asked(wordy(2, 400)))
        engine.cancel(first)
    assert any(n_read for n_read, _ in steps)
    assert any(n_ahead for _, n_ahead in steps)
    assert not any(n_read and n_ahead for n_read, n_ahead in steps)


async def test_it_begins_by_itself_where_it_pays(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With the choice as it is, on a machine whose steps cost the same with and without guesses; and on one where every
    token costs as much as a step, hardly ever."""
    took = Speculation.took
    drafted = {}
    for name, slope in (("flat", 0.0), ("steep", 1.0)):

        def fixed(self: Speculation, n_sequences: int, n: int, n_drawn: int, _: float, slope: float = slope) -> None:
            took(self, n_sequences, n, n_drawn, 0.01 * (1 + slope * n))

        monkeypatch.setattr(Speculation, "took", fixed)
        async with engine_on(families["qwen3"], n_slots=1) as engine:
            for seed in range(3):
                await run(engine, asked(wordy(seed, 100), max_tokens=120))
            drafted[name] = engine.counters.n_drafted
    assert drafted["flat"] > 60
    assert drafted["steep"] <= 20


@pytest.mark.usefixtures("always")
async def test_a_step_is_one_event_and_the_reply_says_what_was_guessed(
    tmp_path: Path, families: dict[str, Path]
) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(families["qwen3"].read_bytes())

    async def answer(node: Node, **params: Any) -> tuple[CompletionReply, list[Chunk]]:
        request = InferenceRequest(
            model="a",
            input="abcabcabcabc",
            raw=True,
            n_logprobs=1,
            params=Params(
                max_tokens=60, temperature=0, ignore_eos=True, logit_bias=dict.fromkeys(range(97, 103), 30), **params
            ),
        )
        async with await node.service.submit(request) as generation:
            chunks = [chunk async for chunk in generation]
            return await generation.result(), chunks

    async with running_node(tmp_path, worker_settings("a", prefix_cache_mb=0, draft_max=15)) as node:
        await node.loaded("a")
        counters = node.fleet.get("a").counters
        guessed, chunks = await answer(node)
        n_steps = counters.n_steps
        plain, singles = await answer(node, draft_max=0)
        assert guessed.text == plain.text == "".join(chunk.text for chunk in chunks)
        assert guessed.tokens_out == plain.tokens_out == 60
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert len(chunks) == n_steps < len(singles) == 60
        assert [step.drawn.token for chunk in chunks for step in chunk.logprobs] == [
            step.drawn.token for chunk in singles for step in chunk.logprobs
        ]
        assert guessed.tokens_drafted == counters.n_drafted
        assert guessed.tokens_accepted == counters.n_accepted == 60 - n_steps
        assert "tokens_drafted" in guessed.wire()
        assert "tokens_drafted" not in plain.wire()
        page = Metrics(node.fleet, EventBus("here")).page().decode()
        assert f'infsvc_draft_tokens_total{{model="a"}} {counters.n_drafted}.0' in page
        assert f'infsvc_draft_accepted_tokens_total{{model="a"}} {counters.n_accepted}.0' in page
        assert 'infsvc_speculation{model="a",state="on, where it pays"} 1.0' in page
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        assert (await answer(node))[0].tokens_drafted is None
        assert (await answer(node, draft_max=3))[0].tokens_drafted
