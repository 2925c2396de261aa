"""The durable queue on a real broker: kept, answered, answered again, handed over, given up, refused in words."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from asyncio.subprocess import DEVNULL, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.errors import APIError

from engine.service import InferenceRequest
from infsvc import subjects
from infsvc.errors import Conflict, NotFound, QueueFull
from infsvc.events import Alert, EventBus
from infsvc.home import Home
from infsvc.types import ModelState
from transports.nats.broker import EmbeddedBroker, Listener, find_binary, probe
from transports.nats.bus import heeding
from transports.nats.jetstream import JetStreamFault, Stored
from transports.nats.once import OnceBook, body_hash
from transports.nats.streams import once_bucket

from .conftest import PATIENCE_S, Doors, asked, broker_is, client_of, happened, told
from .fakes import FakeGeneration, FakeWorker
from .test_front_door import listening, texts, until

SUBJECT = "inference.request.demo"
QUEUE = "inference.queue.demo"
STREAM = "INFERENCE_DEMO"


def body(req_id: str | None = None, **more: Any) -> bytes:
    return json.dumps(({"req_id": req_id} if req_id else {}) | {"input": "x"} | more).encode()


async def left(client: Client, stream: str = STREAM) -> int:
    return int((await heeding(client.jetstream().stream_info(stream))).state.messages)


async def emptied(client: Client, *streams: str) -> None:
    """Waits until nothing lies in these streams; the spool first, as it goes on into the queue."""
    async with asyncio.timeout(PATIENCE_S):
        while any([await left(client, stream) for stream in streams or (f"{STREAM}_SPOOL", STREAM)]):
            pass


def settings(**keys: Any) -> dict[str, Any]:
    return {"ack_wait": 1.0} | keys


@asynccontextmanager
async def node(url: str, home: Home, name: str = "test", **keys: Any) -> AsyncIterator[Doors]:
    """Another node on the same broker."""
    events = EventBus(name)
    async with Doors(url, home, events, FakeWorker("demo", events, **settings(**keys))) as doors:
        yield doors


async def test_a_named_request_goes_through_the_queue_and_leaves_nothing(doors: Doors, client: Client) -> None:
    assert (await asked(client, SUBJECT, body("r1")))["text"] == "echo: x"
    assert doors.service.requests[0].queued
    await emptied(client)
    assert not (await asked(client, SUBJECT, body())).get("error")
    assert not doors.service.requests[1].queued
    config = (await client.jetstream().stream_info(STREAM)).config
    assert (config.retention, config.discard, config.max_msgs) == ("workqueue", "new", 2000 + 64)
    assert (config.max_age or 0, config.duplicate_window) == (0, 600.0)
    consumer = (await client.jetstream().consumer_info(STREAM, "demo_workers")).config
    assert (consumer.ack_wait, consumer.max_deliver, consumer.max_ack_pending) == (10.0, 5, 64)
    assert doors.worker.n_queued_durable == 0


async def test_a_repeat_gets_the_same_answer_and_is_not_computed(doors: Doors, client: Client) -> None:
    first = await asked(client, SUBJECT, body("r1", reply_to="copies.one"))
    await emptied(client)
    async with listening(client, "copies.two") as copies:
        assert await asked(client, SUBJECT, body("r1", reply_to="copies.two")) == first
        assert await told(copies) == first
        # A publisher's own repeat, which carries no id for the broker's window.
        await client.jetstream().publish(QUEUE, body("r1", reply_to="copies.two"))
        assert await told(copies) == first
        await client.jetstream().publish(QUEUE, body("r1", reply_to="copies.two", input="y"))
        assert (await told(copies))["code"] == "req_id_conflict"
    assert len(doors.service.requests) == 1
    await emptied(client)
    # The spool has seen all of them, and made no further repeat of any.
    assert [answer for _, answer in doors.service.repeats] == [first, first]
    other = await asked(client, SUBJECT, body("r1", input="y"))
    assert (other["status"], other["code"], other["param"]) == (409, "req_id_conflict", "req_id")
    assert isinstance(doors.service.refusals[0][1], Conflict)
    assert len(doors.service.requests) == 1
    await emptied(client)
    assert (len(doors.service.repeats), len(doors.service.refusals)) == (2, 2)


async def test_a_repeat_of_what_still_runs_waits_for_it(doors: Doors, client: Client) -> None:
    doors.service.script = texts("done", hold=True)
    first = asyncio.create_task(asked(client, SUBJECT, body("r1")))
    await doors.service.submitted.wait()
    second = asyncio.create_task(asked(client, SUBJECT, body("r1")))
    third = asyncio.create_task(asked(client, SUBJECT, body("r1", input="other")))
    await until(lambda: doors.durable._lanes["demo"].queue.n_taken == 2, client)
    doors.service.live["r1"].let_go()
    assert (await first)["text"] == "done"
    assert await second == await first
    assert (await third)["code"] == "req_id_conflict"
    assert len(doors.service.requests) == 1


async def test_what_runs_on_another_node_is_waited_for_however_long(doors: Doors, client: Client) -> None:
    n_asked, often = 0, asyncio.Event()

    async def at_work(message: Msg) -> None:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 3:
            often.set()
        await client.publish(message.reply, b'{"running": true}')

    await client.subscribe(subjects.owner("elsewhere"), cb=at_work)
    await client.flush()
    book = OnceBook(doors.durable.js, once_bucket(doors.worker.settings))
    page: dict[str, Any] = {"body": body_hash(json.loads(body("far"))), "owner": "elsewhere", "limit_bytes": 2**20}
    revision = await book.write("far", "running", over=0, **page)
    asking = asyncio.create_task(asked(client, SUBJECT, body("far")))
    async with asyncio.timeout(PATIENCE_S):
        await often.wait()
    answer = {"req_id": "far", "text": "from elsewhere"}
    await book.write("far", "done", over=revision, answer=answer, **page)
    assert await asking == answer
    assert doors.service.requests == []


async def test_who_waits_is_answered_though_the_spool_was_quicker(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FakeWorker("demo", events)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        js = doors.durable.js
        put, n_tries = js.publish, 0

        async def unanswered_at_first(*args: Any, **kwargs: Any) -> Stored:
            nonlocal n_tries
            n_tries += 1
            if n_tries == 1:
                # As the spool puts it, which knows of nobody that waits.
                await client.jetstream().publish(QUEUE, body("r"), headers={subjects.MSG_ID_HEADER: "demo:r"})
                raise JetStreamFault("no answer")
            return await put(*args, **kwargs)

        monkeypatch.setattr(js, "publish", unanswered_at_first)
        answer = asyncio.create_task(asked(client, SUBJECT, body("r")))
        await until(lambda: worker.n_queued_durable == 2, client)
        worker.move(ModelState.READY)
        assert (await answer)["text"] == "echo: x"
        assert len(doors.service.requests) == 1


async def test_a_stream_through_the_queue_and_its_repeat(doors: Doors, client: Client) -> None:
    doors.service.script = texts("a", "b", "c")
    async with listening(client, "answers.here") as answers:
        await client.publish(SUBJECT, body("s", stream=True), reply="answers.here")
        got = [await told(answers) for _ in range(4)]
        assert [chunk["text"] for chunk in got[:3]] == ["a", "b", "c"]
        assert got[3]["done"] is True
        await client.publish(SUBJECT, body("s", stream=True), reply="answers.here")
        chunk, final = [await told(answers) for _ in range(2)]
        assert (chunk["text"], final) == ("abc", got[3])
    assert (await asked(client, SUBJECT, body("s", stream=True)))["text"] == "abc"


async def test_a_thousand_publishes_at_a_queue_of_a_hundred(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    # What the broker itself refuses is what would not even fit if all of MAX_ACK_PENDING were at work.
    worker = FakeWorker("demo", events, queue_max_msgs=90, max_ack_pending=10)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        js = client.jetstream()
        async with listening(client, "inference.reply.>") as answers:
            sent = await asyncio.gather(
                *(
                    js.publish(QUEUE, body(f"r{n}"), headers={subjects.MSG_ID_HEADER: f"demo:r{n}"})
                    for n in range(1000)
                ),
                return_exceptions=True,
            )
            refused = [one for one in sent if isinstance(one, APIError)]
            assert len(refused) == 900
            assert {one.err_code for one in refused} == {10077}
            await until(lambda: worker.n_queued_durable == 100, client)
            assert worker.report().status == "critical"
            full = await asked(client, SUBJECT, body("late"))
            assert (full["code"], full["queue_depth"]) == ("queue_full", 100)
            assert (await asked(client, SUBJECT, body("r5", input="other")))["code"] == "queue_full"
            worker.move(ModelState.READY)
            got = {(await told(answers))["req_id"] for _ in range(100)}
        assert got == {f"r{n}" for n, one in enumerate(sent) if not isinstance(one, APIError)}
        await emptied(client)
        await until(lambda: worker.n_queued_durable == 0, client)
        assert len(doors.service.requests) == 100


async def test_what_is_published_while_no_node_is_up_is_answered_by_the_next(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    async with Doors(url, home, events):
        pass
    async with client_of(url) as client, listening(client, "inference.reply.>") as answers:
        await client.publish(SUBJECT, body("kept"))
        await client.publish(SUBJECT, b'{"req_id": "bad", "input": 5}')
        await client.publish(SUBJECT, body(reply_to="inference.reply.alone"))
        await client.publish(SUBJECT, body())
        await client.publish(SUBJECT, b"nonsense")
        await client.flush()
        async with node(url, home) as doors:
            got = [await told(answers) for _ in range(3)]
            await emptied(client)
        assert {answer["req_id"]: answer.get("text", answer.get("param")) for answer in got} == {
            "kept": "echo: x",
            "bad": "input",
            **{request.req_id: "echo: x" for request in doors.service.requests if request.req_id != "kept"},
        }
        assert len(doors.service.requests) == 2


async def test_what_the_door_has_seen_to_is_not_done_again_by_the_spool(doors: Doors, client: Client) -> None:
    async with listening(client, "copies") as copies, listening(client, "inference.reply.>") as replies:
        assert (await asked(client, SUBJECT, body("named")))["text"] == "echo: x"
        assert (await asked(client, SUBJECT, body("bad", params={"max_tokens": 0})))["status"] == 400
        assert (await asked(client, SUBJECT, body(reply_to="copies")))["param"] == "req_id"
        late = {subjects.DEADLINE_HEADER: f"{time.time() - 5:.1f}"}
        assert (await asked(client, SUBJECT, body("late"), headers=late))["code"] == "deadline_exceeded"
        await client.publish(SUBJECT, body("published"))
        assert (await told(replies))["req_id"] == "published"
        assert (await told(copies))["param"] == "req_id"
        await emptied(client)
        assert (copies.pending_msgs, replies.pending_msgs) == (0, 0)
    assert [request.req_id for request in doors.service.requests] == ["named", "published"]


async def test_a_deadline_that_passes_in_the_queue(url: str, home: Home, events: EventBus) -> None:
    worker = FakeWorker("demo", events)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        soon = {subjects.DEADLINE_HEADER: f"{time.time() + 0.2}"}
        answer = asyncio.create_task(asked(client, SUBJECT, body("r"), headers=soon))
        await until(lambda: worker.n_queued_durable == 1, client)
        await asyncio.sleep(0.2)
        worker.move(ModelState.READY)
        assert (await answer)["code"] == "deadline_exceeded"
        assert not doors.service.requests
        bad = await asked(client, SUBJECT, body(), headers={subjects.DEADLINE_HEADER: "soon"})
        assert (bad["status"], bad["param"]) == (400, subjects.DEADLINE_HEADER)


async def test_a_long_job_is_not_given_to_another(url: str, home: Home, broker: EmbeddedBroker) -> None:
    async with node(url, home, "one", ack_wait=0.6) as one, node(url, home, "two", ack_wait=0.6) as two:
        one.service.script = two.service.script = texts("done", hold=True)
        async with client_of(url) as client:
            answer = asyncio.create_task(asked(client, SUBJECT, body("long")))
            await asyncio.wait(
                {asyncio.ensure_future(each.service.submitted.wait()) for each in (one, two)},
                return_when=asyncio.FIRST_COMPLETED,
            )
            await asyncio.sleep(1.5)
            assert len(one.service.requests + two.service.requests) == 1
            for each in (one, two):
                for generation in each.service.live.values():
                    generation.let_go()
            assert (await answer)["text"] == "done"
            await emptied(client)


async def test_a_node_that_leaves_hands_its_work_over(url: str, home: Home, broker: EmbeddedBroker) -> None:
    def waiting(request: InferenceRequest) -> FakeGeneration:
        generation = FakeGeneration(request, ["never"], hold=True)
        generation.running = request.req_id == "running"
        return generation

    async with client_of(url) as client:  # noqa: SIM117
        async with node(url, home, "one", ack_wait=30.0) as one:
            one.service.script = waiting
            answers = {
                req_id: asyncio.create_task(asked(client, SUBJECT, body(req_id))) for req_id in ("running", "waiting")
            }
            await until(lambda: len(one.service.live) == 2, client)
            async with node(url, home, "two", ack_wait=30.0) as two:
                await one.front_door.leave()
                await one.durable.hand_over()
                assert (await answers["waiting"])["text"] == "echo: x"
                assert not one.service.live["running"].cancelled
                one.service.draining = True
                one.service.live["running"].cancel()
                assert (await answers["running"])["text"] == "echo: x"
                assert {request.req_id for request in two.service.requests} == {"running", "waiting"}
                # The one that leaves takes no more.
                assert (await asked(client, SUBJECT, body("next")))["text"] == "echo: x"
                assert len(one.service.requests) == 2


async def test_giving_back_uses_up_no_delivery(
    url: str, home: Home, broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transports.nats.work_queue._FULL_DELAY_S", 0.01)

    async with node(url, home, max_deliver=2) as doors, client_of(url) as client:
        n = 0

        def full_at_first(request: InferenceRequest) -> FakeGeneration:
            nonlocal n
            n += 1
            if n < 6:
                raise QueueFull(model="demo", n_waiting=9, capacity=9, retry_after_s=3)
            return FakeGeneration(request, ["at last"])

        doors.service.script = full_at_first
        assert (await asked(client, SUBJECT, body("r")))["text"] == "at last"
        assert n == 6
        await emptied(client, STREAM, "INFSVC_DEAD")


async def test_what_fails_each_time_is_a_dead_letter_and_can_be_replayed(
    url: str, home: Home, broker: EmbeddedBroker
) -> None:
    async with node(url, home, max_deliver=2) as doors, client_of(url) as client:  # noqa: SIM117
        async with listening(client, subjects.ALERTS) as alerts, listening(client, "copies") as copies:
            doors.service.script = texts(dies=True)
            answer = await asked(client, SUBJECT, body("r", reply_to="copies"))
            assert (answer["status"], answer["code"]) == (500, "dead_letter")
            assert "2 times" in answer["error"]
            assert await told(copies) == answer
            assert "the engine died" in (await told(alerts))["msg"]
            await happened(doors.events, lambda event: isinstance(event, Alert) and event.level == "critical")
            assert len(doors.service.requests) == 2
            [letter] = await doors.durable.dead.page()
            assert (letter.model, letter.req_id, letter.n_delivered) == ("demo", "r", 2)
            assert letter.wire()["body"]["input"] == "x"
            assert "the engine died" in letter.reason
            assert await asked(client, SUBJECT, body("r")) == answer
            await emptied(client)
            doors.service.script = texts("well")
            await doors.durable.dead.replay(letter.id)
            assert (await told(copies))["text"] == "well"
            assert (await asked(client, SUBJECT, body("r")))["text"] == "well"
            with pytest.raises(NotFound, match="dead letter 1"):
                await doors.durable.dead.delete(letter.id)
            await emptied(client, STREAM, "INFSVC_DEAD", "INFSVC_ADVISORIES")


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b'{"input": "x"}', b'{"input": 5}'], ids=range(5))
async def test_poison_that_nobody_can_be_told_of_is_a_dead_letter(doors: Doors, client: Client, data: bytes) -> None:
    await client.jetstream().publish(QUEUE, data)
    await happened(doors.events, lambda event: isinstance(event, Alert))
    [letter] = await doors.durable.dead.page(model="demo")
    assert letter.body == data
    assert "bad_request" in letter.reason
    assert await doors.durable.dead.page(after=letter.id) == []
    await emptied(client, STREAM, "INFSVC_ADVISORIES")
    await doors.durable.dead.delete(letter.id)
    assert await doors.durable.dead.count() == 0
    assert not doors.service.requests


async def test_a_wrong_shape_with_an_address_is_answered(doors: Doors, client: Client) -> None:
    async with listening(client, "inference.reply.r") as answers:
        await client.jetstream().publish(QUEUE, b'{"req_id": "r", "input": 5}')
        assert (await told(answers))["param"] == "input"
    await emptied(client)
    assert await doors.durable.dead.count() == 0


async def test_what_kills_its_node_each_time_is_moved_with_a_reason(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events, **settings(ack_wait=0.2, max_deliver=1))
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:  # noqa: SIM117
        async with listening(client, "inference.reply.r") as answers:
            await client.jetstream().publish(QUEUE, body("r"))
            pull = await client.jetstream().pull_subscribe_bind("demo_workers", STREAM)
            await pull.fetch(1)  # and never a word again
            worker.move(ModelState.READY)
            answer = await told(answers)
            assert (answer["code"], answer["req_id"]) == ("dead_letter", "r")
            await happened(events, lambda event: isinstance(event, Alert))
            [letter] = await doors.durable.dead.page()
            assert "delivered 1 times" in letter.reason
            await emptied(client, STREAM, "INFSVC_ADVISORIES")
            assert not doors.service.requests


async def test_purge_tells_the_callers(url: str, home: Home, events: EventBus, broker: EmbeddedBroker) -> None:
    worker = FakeWorker("demo", events)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        waiting = [asyncio.create_task(asked(client, SUBJECT, body(f"r{n}"))) for n in range(3)]
        await until(lambda: worker.n_queued_durable == 3, client)
        [shown] = await doors.desk.overview()
        assert (shown["model"], shown["waiting"], shown["capacity"], shown["durable"]) == ("demo", 3, 2000, True)
        assert await doors.desk.purge("demo") == 3
        assert {answer["code"] for answer in await asyncio.gather(*waiting)} == {"removed"}
        await emptied(client)


async def test_cancel_reaches_what_still_waits_in_the_broker(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        waiting = {name: asyncio.create_task(asked(client, SUBJECT, body(name))) for name in ("one", "two", "three")}
        await until(lambda: worker.n_queued_durable == 3, client)
        assert await asked(client, subjects.CANCEL, {"req_id": "two"}) == {"req_id": "two", "cancelled": True}
        assert (await waiting["two"])["finish_reason"] == "cancelled"
        assert [request.req_id for request in doors.service.withdrawals] == ["two"]
        assert not await doors.desk.cancel("two")
        worker.move(ModelState.READY)
        assert {(await waiting[name])["text"] for name in ("one", "three")} == {"echo: x"}
        assert sorted(request.req_id for request in doors.service.requests) == ["one", "three"]


async def test_eight_megabytes_go_through_the_queue(doors: Doors, client: Client) -> None:
    doors.service.script = texts("read")
    large = "x" * (8 * 2**20 - 5000)
    assert (await asked(client, SUBJECT, body("large", input=large)))["text"] == "read"
    # With no room left for the queue's headers it is served from memory to who waits.
    largest = "x" * (8 * 2**20 - 100)
    assert (await asked(client, SUBJECT, body("largest", input=largest)))["text"] == "read"
    assert [(request.input, request.queued) for request in doors.service.requests] == [(large, True), (largest, False)]
    async with listening(client, "inference.reply.largest") as answers:
        await client.publish(SUBJECT, body("largest", input=largest))
        refused = await told(answers)
        assert (refused["status"], refused["code"]) == (413, "too_large")
    await emptied(client)


async def test_an_answer_too_large_to_be_kept_is_said_to_a_repeat(doors: Doors, client: Client) -> None:
    text = "x" * (8 * 2**20 - 500)
    doors.service.script = texts(text)
    assert (await asked(client, SUBJECT, body("r")))["text"] == text
    await emptied(client, STREAM)
    assert "too large to be kept" in (await asked(client, SUBJECT, body("r")))["error"]
    assert len(doors.service.requests) == 1


@asynccontextmanager
async def plain_broker(folder: Path, url: str, jetstream: str = "") -> AsyncIterator[None]:
    """An operator's broker."""
    port = int(url.rpartition(":")[2])
    config = folder / "plain.conf"
    config.write_text(f"host: 127.0.0.1\nport: {port}\n{jetstream}\n")
    process = await create_subprocess_exec(
        str(find_binary()), "-c", str(config), stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL
    )
    try:
        async with asyncio.timeout(PATIENCE_S):
            while await probe("127.0.0.1", port) is not Listener.NATS:
                pass
        yield
    finally:
        process.kill()
        await process.wait()


async def test_a_broker_without_jetstream_serves_who_waits_and_says_what_it_cannot(
    url: str, home: Home, tmp_path: Path
) -> None:
    async with plain_broker(tmp_path, url), node(url, home) as doors, client_of(url) as client:
        assert (await asked(client, SUBJECT, body()))["text"] == "echo: x"
        assert (await asked(client, SUBJECT, body("named")))["text"] == "echo: x"
        async with listening(client, "inference.reply.r") as answers:
            await client.publish(SUBJECT, body("r"))
            refused = await told(answers)
            assert (refused["status"], refused["code"]) == (503, "queue_unavailable")
            await client.publish(SUBJECT, body(reply_to="inference.reply.r"))
            assert (await told(answers))["code"] == "queue_unavailable"
        assert "JetStream is switched off" in (doors.bus.state.reason or "")
        assert (doors.bus.state.status, len(doors.service.requests)) == ("connected", 2)
        [shown] = await doors.desk.overview()
        assert not shown["durable"]


async def test_a_stream_of_an_operators_own_is_told(url: str, home: Home, broker: EmbeddedBroker) -> None:
    async with client_of(url) as client:
        await client.jetstream().add_stream(name="AUDIT", subjects=["inference.request.>"])
        async with node(url, home) as doors:
            assert "the stream AUDIT covers inference.request.demo" in (doors.bus.state.reason or "")
            alert = await happened(doors.events, lambda event: isinstance(event, Alert))
            assert isinstance(alert, Alert)
            assert "AUDIT" in alert.msg
            # What needs no receipt of its own goes on.
            async with listening(client, "copies") as copies:
                await client.publish(SUBJECT, body("r", reply_to="copies"))
                assert (await told(copies))["text"] == "echo: x"
                await client.publish(SUBJECT, body(reply_to="copies"))
                assert (await told(copies))["text"] == "echo: x"


async def test_a_full_disk_is_said_and_what_waits_is_answered(url: str, home: Home, tmp_path: Path) -> None:
    store = f'jetstream {{store_dir: "{tmp_path}/js", max_file_store: 400000}}'
    async with plain_broker(tmp_path, url, store):
        events = EventBus("test")
        worker = FakeWorker("demo", events)
        worker.state = ModelState.LOADING
        async with Doors(url, home, events, worker) as doors, client_of(url) as client:
            waiting: list[asyncio.Task[dict[str, Any]]] = []
            refused: dict[str, Any] = {}
            for n in range(60):
                task = asyncio.create_task(asked(client, SUBJECT, body(f"r{n}", input="x" * 20_000)))
                waiting.append(task)
                await asyncio.wait({task}, timeout=0.05)
                if task.done():
                    refused = await waiting.pop()
                    break
            assert refused["status"] in (429, 503), refused
            assert waiting
            worker.move(ModelState.READY)
            answers = await asyncio.gather(*waiting)
            assert all(answer["text"].startswith("echo: xx") for answer in answers), answers
            assert doors.bus.state.status == "connected"


async def test_the_broker_restarts_in_the_middle_and_nothing_runs_twice(
    doors: Doors, url: str, events: EventBus
) -> None:
    doors.service.script = texts("done", hold=True)
    async with client_of(url) as client:
        await client.jetstream().publish(QUEUE, body("r"))
        await doors.service.submitted.wait()
    embedded = doors.bus._broker
    assert embedded is not None
    await embedded.stop(grace_s=0)
    await broker_is(events, "down")
    await broker_is(events, "connected", replay=False)
    async with client_of(url) as client, listening(client, "inference.reply.r") as answers:
        doors.service.live["r"].let_go()
        assert (await told(answers))["text"] == "done"
        await emptied(client)
    assert len(doors.service.requests) == 1


async def test_an_answer_that_a_dying_broker_has_not_read_is_sent_again(
    doors: Doors, url: str, events: EventBus
) -> None:
    doors.service.script = texts("done", hold=True)
    async with client_of(url) as client:
        # So that no answer is missed while this test is without a broker itself.
        await client.jetstream().add_stream(name="ANSWERS", subjects=["inference.reply.>"])
        await client.jetstream().publish(QUEUE, body("r"))
        await doors.service.submitted.wait()
    embedded = doors.bus._broker
    assert embedded is not None
    assert embedded.pid is not None
    os.kill(embedded.pid, signal.SIGSTOP)
    stats = list(Path(f"/proc/{embedded.pid}/task").glob("*/stat"))
    while any(stat.read_text().rpartition(") ")[2][0] != "T" for stat in stats):
        await asyncio.sleep(0)  # each of its threads may still have read the answer
    doors.service.live["r"].let_go()
    await doors.service.live["r"].result()
    await asyncio.sleep(0.1)  # the answer is in the buffers of a socket by now
    os.kill(embedded.pid, signal.SIGKILL)
    await broker_is(events, "down")
    await broker_is(events, "connected", replay=False)
    async with client_of(url) as client:
        await emptied(client)
        assert await left(client, "ANSWERS") >= 1
    assert len(doors.service.requests) == 1


def test_a_repeat_is_known_by_its_body_apart_from_reply_to() -> None:
    from transports.nats.once import body_hash

    one = body_hash({"req_id": "r", "input": "x", "params": {"seed": 1, "top_k": 2}})
    assert one == body_hash({"params": {"top_k": 2, "seed": 1}, "input": "x", "req_id": "r", "reply_to": "a"})
    assert one != body_hash({"req_id": "r", "input": "x", "params": {"seed": 2, "top_k": 2}})


async def test_a_stream_of_the_queues_name_that_is_none_of_ours_is_told(
    url: str, home: Home, broker: EmbeddedBroker
) -> None:
    async with client_of(url) as client:
        await client.jetstream().add_stream(name=STREAM, subjects=["orders"])
        async with node(url, home) as doors:
            assert (await asked(client, SUBJECT, body()))["text"] == "echo: x"
            assert "the queue of demo cannot be used" in (doors.bus.state.reason or "")
            async with listening(client, "inference.reply.r") as answers:
                await client.publish(SUBJECT, body("r"))
                assert (await told(answers))["code"] == "queue_unavailable"
