"""One thread, one model, many sequences: nobody changes what another gets, and everybody hears of the end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.engine import Engine
from engine.llama import LlamaContext
from engine.options import EngineOptions
from engine.sequence import SequenceEvent, SequenceFinished, SequenceStarted, TokenEmitted
from infsvc.errors import LlamaError, LoadError
from tests.engine.parts import Heard, run, running_engine, sequence, spec
from tests.tiny_models import write_tiny_model


def prompt(seed: int, n: int = 12) -> list[int]:
    return [1 + (31 * seed + 17 * i) % 250 for i in range(n)]


async def test_a_sequence_starts_yields_its_tokens_and_ends(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        heard = await run(engine, sequence(max_tokens=5))
    kinds = [type(event) for event in heard.events]
    assert kinds == [SequenceStarted, *[TokenEmitted] * 5, SequenceFinished]
    assert heard.events[0].slot == 0  # type: ignore[attr-defined]
    assert [event.at_s for event in heard.events] == sorted(event.at_s for event in heard.events)
    assert (await heard.finished()).reason == "length"


async def test_together_each_gets_what_it_gets_alone(tiny_model: Path) -> None:
    prompts = [prompt(seed, n) for seed, n in enumerate((1, 5, 40, 130, 7, 66))]
    async with running_engine(tiny_model, n_slots=1) as engine:
        alone = [(await run(engine, sequence(prompt=each, max_tokens=24))).text for each in prompts]
    async with running_engine(tiny_model, n_slots=6) as engine:
        together = [sequence(prompt=each, max_tokens=24) for each in prompts]
        for each in together:
            engine.submit(each)
        ends = [await each.listener.finished() for each in together]  # type: ignore[attr-defined]
        assert engine.counters.max_batch_sequences > 1
    assert [end.reason for end in ends] == ["length"] * 6
    assert [each.listener.text for each in together] == alone  # type: ignore[attr-defined]
    assert len(set(alone)) > 1


async def test_the_same_seed_gives_the_same_text(tiny_model: Path) -> None:
    def wild(seed: int) -> Any:
        return sequence(sampler=spec(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=seed), max_tokens=20)

    async with running_engine(tiny_model) as engine:
        first = (await run(engine, wild(11))).text
        assert (await run(engine, wild(11))).text == first
        beside = [wild(12), wild(11), sequence(max_tokens=20)]
        for each in beside:
            engine.submit(each)
        for each in beside:
            await each.listener.finished()
        assert beside[1].listener.text == first
        assert beside[0].listener.text != first


async def test_eight_decode_in_one_batch(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=8) as engine:
        all_of_them = [sequence(prompt=prompt(seed), max_tokens=32) for seed in range(8)]
        for each in all_of_them:
            engine.submit(each)
        for each in all_of_them:
            await each.listener.finished()  # type: ignore[attr-defined]
        counters = engine.counters
        assert counters.max_batch_sequences == 8
        assert counters.n_decode_tokens == 8 * 32
        assert counters.n_prefill_tokens == 8 * 12
        # One at a time it would have been 256 steps.
        assert counters.n_steps < 64
        assert counters.mean_batch_sequences > 4
        assert counters.n_finished == 8
        assert counters.n_cancelled == 0


async def test_more_than_the_slots_wait_and_all_end(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=2) as engine:
        all_of_them = [sequence(prompt=prompt(seed), max_tokens=4) for seed in range(9)]
        for each in all_of_them:
            engine.submit(each)
        for each in all_of_them:
            assert (await each.listener.finished()).reason == "length"  # type: ignore[attr-defined]
        assert engine.counters.max_batch_sequences == 2


async def test_a_higher_priority_is_admitted_first(tiny_model: Path) -> None:
    order: list[str] = []

    def listener(name: str) -> Heard:
        class Noting(Heard):
            def __call__(self, event: SequenceEvent) -> None:
                super().__call__(event)
                if isinstance(event, SequenceStarted):
                    order.append(name)

        return Noting()

    async with running_engine(tiny_model, n_slots=1) as engine:
        busy = sequence(listener("busy"), max_tokens=100)
        engine.submit(busy)
        await busy.listener.tokens.wait()  # type: ignore[attr-defined]
        low = sequence(listener("low"), priority=-5)
        high = sequence(listener("high"), priority=5)
        engine.submit(low)
        engine.submit(high)
        await low.listener.finished()  # type: ignore[attr-defined]
    assert order == ["busy", "high", "low"]


async def test_one_token(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        heard = await run(engine, sequence(max_tokens=1))
        assert heard.n_tokens == 1
        assert (await heard.finished()).reason == "length"


async def test_the_end_of_the_context_is_a_length(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        heard = await run(engine, sequence(prompt=prompt(1, 250), max_tokens=10**9))
        assert (await heard.finished()).reason == "length"
        assert heard.n_tokens == 6
        heard = await run(engine, sequence(prompt=prompt(1, 255), max_tokens=5))
        assert (await heard.finished()).reason == "length"
        assert heard.n_tokens == 1


async def test_the_context_is_capped_at_what_the_model_was_trained_on(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", n_ctx=512)
    async with running_engine(path, n_ctx=4096) as engine:
        assert engine.n_ctx == 512
    async with running_engine(path, n_ctx=0) as engine:
        assert engine.n_ctx == 512


async def test_every_token_of_the_end_can_be_ignored(tmp_path: Path) -> None:
    """A model whose likeliest token is its end, until it may not be."""
    path = write_tiny_model(tmp_path / "m.gguf", seed=3)
    async with running_engine(path) as engine:
        eog = set(engine.model.eog.tolist())
        assert eog
        wild = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        ended = 0
        for seed in range(12):
            stopping = sequence(sampler=spec(seed=seed, **wild), max_tokens=150, ignore_eos=False)
            heard = await run(engine, stopping)
            if (await heard.finished()).reason == "stop":
                ended += 1
                assert stopping.last_token in eog
                assert heard.events[-2].text == ""  # type: ignore[attr-defined]
            going_on = await run(engine, sequence(sampler=spec(seed=seed, **wild), max_tokens=150))
            assert (await going_on.finished()).reason == "length"
            assert going_on.n_tokens == 150
        assert ended > 0


async def test_a_stop_string_ends_the_text_before_it(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        whole = (await run(engine, sequence(max_tokens=60))).text
        stop = next(whole[at : at + 3] for at in range(8, 40) if whole.find(whole[at : at + 3]) == at)
        heard = await run(engine, sequence(max_tokens=60, stop=(stop, "never met")))
        assert (await heard.finished()).reason == "stop"
        assert heard.text == whole[: whole.index(stop)]
        assert heard.n_tokens < 60


async def test_control_tokens_are_shown_in_raw_mode_only(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    async with running_engine(path) as engine:
        wild = spec(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)
        for _ in range(3):
            raw = await run(engine, sequence(sampler=wild, max_tokens=240, special=True, ignore_eos=False))
            plain = await run(engine, sequence(sampler=wild, max_tokens=240, ignore_eos=False))
            assert raw.n_tokens == plain.n_tokens
            if "<|im_start|>" in raw.text:
                break
        text = raw.text
        for mark in ("<|im_start|>", "<|endoftext|>", "<|im_end|>"):
            text = text.replace(mark, "")
            assert mark not in plain.text
        assert text == plain.text


async def test_penalties_change_what_is_drawn(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        plain = sequence(max_tokens=60)
        strict = sequence(max_tokens=60, sampler=spec(presence_penalty=2.0, repeat_penalty=10.0, repeat_last_n=-1))
        assert (await run(engine, plain)).text != (await run(engine, strict)).text


# -- cancel ------------------------------------------------------------------------------------------------------------


async def test_cancel_in_the_queue(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=1) as engine:
        busy = sequence(max_tokens=200)
        waiting = sequence()
        engine.submit(busy)
        await busy.listener.tokens.wait()  # type: ignore[attr-defined]
        engine.submit(waiting)
        engine.cancel(waiting)
        end = await waiting.listener.finished()  # type: ignore[attr-defined]
        assert end.reason == "cancelled"
        assert not waiting.listener.started  # type: ignore[attr-defined]
        assert (await busy.listener.finished()).reason == "length"  # type: ignore[attr-defined]
        assert engine.counters.n_cancelled == 1


async def test_cancel_before_submit(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        each = sequence()
        engine.cancel(each)
        assert (await (await run(engine, each)).finished()).reason == "cancelled"


async def test_cancel_in_prefill(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", n_ctx=8192)
    async with running_engine(path, n_ctx=8192, n_slots=1) as engine:
        started = asyncio.Event()
        heard = Heard()

        def listener(event: SequenceEvent) -> None:
            heard(event)
            started.set()

        long = sequence(listener, prompt=prompt(1, 8000), n_ctx=8192)
        engine.submit(long)
        await started.wait()
        engine.cancel(long)
        assert (await heard.finished()).reason == "cancelled"
        assert heard.n_tokens == 0
        assert engine.counters.n_prefill_tokens < 8000
        after = await run(engine, sequence())
        assert (await after.finished()).reason == "length"


async def test_cancel_in_decode_leaves_the_others_as_they_were(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=1) as engine:
        expected = (await run(engine, sequence(prompt=prompt(2), max_tokens=150))).text
    async with running_engine(tiny_model, n_slots=3) as engine:
        other = sequence(prompt=prompt(2), max_tokens=150)
        leaving = [sequence(prompt=prompt(seed), max_tokens=240) for seed in (3, 4)]
        for each in (other, *leaving):
            engine.submit(each)
        for each in leaving:
            await each.listener.tokens.wait()  # type: ignore[attr-defined]
            engine.cancel(each)
            assert (await each.listener.finished()).reason == "cancelled"  # type: ignore[attr-defined]
            engine.cancel(each)
        assert (await other.listener.finished()).reason == "length"  # type: ignore[attr-defined]
        assert other.listener.text == expected  # type: ignore[attr-defined]


async def test_cancels_at_any_moment_never_end_anyone_else(tiny_model: Path) -> None:
    """A cancel that comes when its neighbour has just begun aborts a batch that it is not in; that batch is read
    again."""
    async with running_engine(tiny_model, n_slots=1) as engine:
        expected = {n: (await run(engine, sequence(prompt=prompt(n, n), max_tokens=6))).text for n in (3, 50, 170)}
    async with running_engine(tiny_model, n_slots=4) as engine:
        for turn in range(60):
            leaving = sequence(prompt=prompt(turn, 20), max_tokens=200)
            engine.submit(leaving)
            if turn % 3:
                await leaving.listener.tokens.wait()  # type: ignore[attr-defined]
            staying = [sequence(prompt=prompt(n, n), max_tokens=6) for n in expected]
            for each in staying:
                engine.submit(each)
            engine.cancel(leaving)
            for each, text in zip(staying, expected.values(), strict=True):
                assert (await each.listener.finished()).error is None  # type: ignore[attr-defined]
                assert each.listener.text == text  # type: ignore[attr-defined]
            await leaving.listener.finished()  # type: ignore[attr-defined]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_close_in_mid_decode_ends_all_as_cancelled_and_joins(tiny_model: Path) -> None:
    async with running_engine(tiny_model, n_slots=2) as engine:
        all_of_them = [sequence(prompt=prompt(seed), max_tokens=240) for seed in range(5)]
        for each in all_of_them:
            engine.submit(each)
        await all_of_them[0].listener.tokens.wait()  # type: ignore[attr-defined]
        engine.close()
        assert await asyncio.to_thread(engine.join, 20.0)
        for each in all_of_them:
            assert (await each.listener.finished()).reason == "cancelled"  # type: ignore[attr-defined]
        assert engine.counters.n_finished == engine.counters.n_cancelled == 5
        engine.close()


async def test_what_is_submitted_after_close_ends_as_cancelled(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        engine.close()
        assert await asyncio.to_thread(engine.join, 20.0)
        late = sequence()
        end = await (await run(engine, late)).finished()
        assert (end.reason, end.error) == ("cancelled", None)
        engine.cancel(late)


async def test_submit_and_close_at_the_same_time_lose_nobody(tiny_model: Path) -> None:
    for _ in range(5):
        async with running_engine(tiny_model, n_slots=1) as engine:
            racing = [sequence(max_tokens=3) for _ in range(40)]

            def submit_all(engine: Engine = engine, racing: list[Any] = racing) -> None:
                for each in racing:
                    engine.submit(each)

            submitting = asyncio.create_task(asyncio.to_thread(submit_all))
            await asyncio.to_thread(engine.close)
            await submitting
            for each in racing:
                assert (await each.listener.finished()).reason in ("cancelled", "length")  # type: ignore[attr-defined]


async def test_a_closed_engines_model_cannot_be_used(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        model = engine.model
    with pytest.raises(LlamaError, match="closed"):
        model.tokenize("x", add_special=False, parse_special=False)


class ForcedFault(Exception):
    """A fault that no model gives on request."""


async def test_a_fault_in_the_loop_reaches_everybody(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with running_engine(tiny_model, n_slots=1, on_died=died.set_result) as engine:
        running, waiting = sequence(max_tokens=240), sequence()
        engine.submit(running)
        engine.submit(waiting)
        await running.listener.tokens.wait()  # type: ignore[attr-defined]

        def fail(*_: object) -> int:
            raise ForcedFault("forced")

        monkeypatch.setattr(LlamaContext, "decode", fail)
        for each in (running, waiting):
            end = await each.listener.finished()  # type: ignore[attr-defined]
            assert (end.reason, end.error) == ("error", "the engine of tiny stopped: forced")
        assert await died == "the engine of tiny stopped: forced"
        assert await asyncio.to_thread(engine.join, 20.0)
        late = await (await run(engine, sequence())).finished()
        assert (late.reason, late.error) == ("error", "the engine of tiny stopped: forced")


async def test_a_listener_that_fails_costs_the_others_nothing(tiny_model: Path) -> None:
    def fails(_: SequenceEvent) -> None:
        raise ForcedFault("forced")

    async with running_engine(tiny_model) as engine:
        engine.submit(sequence(fails))
        heard = await run(engine, sequence())
        assert (await heard.finished()).reason == "length"


@pytest.mark.parametrize("n", [0, 256, 300])
async def test_a_prompt_that_cannot_be_read_fails_alone(tiny_model: Path, n: int) -> None:
    async with running_engine(tiny_model) as engine:
        good = sequence(max_tokens=40)
        engine.submit(good)
        end = await (await run(engine, sequence(prompt=prompt(1, n)))).finished()
        assert end.reason == "error"
        assert f"{n} tokens" in (end.error or "")
        assert (await good.listener.finished()).reason == "length"  # type: ignore[attr-defined]


async def test_a_token_outside_the_vocabulary_is_an_error(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        end = await (await run(engine, sequence(prompt=[1, 10**6]))).finished()
        assert end.reason == "error"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_a_model_of_no_numbers_fails_its_request_and_not_the_process(tmp_path: Path, temperature: float) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", quantise=gguf.GGMLQuantizationType.F32)
    reader = gguf.GGUFReader(path, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight").data[:] = np.nan
    del reader
    async with running_engine(path) as engine:
        each = sequence(sampler=spec(temperature=temperature, seed=1))
        end = await (await run(engine, each)).finished()
        assert end.reason == "error"
        assert "damaged" in (end.error or "")


async def test_a_full_cache_fails_one_alone_and_requeues_the_youngest(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's answer 1 cannot be had from a cache with a part for each sequence: it is forced once for two
    sequences."""
    decode, refused = LlamaContext.decode, []

    def full_for_two(self: LlamaContext, batch: Any) -> int:
        if len(batch.starts) > 1 and len(refused) < 3:
            refused.append(batch.n)
            return 1
        return decode(self, batch)

    async with running_engine(tiny_model, n_slots=2) as engine:
        expected = [(await run(engine, sequence(prompt=prompt(seed), max_tokens=12))).text for seed in (1, 2)]
        monkeypatch.setattr(LlamaContext, "decode", full_for_two)
        both = [sequence(prompt=prompt(seed), max_tokens=12) for seed in (1, 2)]
        for each in both:
            engine.submit(each)
        for each, text in zip(both, expected, strict=True):
            assert (await each.listener.finished()).reason == "length"  # type: ignore[attr-defined]
            assert each.listener.text == text  # type: ignore[attr-defined]


# -- loading -----------------------------------------------------------------------------------------------------------


async def test_a_load_that_fails_says_why_and_ends_who_waits(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF and nothing else")
    options = EngineOptions(path=tmp_path / "m.gguf", n_ctx=256, n_slots=1, n_threads=1)
    engine = Engine("tiny", options, asyncio.get_running_loop())
    early = sequence()
    engine.submit(early)
    engine.start()
    with pytest.raises(LoadError):
        await asyncio.wrap_future(engine.loaded)
    assert (await early.listener.finished()).reason == "error"  # type: ignore[attr-defined]
    assert await asyncio.to_thread(engine.join, 20.0)
    with pytest.raises(LlamaError):
        _ = engine.model


async def test_progress_goes_from_nothing_to_all(tiny_model: Path) -> None:
    fractions: list[float] = []
    async with running_engine(tiny_model, on_progress=fractions.append):
        pass
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


async def test_close_while_loading_stops_the_load(tiny_model: Path) -> None:
    options = EngineOptions(path=tiny_model, n_ctx=256, n_slots=1, n_threads=1)
    engine = Engine("tiny", options, asyncio.get_running_loop())
    engine.close()
    engine.start()
    with pytest.raises(LoadError, match="stopped"):
        await asyncio.wrap_future(engine.loaded)
    assert await asyncio.to_thread(engine.join, 20.0)


async def test_a_waiting_task_that_is_cancelled_does_not_disturb_the_load(tiny_model: Path) -> None:
    options = EngineOptions(path=tiny_model, n_ctx=256, n_slots=1, n_threads=1)
    died: list[str] = []
    engine = Engine("tiny", options, asyncio.get_running_loop(), on_died=died.append)
    engine.start()
    waiting = asyncio.ensure_future(asyncio.wrap_future(engine.loaded))
    waiting.cancel()
    assert await asyncio.to_thread(engine.loaded.result, 20.0) is None
    assert (await (await run(engine, sequence())).finished()).reason == "length"
    engine.close()
    assert await asyncio.to_thread(engine.join, 20.0)
    assert died == []
