"""Requests in: the reply is the answer, streams keep order, every refusal is an answer, cancel reaches its owner."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import NoRespondersError

from engine.service import InferenceRequest
from infsvc.errors import ContextLengthExceeded, Draining, ModelNotLoaded, QueueFull, RequestError
from infsvc.events import EventBus
from infsvc.home import Home
from infsvc.types import ModelState
from transports.nats import front_door as module

from .conftest import PATIENCE_S, Doors, asked, broker_is, client_of, told
from .fakes import FakeGeneration, FakeWorker

SUBJECT = "inference.request.demo"


@asynccontextmanager
async def listening(client: Client, subject: str) -> AsyncIterator[Subscription]:
    subscription = await client.subscribe(subject)
    await client.flush()
    yield subscription
    await subscription.unsubscribe()


def texts(*pieces: str, **more: Any) -> Callable[[InferenceRequest], FakeGeneration]:
    return lambda request: FakeGeneration(request, list(pieces), **more)


async def test_the_reply_is_the_answer(doors: Doors, client: Client) -> None:
    reply = await asked(client, SUBJECT, {"req_id": "r1", "trace_id": "t1", "input": "hello"})
    assert reply == {
        "req_id": "r1",
        "text": "echo: hello",
        "tokens_in": 1,
        "tokens_out": 1,
        "tokens_cached": 0,
        "finish_reason": "stop",
        "duration_ms": 1,
        "ms": 1,
    }
    request = doors.service.requests[0]
    assert (request.model, request.source, request.trace_id) == ("demo", "nats", "t1")


async def test_a_request_without_an_id_gets_one(doors: Doors, client: Client) -> None:
    reply = await asked(client, SUBJECT, {"input": "hello"}, headers={"X-Trace-ID": "from the header"})
    assert reply["req_id"] == doors.service.requests[0].req_id
    assert doors.service.requests[0].trace_id == "from the header"


async def test_many_at_once_each_get_their_own(doors: Doors, client: Client) -> None:
    answers = await asyncio.gather(*(asked(client, SUBJECT, {"input": f"{n}"}) for n in range(200)))
    assert [answer["text"] for answer in answers] == [f"echo: {n}" for n in range(200)]
    assert doors.front_door.n_running == 0


async def test_a_stream_comes_in_order_and_ends_with_the_reply(doors: Doors, client: Client) -> None:
    pieces = [f"{n} " for n in range(300)]
    doors.service.script = texts(*pieces[:5], "", *pieces[5:])
    async with listening(client, "answers.here") as answers:
        body = json.dumps({"req_id": "s", "input": "count", "stream": True}).encode()
        await client.publish(SUBJECT, body, reply="answers.here")
        got = [await told(answers)]
        while not got[-1].get("done"):
            got.append(await told(answers))
    *chunks, final = got
    assert [chunk["text"] for chunk in chunks] == pieces
    assert all(chunk.keys() == {"req_id", "index", "text"} for chunk in chunks)
    indexes = [chunk["index"] for chunk in chunks]
    assert indexes == sorted(set(indexes))
    assert final["text"] == "".join(pieces)
    assert final["finish_reason"] == "stop"


async def test_a_stream_stops_when_its_reader_leaves(doors: Doors, url: str) -> None:
    doors.service.script = lambda request: FakeGeneration(request, ["x"] * 1_000_000)
    async with client_of(url) as reader, listening(reader, "answers.here") as answers:
        await reader.publish(SUBJECT, b'{"input": "count", "stream": true}', reply="answers.here")
        assert (await told(answers))["text"] == "x"
    async with client_of(url) as client:
        await until(lambda: any(each.cancelled for each in doors.service.live.values()), client)


async def test_reply_to_gets_a_copy_of_the_final_answer_only(doors: Doors, client: Client) -> None:
    doors.service.script = texts("a", "b")
    async with listening(client, "copies") as copies, listening(client, "answers.here") as answers:
        body = {"req_id": "c", "input": "x", "stream": True, "reply_to": "copies"}
        await client.publish(SUBJECT, json.dumps(body).encode(), reply="answers.here")
        got = [await told(answers) for _ in range(3)]
        assert await told(copies) == got[-1]
        assert got[-1]["text"] == "ab"
        assert copies.pending_msgs == 0


async def test_without_a_reply_subject_the_answer_goes_to_reply_to(doors: Doors, client: Client) -> None:
    async with listening(client, "my.answers") as answers:
        await client.publish(SUBJECT, b'{"input": "x", "reply_to": "my.answers"}')
        assert (await told(answers))["text"] == "echo: x"


async def test_without_both_the_answer_goes_to_the_req_ids_subject(doors: Doors, client: Client) -> None:
    async with listening(client, "inference.reply.>") as answers:
        await client.publish(SUBJECT, b'{"input": "x", "req_id": "a.b"}')
        message = await answers.next_msg(timeout=PATIENCE_S)
        assert message.subject == "inference.reply.a.b"
        await client.publish(SUBJECT, b'{"input": 5, "req_id": "bad"}')
        message = await answers.next_msg(timeout=PATIENCE_S)
        assert message.subject == "inference.reply.bad"
        assert json.loads(message.data)["status"] == 400
        await client.publish(SUBJECT, b'{"input": "x", "req_id": "fallback", "reply_to": "no *"}')
        message = await answers.next_msg(timeout=PATIENCE_S)
        assert message.subject == "inference.reply.fallback"
        assert json.loads(message.data)["param"] == "reply_to"


async def test_what_nobody_can_be_told_about_is_counted_and_dropped(
    doors: Doors, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    for data in (b'{"input": "x"}', b"nonsense", b'{"input": "x", "req_id": "a b"}'):
        await client.publish(SUBJECT, data)
    await asked(client, SUBJECT, {"input": "behind them"})
    assert doors.front_door.n_dropped == 3
    assert len(doors.service.requests) == 1
    assert [getattr(record, "code", "") for record in caplog.records].count("nats.dropped") == 3


@pytest.mark.parametrize(
    ("data", "status", "code", "param"),
    [
        (b"{", 400, "bad_request", None),
        (b"\xff", 400, "bad_request", None),
        (b"[]", 400, "bad_request", None),
        (b"[" * 200_000, 400, "bad_request", None),
        (b'{"req_id": "r"}', 400, "bad_request", "input"),
        (b'{"req_id": "r", "input": "x", "params": {"max_tokens": 0}}', 400, "bad_request", "params.max_tokens"),
        (b'{"req_id": "r", "input": "x", "model": "other"}', 400, "bad_request", "model"),
        (b'{"req_id": "r", "input": "x", "reply_to": "a.>"}', 400, "bad_request", "reply_to"),
        (b'{"input": "x", "reply_to": "a.b"}', 400, "bad_request", "req_id"),
    ],
    ids=range(9),
)
async def test_malformed(doors: Doors, client: Client, data: bytes, status: int, code: str, param: str | None) -> None:
    answer = await asked(client, SUBJECT, data)
    assert (answer["status"], answer["code"], answer.get("param")) == (status, code, param)
    assert answer["req_id"] == ("r" if b'"r"' in data else None)
    assert answer["error"]
    assert not doors.service.requests


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ModelNotLoaded("demo", "loading"), 503, "model_not_loaded"),
        (QueueFull(model="demo", n_waiting=9, capacity=9, retry_after_s=3), 429, "queue_full"),
        (ContextLengthExceeded(n_prompt_tokens=9, n_ctx=8), 400, "context_length_exceeded"),
        (Draining("the node is shutting down"), 503, "draining"),
    ],
)
async def test_refusals_of_the_service(
    doors: Doors, client: Client, error: RequestError, status: int, code: str
) -> None:
    def refuse(request: InferenceRequest) -> FakeGeneration:
        raise error

    doors.service.script = refuse
    answer = await asked(client, SUBJECT, {"input": "x"})
    assert answer == error.native(answer["req_id"])
    assert (answer["status"], answer["code"]) == (status, code)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_is_an_answer(doors: Doors, client: Client, stream: bool) -> None:
    doors.service.script = texts(dies=True)
    answer = await asked(client, SUBJECT, {"input": "x", "stream": stream})
    assert (answer["error"], answer["code"], answer["status"]) == ("the engine died", "engine_failed", 500)


async def test_a_fault_of_the_node_is_an_answer_too(
    doors: Doors, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(request: InferenceRequest) -> FakeGeneration:
        raise KeyError("bug")

    doors.service.script = break_down
    answer = await asked(client, SUBJECT, {"input": "x"})
    assert (answer["code"], answer["error"]) == ("engine_failed", "the node failed: KeyError")
    assert "a request broke" in caplog.text


async def test_an_answer_over_the_brokers_limit_says_so(doors: Doors, client: Client) -> None:
    doors.service.script = texts("x" * (8 * 2**20))
    answer = await asked(client, SUBJECT, {"req_id": "r", "input": "x"})
    assert (answer["req_id"], answer["code"]) == ("r", "answer_too_large")


async def test_a_large_request_and_answer_pass(doors: Doors, client: Client) -> None:
    text = "x" * (4 * 2**20)
    assert (await asked(client, SUBJECT, {"input": text}))["text"] == f"echo: {text}"


async def test_a_flood_is_refused_at_the_door(doors: Doors, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE_TASKS", -doors.worker.settings.queue_max_msgs - doors.worker.n_slots + 1)
    doors.service.script = texts(hold=True)
    first = asyncio.create_task(asked(client, SUBJECT, {"input": "x"}))
    await doors.service.submitted.wait()
    assert (await asked(client, SUBJECT, {"input": "y"}))["code"] == "queue_full"
    next(iter(doors.service.live.values())).let_go()
    assert (await first)["finish_reason"] == "stop"


async def test_cancel_reaches_the_owner(doors: Doors, client: Client) -> None:
    doors.service.script = texts(hold=True)
    answer = asyncio.create_task(asked(client, SUBJECT, {"req_id": "long", "input": "x"}))
    await doors.service.submitted.wait()
    assert await asked(client, "inference.cancel", {"req_id": "long"}) == {"req_id": "long", "cancelled": True}
    assert (await answer)["finish_reason"] == "cancelled"


async def test_cancel_of_what_is_not_here_is_silence(doors: Doors, client: Client) -> None:
    async with listening(client, "replies") as replies:
        await client.publish("inference.cancel", b'{"req_id": "elsewhere"}', reply="replies")
        # The second is answered behind the first: had that been answered, it would come first.
        await client.publish("inference.cancel", b'{"req_id": 5}', reply="replies")
        assert (await told(replies))["param"] == "req_id"


async def test_subscriptions_follow_the_models(url: str, home: Home, events: EventBus) -> None:
    worker = FakeWorker("demo", events)
    worker.asked, worker.state = False, ModelState.ON_DISK
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        with pytest.raises(NoRespondersError):
            await client.request(SUBJECT, b'{"input": "x"}', timeout=PATIENCE_S)
        worker.asked = True
        worker.move(ModelState.LOADING)
        await until(lambda: doors.front_door.subscriptions.models == {"demo"}, client)
        assert (await asked(client, SUBJECT, {"input": "x"}))["text"] == "echo: x"
        worker.asked = False
        worker.move(ModelState.ON_DISK)
        await until(lambda: not doors.front_door.subscriptions.models, client)
        # The spool hears what is published there, and answers nobody.
        with pytest.raises(TimeoutError):
            await client.request(SUBJECT, b'{"input": "x"}', timeout=0.2)


async def until(true: Callable[[], bool], client: Client) -> None:
    """Waits with round trips to the broker, after which what was sent to it before has been done."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await client.flush()
        await client.flush()


async def test_one_of_two_nodes_answers(doors: Doors, client: Client, url: str, home: Home) -> None:
    events = EventBus("other")
    async with Doors(url, home, events) as other:
        await asyncio.gather(*(asked(client, SUBJECT, {"input": f"{n}"}) for n in range(40)))
        assert len(doors.service.requests) + len(other.service.requests) == 40
        assert doors.service.requests
        assert other.service.requests


async def test_a_lost_broker_ends_no_request_and_the_doors_are_open_again(
    doors: Doors, url: str, events: EventBus, caplog: pytest.LogCaptureFixture
) -> None:
    doors.service.script = texts(hold=True)
    async with client_of(url) as client:
        await client.publish(SUBJECT, b'{"input": "x"}', reply="answers.here")
        await doors.service.submitted.wait()
        embedded = doors.bus._broker
        assert embedded is not None
        assert embedded.pid is not None
        os.kill(embedded.pid, signal.SIGKILL)
        await broker_is(events, "down")
    generation = next(iter(doors.service.live.values()))
    assert not generation.cancelled
    generation.let_go()
    await broker_is(events, "connected", replay=False)
    doors.service.script = texts("back")
    async with client_of(url) as client:
        assert (await asked(client, SUBJECT, {"input": "x"}))["text"] == "back"
    assert generation.reply is not None
    assert "nats.answer_lost" in [getattr(record, "code", "") for record in caplog.records]


async def test_close_lets_the_last_answers_out(url: str, home: Home, events: EventBus) -> None:
    async with Doors(url, home, events) as doors, client_of(url) as client:
        doors.service.script = texts("partial", hold=True)
        answer = asyncio.create_task(asked(client, SUBJECT, {"input": "x"}))
        await doors.service.submitted.wait()
        doors.stopping.set()
        assert (await asked(client, SUBJECT, {"input": "late"}))["code"] == "draining"
        closing = asyncio.create_task(doors.front_door.close())
        next(iter(doors.service.live.values())).cancel()
        assert (await answer)["finish_reason"] == "cancelled"
        await closing
        assert not doors.front_door.subscriptions.models


async def test_close_does_not_wait_for_ever(
    url: str, home: Home, events: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLOSE_S", 0.05)
    async with Doors(url, home, events) as doors, client_of(url) as client:
        doors.service.script = texts(hold=True)
        await client.publish(SUBJECT, b'{"input": "x"}', reply="answers.here")
        await doors.service.submitted.wait()
        async with asyncio.timeout(2):
            await doors.front_door.close()
    assert next(iter(doors.service.live.values())).cancelled
