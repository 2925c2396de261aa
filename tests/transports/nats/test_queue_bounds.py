"""What a queue takes and what it lets go: its bound as callers see it, and its age, in words."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from nats.aio.client import Client
from nats.js.errors import APIError

from engine.service import InferenceRequest
from infsvc.events import Alert, DeadLettersChanged, EventBus
from infsvc.home import Home
from infsvc.types import ModelState
from transports.nats.broker import EmbeddedBroker

from .conftest import Doors, asked, client_of, happened, told
from .fakes import FakeGeneration, FakeWorker
from .test_durable import QUEUE, STREAM, SUBJECT, body, emptied, node
from .test_front_door import listening, texts, until


class HeldAudit:
    """A log whose rows reach the disk when a test says so."""

    def __init__(self) -> None:
        self.on_disk = asyncio.Event()

    async def written(self) -> None:
        pass

    async def flush(self) -> None:
        await self.on_disk.wait()


async def test_what_is_answered_and_not_acknowledged_yet_takes_no_place(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker: Any = FakeWorker("demo", events, queue_max_msgs=2, max_ack_pending=6)
    worker.audit = HeldAudit()
    async with Doors(url, home, events, worker), client_of(url) as client:
        for n in range(5):
            assert (await asked(client, SUBJECT, body(f"r{n}")))["text"] == "echo: x"
        info = await client.jetstream().consumer_info(STREAM, "demo_workers")
        assert info.num_ack_pending == 5
        await until(lambda: worker.n_queued_durable == 0, client)
        worker.audit.on_disk.set()
        await emptied(client)


async def test_what_is_worked_on_takes_no_place(url: str, home: Home, events: EventBus, broker: EmbeddedBroker) -> None:
    worker = FakeWorker("demo", events, queue_max_msgs=2, worker_concurrency=2)
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:

        def at_work(request: InferenceRequest) -> FakeGeneration:
            worker.n_in_flight += 1
            return FakeGeneration(request, ["done"], hold=True)

        doors.service.script = at_work
        running = [asyncio.create_task(asked(client, SUBJECT, body(f"w{n}"))) for n in range(2)]
        # Until they are taken they wait, and the third would be one too many.
        await until(lambda: len(doors.service.live) == 2, client)
        running.append(asyncio.create_task(asked(client, SUBJECT, body("w2"))))
        await until(lambda: len(doors.service.live) == 3, client)
        waiting = [asyncio.create_task(asked(client, SUBJECT, body(f"r{n}"))) for n in range(2)]
        await until(lambda: worker.n_queued_durable == 2, client)
        full = await asked(client, SUBJECT, body("late"))
        assert (full["code"], full["queue_depth"]) == ("queue_full", 2)
        doors.service.script = texts("done")
        worker.n_in_flight = 0
        for generation in doors.service.live.values():
            generation.let_go()
        assert {answer["text"] for answer in await asyncio.gather(*running, *waiting)} == {"done"}
        await emptied(client)


async def test_publishers_always_have_the_whole_queue_beside_what_is_worked_on(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events, queue_max_msgs=6, max_ack_pending=4, worker_concurrency=4)
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:

        def at_work(request: InferenceRequest) -> FakeGeneration:
            worker.n_in_flight += 1
            return FakeGeneration(request, ["done"], hold=True)

        doors.service.script = at_work
        js = client.jetstream()
        async with listening(client, "inference.reply.>") as answers:
            for n in range(4):
                await js.publish(QUEUE, body(f"w{n}"))
            await until(lambda: len(doors.service.live) == 4, client)
            for n in range(6):
                await js.publish(QUEUE, body(f"r{n}"))
            with pytest.raises(APIError, match="maximum messages exceeded"):
                await js.publish(QUEUE, body("late"))
            await until(lambda: worker.n_queued_durable == 6, client)
            doors.service.script = texts("done")
            worker.n_in_flight = 0
            for generation in doors.service.live.values():
                generation.let_go()
            assert len({(await told(answers))["req_id"] for _ in range(10)}) == 10
        await emptied(client)


async def test_a_flood_through_two_doors_is_bounded(url: str, home: Home, broker: EmbeddedBroker) -> None:
    workers = []
    for name in ("one", "two"):
        workers.append(FakeWorker("demo", EventBus(name), queue_max_msgs=10))
        workers[-1].state = ModelState.LOADING
    one, two = (Doors(url, home, worker._events, worker) for worker in workers)
    async with one, two, client_of(url) as client:
        waiting = [asyncio.create_task(asked(client, SUBJECT, body(f"r{n}"))) for n in range(60)]
        await until(lambda: sum(task.done() for task in waiting) >= 40, client)
        for worker in workers:
            worker.move(ModelState.READY)
        answers = await asyncio.gather(*waiting)
        n_kept = sum("text" in answer for answer in answers)
        assert {answer.get("code") for answer in answers} == {None, "queue_full"}
        # Each node holds to the bound by itself; together they may pass it by what both put at once.
        assert 10 <= n_kept <= 20
        await emptied(client)


async def test_a_flood_through_one_door_is_bounded_exactly(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events, queue_max_msgs=10)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker), client_of(url) as client:
        waiting = [asyncio.create_task(asked(client, SUBJECT, body(f"r{n}"))) for n in range(40)]
        await until(lambda: sum(task.done() for task in waiting) == 30, client)
        assert {task.result()["queue_depth"] for task in waiting if task.done()} == {10}
        assert worker.n_queued_durable == 10
        worker.move(ModelState.READY)
        assert sum("text" in answer for answer in await asyncio.gather(*waiting)) == 10


async def test_what_no_node_has_room_for_in_time_is_told_and_kept(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events, queue_max_age=0.3)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:  # noqa: SIM117
        async with listening(client, "copies") as copies:
            late = await asked(client, SUBJECT, body("r", reply_to="copies"))
            assert (late["status"], late["code"], late["req_id"]) == (504, "deadline_exceeded", "r")
            assert "QUEUE_MAX_AGE, 0.3 s" in late["error"]
            assert await told(copies) == late
            [letter] = await doors.durable.dead.page()
            assert (letter.req_id, letter.n_delivered) == ("r", 0)
            assert letter.reason.startswith("expired in the queue")
            assert not doors.service.requests
            assert [str(error) for _, error in doors.service.refusals] == [late["error"]]
            await emptied(client)
            worker.move(ModelState.READY)
            await doors.durable.dead.replay(letter.id)
            assert (await told(copies))["text"] == "echo: x"
            await emptied(client, STREAM, "INFSVC_DEAD")


async def test_what_expires_while_no_node_is_up_is_told_by_the_next(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    async with node(url, home, queue_max_age=0.5):
        pass
    async with client_of(url) as client, listening(client, "inference.reply.>") as answers:
        await client.jetstream().publish(QUEUE, body("queued"))
        await client.publish(SUBJECT, body("spooled"))
        await client.publish(SUBJECT, body(reply_to="inference.reply.alone"))
        await client.flush()
        await asyncio.sleep(0.6)  # the age itself
        async with node(url, home, queue_max_age=0.5) as doors:
            got = [await told(answers) for _ in range(3)]
            assert {answer["code"] for answer in got} == {"deadline_exceeded"}
            assert {answer["req_id"] for answer in got} >= {"queued", "spooled"}
            await emptied(client)
            letters = await doors.durable.dead.page()
            assert {letter.req_id for letter in letters} >= {"queued", "spooled"}
            assert len(letters) == 3
            assert all(letter.reason.startswith("expired in the queue") for letter in letters)
            assert not doors.service.requests
            # Each can be replayed, also the one that only its number in the spool tells apart.
            for letter in letters:
                await doors.durable.dead.replay(letter.id)
            replayed = [await told(answers) for _ in range(3)]
            assert {answer.get("text") for answer in replayed} == {"echo: x"}


async def test_a_repeat_that_expires_gets_the_answer_that_there_is(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events, queue_max_age=0.5)
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        first = await asked(client, SUBJECT, body("r", reply_to="copies"))
        await emptied(client)
        worker.state = ModelState.LOADING
        async with listening(client, "copies") as copies:
            await client.jetstream().publish(QUEUE, body("r", reply_to="copies"))
            assert await told(copies) == first
        await emptied(client)
        assert await doors.durable.dead.count() == 0


async def test_heads_come_without_bodies_and_changes_are_told(doors: Doors, client: Client) -> None:
    dead = doors.durable.dead
    await happened(doors.events, lambda event: isinstance(event, DeadLettersChanged))
    assert dead.n_kept == 0
    for n in range(3):
        await client.jetstream().publish(QUEUE, f'{{"input": "{"x" * 100_000}", "n": {n}}}'.encode())
    await until(lambda: dead.n_kept == 3, client)
    heads = [head async for batch in dead.heads() for head in batch]
    letters = await dead.page()
    assert [(head.id, head.model, head.reason, head.n_bytes) for head in heads] == [
        (letter.id, letter.model, letter.reason, len(letter.body)) for letter in letters
    ]
    assert abs(heads[0].died_ts - time.time()) < 60
    assert [head.id async for batch in dead.heads(after=heads[1].id) for head in batch] == [heads[2].id]
    assert [head async for batch in dead.heads(after=heads[2].id) for head in batch] == []
    assert (await dead.letter(heads[0].id)).body == letters[0].body
    await dead.delete(heads[0].id)
    await until(lambda: dead.n_kept == 2, client)
    # What reads them leaves nothing at the broker.
    assert not await client.jetstream().consumers_info("INFSVC_DEAD")


async def test_another_nodes_dead_letters_are_counted_here(url: str, home: Home, broker: EmbeddedBroker) -> None:
    async with (
        node(url, home, "one", max_deliver=1) as one,
        node(url, home, "two", max_deliver=1) as two,
        client_of(url) as client,
    ):
        one.service.script = two.service.script = texts(dies=True)
        await asked(client, SUBJECT, body("r"))
        await until(lambda: one.durable.dead.n_kept == two.durable.dead.n_kept == 1, client)
        [head] = [head async for batch in two.durable.dead.heads() for head in batch]
        assert head.req_id == "r"
        for each in (one, two):
            each.service.script = texts("well")
        await two.durable.dead.replay(head.id)
        await until(lambda: one.durable.dead.n_kept == two.durable.dead.n_kept == 0, client)


async def test_the_overview_tells_the_oldest_by_the_brokers_clock(
    url: str, home: Home, events: EventBus, broker: EmbeddedBroker
) -> None:
    worker = FakeWorker("demo", events)
    worker.state = ModelState.LOADING
    async with Doors(url, home, events, worker) as doors, client_of(url) as client:
        [empty] = await doors.desk.overview()
        assert "oldest_s" not in empty
        await client.jetstream().publish(QUEUE, body("r"))
        [shown] = await doors.desk.overview()
        assert 0 <= shown["oldest_s"] < 60
        assert (shown["max_age_s"], shown["max_deliver"], shown["max_ack_pending"]) == (86400.0, 5, 64)
        worker.move(ModelState.READY)
        await emptied(client)
    assert not [event for event in events.subscribe(replay=True).drain() if isinstance(event, Alert)]
