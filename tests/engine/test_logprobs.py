"""Log-probabilities against a log-softmax of their own, and a bias against what it must force or ban."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engine.llama import Batch, LlamaContext, LlamaModel
from engine.logprobs import MAX_TOP, step_logprobs
from engine.sequence import TokenEmitted
from engine.service import InferenceRequest
from infsvc.errors import BadRequest
from infsvc.types import Params
from tests.engine.parts import Heard, run, running_engine, running_node, sequence, spec, worker_settings
from tests.tiny_models import write_tiny_model

PROMPT = [10, 20, 30, 40, 50]


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    values = logits.astype(np.float64)
    shifted = values - values.max()
    return shifted - np.log(np.exp(shifted).sum())


def spelled(token: int) -> bytes:
    return b"t%d" % token


@pytest.mark.parametrize("n_top", [0, 1, 5, 20])
def test_they_are_a_log_softmax(n_top: int) -> None:
    logits = np.random.default_rng(n_top).standard_normal(1000, dtype=np.float32) * 5
    expected = log_softmax(logits)
    found = step_logprobs(logits, 17, n_top=n_top, piece=spelled)
    assert (found.drawn.token, found.drawn.piece) == (17, b"t17")
    assert found.drawn.logprob == pytest.approx(expected[17], abs=1e-12)
    order = np.argsort(-expected, kind="stable")[:n_top]
    assert [each.token for each in found.top] == order.tolist()
    assert [each.logprob for each in found.top] == pytest.approx(expected[order].tolist(), abs=1e-12)


def test_equals_come_by_id_and_extremes_stay_numbers() -> None:
    found = step_logprobs(np.array([1, 3, 3, 3, -np.inf], dtype=np.float32), 4, n_top=2, piece=spelled)
    assert [each.token for each in found.top] == [1, 2]
    assert found.drawn.logprob == -np.inf
    huge = step_logprobs(np.array([3e38, 0, 0], dtype=np.float32), 0, n_top=20, piece=spelled)
    assert len(huge.top) == 3
    assert huge.drawn.logprob == 0


def expected_steps(path: Path, answer: list[int]) -> list[npt.NDArray[np.float64]]:
    """The log-softmax at each step, from llama.cpp alone."""
    model = LlamaModel(path)
    context = LlamaContext(model, n_ctx=256, n_slots=1, n_batch=64, n_threads=1)
    batch, steps = Batch(64, 1), []
    tokens, start = PROMPT, 0
    for drawn in answer:
        batch.clear()
        position = batch.add(tokens, start=start, slot=0, draws=True)
        context.decode(batch)
        steps.append(log_softmax(context.logits(position)))
        start += len(tokens)
        tokens = [drawn]
    context.close()
    model.close()
    return steps


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.5, "seed": 3, "presence_penalty": 2.0, "logit_bias": {"7": 50}}]
)
async def test_the_engine_tells_the_models_own(tiny_model: Path, params: dict[str, object]) -> None:
    """Neither a bias nor a penalty nor a temperature is in them."""
    async with running_engine(tiny_model) as engine:
        each = sequence(prompt=PROMPT, sampler=spec(**params), max_tokens=10, n_logprobs=5)
        heard = await run(engine, each)
        beside = await run(engine, sequence(prompt=PROMPT, sampler=spec(**params), max_tokens=10))
    told = [event.logprobs for event in heard.events if isinstance(event, TokenEmitted)]
    assert all(step is not None for step in told)
    steps = [step for step in told if step is not None]
    expected = expected_steps(tiny_model, [step.drawn.token for step in steps])
    for step, row in zip(steps, expected, strict=True):
        assert step.drawn.logprob == pytest.approx(row[step.drawn.token], abs=1e-3)
        assert [top.logprob for top in step.top] == pytest.approx(np.sort(row)[::-1][:5].tolist(), abs=1e-3)
        if not params:
            assert step.drawn == step.top[0]
    # Asking for them changes nothing, and without asking there are none.
    assert beside.text == heard.text
    assert all(event.logprobs is None for event in beside.events if isinstance(event, TokenEmitted))


async def test_a_token_that_ends_the_answer_has_none(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    async with running_engine(path) as engine:
        end = int(engine.model.eog[0])
        each = sequence(sampler=spec(logit_bias={str(end): 100}), ignore_eos=False, n_logprobs=0)
        heard = await run(engine, each)
    assert (await heard.finished()).reason == "stop"
    assert [event.logprobs for event in heard.events if isinstance(event, TokenEmitted)] == [None]


async def test_a_bias_forces_and_bans(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        forced = await run(engine, sequence(sampler=spec(logit_bias={str(ord("a")): 100}), max_tokens=12))
        assert forced.text == "a" * 12
        free = sequence(max_tokens=1)
        await run(engine, free)
        banned = sequence(max_tokens=1, sampler=spec(logit_bias={str(free.last_token): -100}))
        await run(engine, banned)
        assert banned.last_token != free.last_token
        # Drawn at random too, and with a penalty behind it.
        wild = spec(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=1, logit_bias={str(ord("b")): 100})
        assert (await run(engine, sequence(sampler=wild, max_tokens=12))).text == "b" * 12


async def test_a_bias_on_a_token_that_is_none_ends_that_sequence_alone(tiny_model: Path) -> None:
    async with running_engine(tiny_model) as engine:
        heard = Heard()
        beside = sequence(heard, max_tokens=30)
        engine.submit(beside)
        end = await (await run(engine, sequence(sampler=spec(logit_bias={"259": 1})))).finished()
        assert end.reason == "error"
        assert "token 259, and the vocabulary has 259" in (end.error or "")
        assert (await heard.finished()).reason == "length"


async def test_the_service_refuses_what_the_vocabulary_has_not(tmp_path: Path, tiny_model: Path) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(tiny_model.read_bytes())
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")

        def request(n_logprobs: int | None = None, **params: object) -> InferenceRequest:
            given = Params.model_validate({"max_tokens": 6, "temperature": 0.0} | params)
            return InferenceRequest(model="a", input="hi", raw=True, params=given, n_logprobs=n_logprobs)

        with pytest.raises(BadRequest, match="token 999") as refused:
            await node.service.submit(request(logit_bias={"999": 1}))
        assert refused.value.param == "params.logit_bias"
        for n in (-1, MAX_TOP + 1):
            with pytest.raises(BadRequest, match="at most 20"):
                await node.service.submit(request(n))
        async with await node.service.submit(request(3, ignore_eos=True)) as generation:
            chunks = [chunk async for chunk in generation]
            await generation.result()
        assert len(generation.logprobs) == 6
        assert all(len(step.top) == 3 for step in generation.logprobs)
        shown = [step for chunk in chunks for step in chunk.logprobs]
        assert shown == generation.logprobs[: len(shown)]
        assert (await node.service.complete(request(logit_bias={str(ord("z")): 100}))).text == "zzzzzz"
