"""OpenAI's API by a second client that people build on: LangChain, on a node with the demo model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from tests.nodes import add_worker, build
from transports.node import Node

DEMO = Path(__file__).resolve().parents[3] / "data/models/demo/model.gguf"
ASKED = "What is the weather in Oslo?"


@tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    return f'{{"city": "{city}", "celsius": 7}}'


class Colour(BaseModel):
    """A colour and a number."""

    colour: Literal["red", "green"]
    n: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    add_worker(home, "demo", DEMO, WORKER_CONCURRENCY=2, CTX_SIZE=1024, QUEUE_MAX_MSGS=2)
    return home


@pytest.fixture
async def node(demo_home: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    # LangChain would send its traces to whoever these name.
    for name in ("LANGSMITH_TRACING", "LANGCHAIN_TRACING_V2"):
        monkeypatch.delenv(name, raising=False)
    async with build(demo_home, "demo", embedded_nats="off") as started:
        worker = await started.fleet.settled("demo")
        assert worker.state == "ready", worker.reason
        yield started


@pytest.fixture
async def connect(node: Node) -> AsyncIterator[dict[str, Any]]:
    """How to reach the node. LangChain's own connections would stay open beyond the test's loop."""
    async with openai.DefaultAsyncHttpxClient() as http:
        yield {"base_url": f"{node.gateway_url}/v1", "api_key": "none", "http_async_client": http}


def chat(connect: dict[str, Any], **settings: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"model": "demo", "temperature": 0, "max_retries": 0} | connect | settings
    return ChatOpenAI(**given)


async def test_a_chat_whole_and_streamed(connect: dict[str, Any]) -> None:
    model = chat(connect, stream_usage=True)
    turns = [SystemMessage("You are brief."), HumanMessage("hello")]
    reply = await model.ainvoke(turns)
    assert str(reply.content).startswith("Hello")
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata is not None
    whole = AIMessageChunk(content="")
    n_pieces = 0
    async for piece in model.astream(turns):
        assert isinstance(piece, AIMessageChunk)
        n_pieces += 1
        whole += piece  # type: ignore[assignment]
    assert n_pieces > 3
    assert whole.content == reply.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == reply.usage_metadata["output_tokens"]


async def test_a_tool_is_called_and_its_result_read(connect: dict[str, Any]) -> None:
    model = chat(connect).bind_tools([get_weather])
    reply = await model.ainvoke(ASKED)
    (call,) = reply.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Oslo"})
    assert reply.response_metadata["finish_reason"] == "tool_calls"
    result = await get_weather.ainvoke(call)
    assert isinstance(result, ToolMessage)
    final = await model.ainvoke([HumanMessage(ASKED), reply, result])
    assert "7" in str(final.content)
    pieces = [piece async for piece in model.astream(ASKED)]
    streamed = pieces[0]
    for piece in pieces[1:]:
        streamed += piece
    assert [each["args"] for each in streamed.tool_calls] == [{"city": "Oslo"}]
    forced = await chat(connect).bind_tools([get_weather], tool_choice="none").ainvoke(ASKED)
    assert forced.tool_calls == []


async def test_an_answer_in_a_schema(connect: dict[str, Any]) -> None:
    told = await chat(connect, temperature=1).with_structured_output(Colour, method="json_schema").ainvoke("hello")
    assert isinstance(told, Colour)


async def test_embeddings(connect: dict[str, Any]) -> None:
    # Its own tokeniser is OpenAI's: it would count and cut by a vocabulary that is not the model's.
    embeddings = OpenAIEmbeddings(model="demo", check_embedding_ctx_length=False, **connect)
    one, two, again = await embeddings.aembed_documents(["a text", "another", "a text"])
    assert math.isclose(sum(value * value for value in one), 1.0, rel_tol=1e-3)
    assert (
        sum(a * b for a, b in zip(one, again, strict=True)) > 0.999 > sum(a * b for a, b in zip(one, two, strict=True))
    )
    asked = await embeddings.aembed_query("a text")
    assert sum(a * b for a, b in zip(one, asked, strict=True)) > 0.999


async def test_errors_are_openais(connect: dict[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await chat(connect, model="nope").ainvoke("hello")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await chat(connect).ainvoke("x " * 2000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        await chat(connect, extra_body={"nonsense": 1}).ainvoke("hello")


async def test_a_full_queue_is_waited_for(connect: dict[str, Any]) -> None:
    """Six answers against two slots and a queue of two: with no retry some are refused, with retries none is."""
    long = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    hasty, patient = chat(connect, **long), chat(connect, max_retries=20, **long)
    told = await asyncio.gather(*(hasty.ainvoke("x") for _ in range(6)), return_exceptions=True)
    assert any(isinstance(each, openai.RateLimitError) for each in told)
    replies = await asyncio.gather(*(patient.ainvoke("x") for _ in range(6)))
    assert [reply.response_metadata["finish_reason"] for reply in replies] == ["length"] * 6
