"""What OpenAI's own client makes of errors here: its exceptions, by status, and another try when Retry-After says."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.llama import LlamaContext
from tests.nodes import ENDLESS, add_worker, build
from tests.tiny_models import write_tiny_model
from transports.node import Node

HELLO: Any = [{"role": "user", "content": "hello"}]
NOT: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` with one slot and room for one to wait, and `absent`, which nobody can load."""
    home = tmp_path_factory.mktemp("home")
    tiny = write_tiny_model(home / "tiny.gguf", n_ctx=65536)
    add_worker(home, "tiny", tiny, WORKER_CONCURRENCY=1, CTX_SIZE=65536, QUEUE_MAX_MSGS=1)
    add_worker(home, "absent", None)
    return home


@pytest.fixture
async def node(home: Path) -> AsyncIterator[Node]:
    async with build(home, "tiny", embedded_nats="off", api_keys="the-key") as started:
        worker = await started.fleet.settled("tiny")
        assert worker.state == "ready", worker.reason
        yield started


@dataclass
class Seen:
    """An answer that a client got: when, in seconds of the monotonic clock, and what it said of trying again."""

    at: float
    status: int
    retry_after_s: float | None


def client(node: Node, seen: list[Seen] | None = None, **settings: Any) -> openai.AsyncOpenAI:
    async def note(response: httpx.Response) -> None:
        after = response.headers.get("retry-after")
        assert seen is not None
        seen.append(Seen(time.monotonic(), response.status_code, None if after is None else float(after)))

    http = httpx.AsyncClient(trust_env=False, event_hooks={"response": [note] if seen is not None else []})
    given = {"api_key": "the-key", "max_retries": 0} | settings
    return openai.AsyncOpenAI(base_url=f"{node.gateway_url}/v1", http_client=http, **given)


async def fill(node: Node, asking: openai.AsyncOpenAI) -> list[asyncio.Task[Any]]:
    """Takes the slot and the place in the queue; the tasks hold them until they are cancelled."""
    long: Any = {"max_tokens": ENDLESS["max_tokens"], "extra_body": {"ignore_eos": True}}
    asked = []
    for n_live in (1, 2):
        asked.append(asyncio.create_task(asking.completions.create(model="tiny", prompt="x", **long)))
        while len(list(node.service.live())) < n_live:
            await asyncio.sleep(0.01)
    return asked


async def leave(asked: list[asyncio.Task[Any]]) -> None:
    for each in asked:
        each.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize(
    ("kind", "body", "code", "param"),
    [
        (openai.BadRequestError, {"messages": HELLO, "temperature": 9}, "bad_request", "temperature"),
        (openai.BadRequestError, {"messages": HELLO, "extra_body": {"nonsense": 1}}, "bad_request", "nonsense"),
        (openai.BadRequestError, {"messages": [{"role": "user", "content": "x" * 70_000}]}, "context_length_exceeded",
         "messages"),
        (openai.NotFoundError, {"messages": HELLO, "model": "nobody"}, "model_not_found", "model"),
        (openai.UnprocessableEntityError, {"messages": HELLO, "response_format": NOT}, "schema_invalid",
         "response_format"),
        (openai.InternalServerError, {"messages": HELLO, "model": "absent"}, "model_not_loaded", "model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_an_error_is_the_exception_of_its_status(
    node: Node, kind: type[openai.APIStatusError], body: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    async with client(node) as asking:
        with pytest.raises(kind) as error:
            await asking.chat.completions.create(**{"model": "tiny", "stream": stream} | body)
    assert (error.value.code, error.value.param) == (code, param)


async def test_a_wrong_key_is_an_authentication_error(node: Node) -> None:
    async with client(node, api_key="another") as asking:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            await asking.models.list()


async def test_a_full_queue_is_a_rate_limit_and_is_tried_again_when_it_says(node: Node) -> None:
    seen: list[Seen] = []
    async with client(node) as others, client(node, seen, max_retries=5) as patient:
        asked = await fill(node, others)
        with pytest.raises(openai.RateLimitError) as refused:
            await others.chat.completions.create(model="tiny", messages=HELLO)
        assert (refused.value.code, refused.value.response.headers["x-queue-depth"]) == ("queue_full", "1")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        waiting = asyncio.create_task(patient.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1))
        while not seen:
            await asyncio.sleep(0.01)
        await leave(asked)
        reply = await waiting
    assert reply.choices[0].finish_reason == "length"
    first, *_, last = seen
    assert (first.status, last.status) == (429, 200)
    assert first.retry_after_s is not None
    # By itself the client would have come back within half a second.
    assert seen[1].at - first.at >= first.retry_after_s >= 1


async def test_an_engine_that_dies_is_raised_in_the_middle_of_a_stream(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies, decode = threading.Event(), LlamaContext.decode

    def failing(self: LlamaContext, *args: Any) -> int:
        if dies.is_set():
            raise RuntimeError("forced")
        return decode(self, *args)

    monkeypatch.setattr(LlamaContext, "decode", failing)
    async with client(node) as asking:
        stream = await asking.completions.create(
            model="tiny", prompt="x", max_tokens=60_000, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(stream)
        dies.set()
        with pytest.raises(openai.APIError, match="forced") as error:
            _ = [chunk async for chunk in stream]
    assert error.value.code == "engine_failed"
