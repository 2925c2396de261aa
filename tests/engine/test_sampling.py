"""The sampler does what llama.cpp's does: penalties are compared with its own, seeds with themselves."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import pytest

from engine.llama import Batch, LlamaContext, LlamaModel, SamplerChain
from engine.penalties import Penalties
from engine.sampling import SamplerSpec
from infsvc.types import Params
from tests.engine.parts import spec


def test_defaults_are_the_contracts() -> None:
    settled = SamplerSpec.from_params(Params(), n_ctx=1024)
    assert (settled.temperature, settled.top_p, settled.top_k, settled.min_p) == (0.7, 0.95, 40, 0.05)
    assert not settled.greedy
    assert not settled.penalises


def test_a_seed_is_drawn_where_none_is_given() -> None:
    seeds = {SamplerSpec.from_params(Params(), n_ctx=64).seed for _ in range(8)}
    assert len(seeds) > 1
    assert SamplerSpec.from_params(Params(seed=5), n_ctx=64).seed == 5


def test_the_largest_seed_is_not_llama_cpps_word_for_random() -> None:
    assert SamplerSpec.from_params(Params(seed=2**32 - 1), n_ctx=64).seed != llama_cpp.LLAMA_DEFAULT_SEED


@pytest.mark.parametrize(("asked", "settled"), [(-1, 512), (0, 0), (64, 64), (9999, 512)])
def test_repeat_last_n_is_bounded_by_the_context(asked: int, settled: int) -> None:
    assert SamplerSpec.from_params(Params(repeat_last_n=asked), n_ctx=512).repeat_last_n == settled


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-12])
def test_a_temperature_of_nothing_is_greedy(temperature: float) -> None:
    assert spec(temperature=temperature).greedy


def test_penalties_need_a_window_and_a_strength() -> None:
    assert not spec(repeat_penalty=1.3, repeat_last_n=0).penalises
    assert spec(repeat_penalty=1.3).penalises
    assert spec(presence_penalty=0.1).penalises
    assert spec(frequency_penalty=-0.1).penalises


def theirs(settled: SamplerSpec, accepted: list[int], logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What llama.cpp's own penalties sampler makes of the logits."""
    sampler = llama_cpp.llama_sampler_init_penalties(
        len(logits), settled.repeat_last_n, settled.repeat_penalty, settled.frequency_penalty, settled.presence_penalty
    )
    for token in accepted:
        llama_cpp.llama_sampler_accept(sampler, token)
    data = (llama_cpp.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        data[token].id, data[token].logit, data[token].p = token, float(logit), 0.0
    array = llama_cpp.llama_token_data_array(data=data, size=len(logits), selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
    found = np.empty_like(logits)
    for entry in data:
        found[entry.id] = entry.logit
    llama_cpp.llama_sampler_free(sampler)
    return found


def test_penalties_equal_llama_cpps() -> None:
    chance = random.Random(20260101)
    numbers = np.random.default_rng(20260101)
    for _ in range(60):
        settled = spec(
            repeat_penalty=chance.choice([0.5, 1.0, 1.1, 1.7]),
            frequency_penalty=chance.choice([0.0, 0.3, -0.5, 2.0]),
            presence_penalty=chance.choice([0.0, 0.4, -1.0]),
            repeat_last_n=chance.choice([1, 2, 5, 16, 64]),
        )
        if not settled.penalises:
            continue
        accepted = [chance.randrange(24) for _ in range(chance.randint(0, 90))]
        logits = numbers.normal(0, 4, 40).astype(np.float32)
        logits[3] = 0.0
        expected = theirs(settled, accepted, logits)
        ours = Penalties(settled)
        for token in accepted:
            ours.accept(token)
        found = logits.copy()
        ours.apply(found)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


def test_a_token_that_left_the_window_costs_nothing() -> None:
    penalties = Penalties(spec(presence_penalty=1.0, repeat_last_n=2))
    for token in (0, 1, 2):
        penalties.accept(token)
    logits = np.zeros(4, dtype=np.float32)
    penalties.apply(logits)
    assert logits.tolist() == [0.0, -1.0, -1.0, 0.0]


@pytest.fixture
def drawn(tiny_model: Path) -> object:
    """A function that draws `n` tokens from the same logits with a spec."""
    model = LlamaModel(tiny_model)
    context = LlamaContext(model, n_ctx=256, n_slots=1, n_batch=64, n_threads=1)
    batch = Batch(64, 1)
    position = batch.add([5, 6, 7], start=0, slot=0, draws=True)
    context.decode(batch)

    def draw(n: int = 20, **params: object) -> list[int]:
        chain = SamplerChain(spec(**params))
        tokens = [chain.draw(context, position) for _ in range(n)]
        chain.close()
        return tokens

    def best() -> int:
        return int(context.logits(position).argmax())

    draw.best = best  # type: ignore[attr-defined]
    yield draw
    context.close()
    model.close()


def test_the_same_seed_draws_the_same_tokens(drawn) -> None:  # type: ignore[no-untyped-def]
    wild = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert drawn(seed=7, **wild) == drawn(seed=7, **wild)
    assert drawn(seed=7, **wild) != drawn(seed=8, **wild)
    assert len(set(drawn(seed=7, **wild))) > 5
    assert drawn(seed=2**32 - 1, **wild) == drawn(seed=2**32 - 1, **wild)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-5}])
def test_each_filter_alone_can_leave_one_token(drawn, narrow: dict[str, float]) -> None:  # type: ignore[no-untyped-def]
    wild = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 3}
    assert set(drawn(**wild | narrow)) == {drawn.best()}


def test_the_most_extreme_parameters_that_are_allowed_do_not_abort(drawn) -> None:  # type: ignore[no-untyped-def]
    for extreme in (
        {"temperature": 1.1e-6},
        {"top_k": 2**31 - 1},
        {"top_p": 1e-300, "min_p": 1e-300},
        {"temperature": 2.0},
    ):
        assert len(drawn(n=3, **{"seed": 1, "temperature": 1.0} | extreme)) == 3
