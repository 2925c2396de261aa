"""The chat of `alpha` talks to models that run on `beta`: over real nodes, one broker, as the screen asks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.service import InferenceRequest
from infsvc.errors import ContextLengthExceeded, ModelNotLoaded, NodeLost, QueueFull, RequestError
from infsvc.types import Message, Params
from transports.far_chat import FarGeneration
from transports.node import Node

from .conftest import Pair
from .test_forwarding import MODEL, cancelled, runs
from .test_registry import says, until


@pytest.fixture
async def alpha(pair: Pair) -> Node:
    """Once it has heard of beta's models."""
    await until(pair.alpha, says("beta", MODEL, "online"))
    await until(pair.alpha, says("beta", "tiny", "online"))
    return pair.alpha


def request(text: str = "hello", **params: Any) -> InferenceRequest:
    asked = Params(**({"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params))
    return InferenceRequest(
        model=MODEL, messages=(Message(role="user", content=text),), params=asked, source="chat", req_id="far"
    )


def endless(text: str = "hello") -> InferenceRequest:
    return request(text, max_tokens=10_000)


async def first_chunk(generation: FarGeneration) -> None:
    async for _ in generation:
        return


async def failure(generation: FarGeneration) -> RequestError:
    async with asyncio.timeout(20):
        try:
            async for _ in generation:
                pass
        except RequestError as error:
            return error
    raise AssertionError("it was answered")


async def test_the_answer_is_the_one_that_the_owner_would_give_its_own_chat(alpha: Node, pair: Pair) -> None:
    async with await pair.beta.service.submit(request()) as own:
        there = await own.result()
    async with alpha.far_chat.submit(request(), "beta") as generation:
        chunks = [chunk async for chunk in generation]
    reply = generation.reply
    assert reply is not None
    assert (reply.text, reply.finish_reason) == (there.text, "length")
    assert "".join(chunk.text for chunk in chunks) == there.text
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert (generation.tokens_in, generation.tokens_out) == (there.tokens_in, 8)
    assert generation.ttft_ms is not None
    assert generation.tokens_per_s > 0
    await pair.beta.fleet.get(MODEL).audit.flush()
    row = (await pair.beta.logs.rows(MODEL, limit=10))[0]
    assert (row["req_id"], row["status"], row["response_text"]) == ("far", "ok", there.text)


async def test_it_comes_while_it_is_decoded_and_a_stop_reaches_the_owner(alpha: Node, pair: Pair) -> None:
    async with alpha.far_chat.submit(endless(), "beta") as generation:
        await first_chunk(generation)
        await runs("far", pair.beta)
        generation.cancel()
        async for _ in generation:
            pass
        assert generation.reply is not None
        assert generation.reply.finish_reason == "cancelled"
        assert generation.reply.text
    await cancelled(pair.beta)


async def test_leaving_early_stops_it_too_and_a_stop_before_the_first_word(alpha: Node, pair: Pair) -> None:
    async with alpha.far_chat.submit(endless(), "beta") as generation:
        await runs("far", pair.beta)
    await cancelled(pair.beta)
    async with alpha.far_chat.submit(endless(), "beta") as never:
        never.cancel()
        assert [chunk async for chunk in never] == []
        assert never.reply is not None
        assert never.reply.finish_reason == "cancelled"
    async with asyncio.timeout(5):
        while alpha.forwarder._open or alpha.forwarder._closing:
            await asyncio.sleep(0.01)
    assert generation.reply is not None


async def test_a_node_that_dies_is_lost_in_words(alpha: Node, pair: Pair) -> None:
    async with alpha.far_chat.submit(endless(), "beta") as generation:
        await first_chunk(generation)
        await pair.beta.bus._drop()  # as a cut cable: nothing more is said
        lost = await failure(generation)
    assert isinstance(lost, NodeLost)
    assert str(lost).startswith("beta, which serves the model, ")
    assert generation.reply is not None
    assert generation.reply.text
    await cancelled(pair.beta)


async def test_a_node_that_drains_ends_it(alpha: Node, pair: Pair) -> None:
    async with alpha.far_chat.submit(endless(), "beta") as generation:
        await first_chunk(generation)
        unloading = asyncio.create_task(pair.beta.unload(MODEL))
        await until(alpha, says("beta", MODEL, "draining"))
        with pytest.raises(ModelNotLoaded, match="draining"):
            alpha.far_chat.submit(request(), "beta")
        generation.cancel()
        await unloading
    await until(alpha, says("beta", MODEL, "offline"))
    with pytest.raises(ModelNotLoaded, match="offline"):
        alpha.far_chat.submit(request(), "beta")


async def test_refusals_are_typed(alpha: Node, pair: Pair) -> None:
    long = await failure(alpha.far_chat.submit(request("x y " * 20_000), "beta"))
    assert isinstance(long, ContextLengthExceeded)
    assert "16384" in str(long).replace(",", "")
    with pytest.raises(NodeLost, match="gamma"):
        alpha.far_chat.submit(request(), "gamma")
    n = 4 + 16  # its slots, and its queue
    held = [await pair.beta.service.submit(endless()) for _ in range(n)]
    full = await failure(alpha.far_chat.submit(request(), "beta"))
    assert isinstance(full, QueueFull)
    assert full.n_waiting == 16
    assert full.retry_after_s >= 1
    for generation in held:
        generation.cancel()


async def test_only_what_generates_text_is_offered(alpha: Node, pair: Pair) -> None:
    assert [(each.model_name, each.node) for each in alpha.far_chat.models()] == [(MODEL, "beta"), ("tiny", "beta")]
    roster = alpha.registry.roster
    document = pair.beta.fleet.get("tiny").health()
    roster.hear_health(
        document.model_copy(update={"model_name": "vectors", "capabilities": ["embeddings"]}).model_dump_json().encode()
    )
    earlier = {"start_time": "2020-01-01T00:00:00.000Z", "status": "offline"}
    roster.hear_health(document.model_copy(update=earlier).model_dump_json().encode())
    assert [(each.model_name, each.status) for each in alpha.far_chat.models()] == [
        (MODEL, "online"),
        ("tiny", "online"),
    ]
