"""OpenAI's API by OpenAI's own client, on a node with the demo model; and what it answers to wrong requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.nodes import add_worker, build
from transports.node import Node

DEMO = Path(__file__).resolve().parents[3] / "data/models/demo/model.gguf"
HELLO = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]


@pytest.fixture(scope="module")
def demo_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    add_worker(home, "demo", DEMO, WORKER_CONCURRENCY=4, CTX_SIZE=1024, QUEUE_MAX_MSGS=2)
    return home


@pytest.fixture
async def node(demo_home: Path) -> AsyncIterator[Node]:
    async with build(demo_home, "demo", embedded_nats="off") as started:
        worker = await started.fleet.settled("demo")
        assert worker.state == "ready", worker.reason
        yield started


@pytest.fixture
async def client(node: Node) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{node.gateway_url}/v1", api_key="none") as client:
        yield client


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as client:
        yield client


async def test_a_chat_whole_and_streamed(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(model="demo", messages=HELLO, temperature=0)  # type: ignore[arg-type]
    text = reply.choices[0].message.content
    assert text is not None
    assert text.startswith("Hello!")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens > 1
    stream = await client.chat.completions.create(
        model="demo",
        messages=HELLO,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == reply.usage.completion_tokens


async def test_a_tool_is_called_and_its_result_read(client: openai.AsyncOpenAI) -> None:
    create = client.chat.completions.create
    reply = await create(model="demo", messages=ASKED, tools=[WEATHER], temperature=0)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})  # type: ignore[union-attr]
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 7}'}
    told = [*ASKED, message.model_dump(exclude_none=True), result]
    final = await create(model="demo", messages=told, tools=[WEATHER], temperature=0)
    assert "7" in (final.choices[0].message.content or "")
    stream = await create(model="demo", messages=ASKED, tools=[WEATHER], temperature=0, stream=True)
    deltas = [chunk.choices[0] async for chunk in stream if chunk.choices]
    (streamed,) = [each for delta in deltas for each in delta.delta.tool_calls or []]
    assert streamed.index == 0
    assert streamed.id
    assert streamed.function is not None
    assert streamed.function.arguments == call.function.arguments  # type: ignore[union-attr]
    assert deltas[-1].finish_reason == "tool_calls"


async def test_tool_choice(client: openai.AsyncOpenAI) -> None:
    create = client.chat.completions.create
    none = await create(model="demo", messages=ASKED, tools=[WEATHER], tool_choice="none", temperature=0)
    assert none.choices[0].message.tool_calls is None
    forced = await create(model="demo", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=200)  # type: ignore[arg-type]
    if forced.choices[0].finish_reason == "tool_calls":
        (call,) = forced.choices[0].message.tool_calls or []
        assert call.function.name == "get_weather"  # type: ignore[union-attr]
        assert isinstance(json.loads(call.function.arguments)["city"], str)  # type: ignore[union-attr]
    else:  # the argument had no end within max_tokens
        assert forced.choices[0].finish_reason == "length"


async def test_an_answer_in_a_schema(client: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["colour", "n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    reply = await client.chat.completions.create(model="demo", messages=HELLO, response_format=form, temperature=1)  # type: ignore[arg-type]
    told = json.loads(reply.choices[0].message.content or "")
    assert told["colour"] in ("red", "green")
    assert 1 <= told["n"] <= 9


async def test_reasoning_under_both_names(http: httpx2.AsyncClient) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "what is 3 plus 4?"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "temperature": 0,
    }
    message = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] != ""
    assert "<think>" not in message["content"]


async def test_a_text_is_completed(client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model="demo", prompt=["Hello", "infsvc is"], max_tokens=4, n=2, seed=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    again = await client.completions.create(model="demo", prompt=["Hello", "infsvc is"], max_tokens=4, n=2, seed=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in reply.choices]
    default = await client.completions.create(model="demo", prompt="Hello", extra_body={"ignore_eos": True})
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


async def test_a_prompt_of_token_ids(node: Node, client: openai.AsyncOpenAI) -> None:
    engine = node.fleet.get("demo").engine
    assert engine is not None
    ids = engine.model.tokenize("Hello", add_special=True, parse_special=True)
    create = client.completions.create
    by_ids = await create(model="demo", prompt=ids, max_tokens=4, temperature=0)
    by_text = await create(model="demo", prompt="Hello", max_tokens=4, temperature=0)
    assert by_ids.choices[0].text == by_text.choices[0].text


async def test_log_probabilities(client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="demo",
        messages=HELLO,  # type: ignore[arg-type]
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        max_tokens=4,
    )
    told = reply.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 4
    assert all(step.top_logprobs[0].logprob == step.logprob for step in told.content), "greedy takes the likeliest"
    assert "".join(step.token for step in told.content) == reply.choices[0].message.content


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo"]
    assert (await client.models.retrieve("demo")).id == "demo"
    with pytest.raises(openai.NotFoundError) as error:
        await client.models.retrieve("nope")
    assert error.value.code == "model_not_found"


LONG = [{"role": "user", "content": "x " * 2000}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param", "said"),
    [
        (CHAT, {}, 400, "bad_request", "messages", "Field required"),
        (CHAT, {"messages": []}, 400, "bad_request", "messages", "at least 1"),
        (CHAT, {"messages": "hi"}, 400, "bad_request", "messages", "list"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "bad_request", "messages.0.role", "'system'"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "bad_request", "messages.0.content", "required"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "unsupported",
            "messages.content.image_url",
            "only text parts",
        ),
        (CHAT, {"messages": HELLO, "input": "x"}, 400, "bad_request", "input", "no such field"),
        (CHAT, {"messages": HELLO, "nonsense": 1}, 400, "bad_request", "nonsense", "no such field"),
        (CHAT, {"messages": HELLO, "functions": []}, 400, "unsupported", "functions", "offer tools"),
        (CHAT, {"messages": HELLO, "audio": {}}, 400, "unsupported", "audio", "only text"),
        (CHAT, {"messages": HELLO, "n": 0}, 400, "bad_request", "n", "greater than or equal to 1"),
        (CHAT, {"messages": HELLO, "n": 9}, 400, "bad_request", "n", "less than or equal to 8"),
        (CHAT, {"messages": HELLO, "temperature": 3}, 400, "bad_request", "temperature", "less than or equal to 2"),
        (CHAT, {"messages": HELLO, "temperature": "0"}, 400, "bad_request", "temperature", "valid number"),
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "bad_request", "max_tokens", "greater than or equal to 1"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "bad_request", "top_logprobs", "needs logprobs"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "bad_request", "tool_choice", "no tools"),
        (
            CHAT,
            {"messages": HELLO, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            400,
            "bad_request",
            "tool_choice",
            "none of the tools",
        ),
        (
            CHAT,
            {"messages": HELLO, "tools": [WEATHER], "parallel_tool_calls": False},
            400,
            "unsupported",
            "parallel_tool_calls",
            "first call",
        ),
        (
            CHAT,
            {"messages": HELLO, "response_format": {"type": "json_schema"}},
            400,
            "bad_request",
            "response_format",
            "missing",
        ),
        (CHAT, {"messages": HELLO, "model": "nope"}, 404, "model_not_found", "model", "no model 'nope'"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "x " * 2000}]},
            400,
            "context_length_exceeded",
            "messages",
            "1024",
        ),
        (TEXT, {"prompt": ""}, 400, "bad_request", "prompt", "empty"),
        (TEXT, {"prompt": []}, 400, "bad_request", "prompt", "empty"),
        (TEXT, {"prompt": [999999]}, 400, "bad_request", "prompt", "no token"),
        (TEXT, {"prompt": "x", "suffix": "y"}, 400, "unsupported", "suffix", "fill-in"),
        (TEXT, {"prompt": "x", "echo": True}, 400, "unsupported", "echo", "raw"),
        (TEXT, {"prompt": "x", "best_of": 4}, 400, "unsupported", "best_of", "n"),
        (TEXT, {"prompt": ["x"] * 65}, 400, "bad_request", "prompt", "at most 64"),
        (TEXT, {"prompt": "x", "grammar": "root ::= nope"}, 422, "grammar_invalid", "grammar", "nope"),
        (TEXT, {"prompt": "x " * 2000}, 400, "context_length_exceeded", "prompt", "1024"),
    ],
)
async def test_a_wrong_request_is_told_what_is_wrong(
    http: httpx2.AsyncClient, path: str, body: dict[str, Any], status: int, code: str, param: str, said: str
) -> None:
    answer = await http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), error
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_inert_fields_and_nulls_pass(http: httpx2.AsyncClient) -> None:
    body = {"messages": HELLO, "user": "u", "metadata": {}, "store": True, "stop": None, "max_tokens": 2, "tools": None}
    answer = await http.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["finish_reason"] == "length"


async def test_a_full_queue_is_a_429_that_the_client_retries(node: Node) -> None:
    """Eight long answers against four slots and a queue of two: all are answered, some after a wait."""
    async with openai.AsyncOpenAI(base_url=f"{node.gateway_url}/v1", api_key="none", max_retries=20) as patient:
        replies = await asyncio.gather(
            *(
                patient.completions.create(model="demo", prompt="x", max_tokens=60, extra_body={"ignore_eos": True})
                for _ in range(8)
            )
        )
    assert all(reply.usage is not None and reply.usage.completion_tokens == 60 for reply in replies)
    rejected = [row for row in await node.logs.rows("demo", limit=50) if row["status"] == "rejected"]
    assert rejected
    assert "queue_full" in rejected[0]["error"]


async def test_a_client_that_leaves_ends_all_its_choices(node: Node, http: httpx2.AsyncClient) -> None:
    body = {"prompt": "x", "n": 3, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    async with http.stream("POST", TEXT, json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                break
        left = [generation.ended() for generation in node.service.live()]
        assert len(left) == 3
    for ended in left:
        await ended
    assert not list(node.service.live())
