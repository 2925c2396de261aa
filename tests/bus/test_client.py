"""The client on real nodes: the same methods over NATS and HTTP give the same answers, stop what is left, and say what
is wrong in the node's own terms."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest
from nats.js.api import DiscardPolicy, RetentionPolicy, StreamConfig

from infsvc import Client
from infsvc.errors import (
    BadRequest,
    ClientError,
    ConfigError,
    ContextLengthExceeded,
    NoAnswer,
    QueueFull,
    RequestError,
    UnknownModel,
    UnknownRequest,
    Unreachable,
    Unsupported,
)
from infsvc.events import RequestFinished
from tests.nodes import free_port
from transports.node import Node

from .conftest import Pair

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"temperature": 0, "max_tokens": 10_000, "ignore_eos": True}


@pytest.fixture(params=["nats", "http"])
async def client(pair: Pair, request: pytest.FixtureRequest) -> AsyncIterator[Client]:
    async with Client(pair.url if request.param == "nats" else pair.alpha.gateway_url, timeout_s=30) as client:
        yield client


@pytest.fixture
async def on_nats(pair: Pair) -> AsyncIterator[Client]:
    async with Client(pair.url, timeout_s=30) as client:
        yield client


async def nothing_runs(*nodes: Node) -> None:
    async with asyncio.timeout(10):
        while any(True for node in nodes for _ in node.service.live()):
            await asyncio.sleep(0.01)


async def all_were_cancelled(*nodes: Node) -> None:
    """Waits until nothing runs, and looks that nothing ended by itself."""
    await nothing_runs(*nodes)
    ends = [
        event.finish_reason
        for node in nodes
        for event in node.events.subscribe(replay=True).drain()
        if isinstance(event, RequestFinished)
    ]
    assert set(ends) == {"cancelled"}


async def runs(req_id: str, *nodes: Node) -> None:
    async with asyncio.timeout(10):
        while all(node.service.find(req_id) is None for node in nodes):
            await asyncio.sleep(0.01)


async def test_infer_raw_and_chat(client: Client) -> None:
    reply = await client.infer("hello", model="tiny", req_id="mine", trace_id="t", priority=1, **GREEDY)
    assert (reply.req_id, reply.finish_reason, reply.tokens_out) == ("mine", "length", 8)
    assert (await client.chat([{"role": "user", "content": "hello"}], model="tiny", **GREEDY)).text == reply.text
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (await client.infer_raw(prompt, model="tiny", **GREEDY)).tokens_in == reply.tokens_in
    assert (await client.infer_raw("hello", model="tiny", **GREEDY)).tokens_in < reply.tokens_in


async def test_a_stream_is_the_reply_in_pieces(client: Client) -> None:
    whole = await client.infer("hello", model="tiny", **GREEDY)
    stream = client.stream("hello", model="tiny", **GREEDY)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert stream.reply is not None
    assert (stream.reply.text, stream.reply.req_id) == (whole.text, stream.req_id)
    with pytest.raises(ClientError, match="read once"):
        aiter(stream)
    messages = [{"role": "user", "content": "hello"}]
    assert (
        "".join([chunk.text async for chunk in client.stream(messages=messages, model="tiny", **GREEDY)]) == whole.text
    )


@pytest.mark.parametrize("how", ["with", "break"])
async def test_a_stream_that_is_left_stops_its_generation(client: Client, pair: Pair, how: str) -> None:
    if how == "with":
        async with client.stream("hello", model="tiny", **ENDLESS) as stream:
            async for _ in stream:
                break
            await runs(stream.req_id, pair.alpha, pair.beta)
    else:
        async for _ in client.stream("hello", model="tiny", **ENDLESS):
            break
    await all_were_cancelled(pair.alpha, pair.beta)


async def test_a_stream_that_is_left_last_stops_too(pair: Pair) -> None:
    for url in (pair.url, pair.alpha.gateway_url):
        async with Client(url) as client:
            async for _ in client.stream("hello", model="tiny", **ENDLESS):
                break
        await all_were_cancelled(pair.alpha, pair.beta)


async def test_a_cancelled_task_and_a_time_out_stop_the_generation(client: Client, pair: Pair) -> None:
    task = asyncio.create_task(client.infer("hello", model="tiny", req_id="left", **ENDLESS))
    await runs("left", pair.alpha, pair.beta)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await all_were_cancelled(pair.alpha, pair.beta)
    with pytest.raises(NoAnswer, match=r"within 0\.3 s"):
        await client.infer("hello", model="tiny", timeout_s=0.3, **ENDLESS)
    await all_were_cancelled(pair.alpha, pair.beta)


async def test_cancel_by_id(client: Client, pair: Pair) -> None:
    task = asyncio.create_task(client.infer("hello", model="tiny", req_id="long", **ENDLESS))
    await runs("long", pair.alpha, pair.beta)
    await client.cancel("long")
    assert (await task).finish_reason == "cancelled"
    with pytest.raises(UnknownRequest):
        await client.cancel("long", timeout_s=0.5)


async def test_health_and_every_model_of_every_node(client: Client, pair: Pair) -> None:
    document = await client.health("tiny")
    assert (document.model_name, document.status) == ("tiny", "online")
    async with asyncio.timeout(10):
        while len(models := await client.list_models()) < 3 or any(each.response_time_ms is None for each in models):
            await asyncio.sleep(0.05)
    assert {(each.model_name, each.node) for each in models} == {
        ("tiny", "alpha"),
        ("tiny", "beta"),
        ("only-v1.5", "beta"),
    }
    assert all(each.uptime > 0 for each in models)


async def test_the_model_with_the_most_room_is_taken(on_nats: Client, pair: Pair) -> None:
    long = [asyncio.create_task(on_nats.infer("x", model="only-v1.5", req_id=f"busy{n}", **ENDLESS)) for n in range(3)]
    await runs("busy2", pair.beta)
    reports = await on_nats._link.connection.subscribe("monitoring.inference.only-v1.5")  # type: ignore[attr-defined]
    while True:
        report = json.loads((await reports.next_msg(timeout=10)).data)
        await on_nats.list_models()
        if report["active_processing"] == 3:
            break
    assert await on_nats.least_loaded() == "tiny"
    assert (await on_nats.infer("hello", **GREEDY)).tokens_out == 8
    assert await on_nats.least_loaded(among=["only-v1.5"]) == "only-v1.5"
    for n in range(3):
        await on_nats.cancel(f"busy{n}")
    await asyncio.gather(*long)
    with pytest.raises(Unreachable, match="no model that can do image-understanding is online"):
        await on_nats.least_loaded("image-understanding")


async def queued(url: str, stream: str) -> int:
    """How many messages a queue has ever taken."""
    nc = await nats.connect(url)
    try:
        return int((await nc.jetstream().stream_info(stream)).state.last_seq)
    finally:
        await nc.close()


async def test_what_is_not_named_goes_past_the_queue(on_nats: Client, pair: Pair) -> None:
    assert (await on_nats.infer("hello", model="only-v1.5", **GREEDY)).tokens_out == 8
    stream = on_nats.stream("hello", model="only-v1.5", **GREEDY)
    assert {chunk.req_id async for chunk in stream} == {stream.req_id}
    assert stream.reply is not None
    assert stream.reply.req_id == stream.req_id
    await on_nats.chat([{"role": "user", "content": "hello"}], model="only-v1.5", **GREEDY)
    await on_nats.embed("hello", model="only-v1.5")
    assert await queued(pair.url, "INFERENCE_ONLY_V1_5") == 0
    await on_nats.infer("hello", model="only-v1.5", req_id="named", **GREEDY)
    assert await queued(pair.url, "INFERENCE_ONLY_V1_5") == 1


async def test_what_is_not_named_is_cancelled_by_its_header(on_nats: Client, pair: Pair) -> None:
    stream = on_nats.stream("hello", model="only-v1.5", **ENDLESS)
    async for chunk in stream:
        if not chunk.index:
            await on_nats.cancel(stream.req_id)
    assert stream.reply is not None
    assert stream.reply.finish_reason == "cancelled"


async def test_the_node_with_the_most_room_is_taken(on_nats: Client, pair: Pair) -> None:
    await on_nats.list_models()
    http = await Client(pair.alpha.gateway_url).__aenter__()
    busy = [asyncio.create_task(http.infer("x", model="tiny", req_id=f"h{n}", **ENDLESS)) for n in range(3)]
    await runs("h2", pair.alpha)
    reports = await on_nats._link.connection.subscribe("monitoring.inference.tiny")  # type: ignore[attr-defined]
    while True:
        report = json.loads((await reports.next_msg(timeout=15)).data)
        await on_nats.list_models()
        if (report["node"], report["active_processing"]) == ("alpha", 3):
            break
    # Three, as the broker's own draw would find the right node half the time.
    await asyncio.gather(*(on_nats.infer("hello", model="tiny", **GREEDY) for _ in range(3)))
    ends = [
        event.source
        for event in pair.beta.events.subscribe(replay=True).drain()
        if isinstance(event, RequestFinished) and event.model == "tiny"
    ]
    assert ends == ["nats"] * 3
    for n in range(3):
        await http.cancel(f"h{n}")
    await asyncio.gather(*busy)
    await http.__aexit__(None, None, None)


async def test_http_reaches_the_models_of_other_nodes(pair: Pair) -> None:
    async with Client(pair.alpha.gateway_url, timeout_s=30) as client:
        async with asyncio.timeout(10):
            while not pair.alpha.forwarder.nodes("only-v1.5"):
                await asyncio.sleep(0.01)
        assert (await client.infer("hello", model="only-v1.5", **GREEDY)).tokens_out == 8
        assert await client.least_loaded(among=["only-v1.5"]) == "only-v1.5"
        task = asyncio.create_task(client.infer("hello", model="only-v1.5", req_id="far", **ENDLESS))
        await runs("far", pair.beta)
        await client.cancel("far")
        assert (await task).finish_reason == "cancelled"


async def test_a_generating_model_embeds_over_both(on_nats: Client, pair: Pair) -> None:
    told = await on_nats.embed(["hello", "you"], model="tiny")
    async with Client(pair.alpha.gateway_url) as http:
        assert (await http.embed(["hello", "you"], model="tiny")).vectors == told.vectors
    nc = await nats.connect(pair.url)
    try:
        copies = await nc.subscribe("here")
        body = {"input": "hello", "req_id": "e1"}
        both = json.dumps(body | {"reply_to": "here"}).encode()
        for subject in ("embedding.queue.tiny", "embedding.request.tiny"):
            if subject.startswith("embedding.queue"):
                assert json.loads((await nc.request(subject, both, timeout=5)).data)["stream"] == "INFERENCE_TINY"
            else:
                await nc.publish(subject, both)
            answer = json.loads((await copies.next_msg(timeout=10)).data)
            assert (answer["req_id"], answer["object"]) == ("e1", "list")
            assert answer["data"][0]["embedding"] == pytest.approx(told.vectors[0], abs=1e-5)
        # The same id for a text to go on with is another request.
        clash = await nc.request("inference.request.tiny", json.dumps(body).encode(), timeout=10)
        assert json.loads(clash.data)["code"] == "req_id_conflict"
    finally:
        await nc.close()


async def test_errors_are_the_nodes_own(client: Client) -> None:
    with pytest.raises(UnknownModel, match="nobody") as unknown:
        await client.infer("x", model="nobody", timeout_s=5)
    assert "tiny" in str(unknown.value)
    with pytest.raises(ContextLengthExceeded, match="context of one sequence is 16384") as long:
        await client.infer("x y " * 20_000, model="tiny")
    assert (long.value.status, long.value.param) == (400, "input")
    with pytest.raises(BadRequest, match="max_tokens"):
        await client.infer("x", model="tiny", max_tokens=0)
    with pytest.raises(BadRequest) as wrong:
        async for _ in client.stream("x", model="tiny", temperature=9):
            pass
    assert wrong.value.param == "params.temperature"
    with pytest.raises(BadRequest, match="mood"):
        await client.infer("x", model="tiny", mood="fine")
    for messages in ([], [{"role": "wizard", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(RequestError):
            await client.chat(messages, model="tiny")
    with pytest.raises((UnknownModel, RequestError)):
        await client.health("nobody")
    with pytest.raises(ClientError, match="cannot be written as JSON"):
        await client.infer("x", model="tiny", seed=object())


async def test_names_that_no_subject_may_hold(on_nats: Client) -> None:
    for name in ("", "*", ">", "a b", "a..b", "a.", ".a", "ü", "x" * 65):
        with pytest.raises(UnknownModel):
            await on_nats.health(name)
        with pytest.raises(UnknownModel):
            await on_nats.submit("x", model=name)


async def test_a_model_that_was_unloaded_says_so(on_nats: Client, pair: Pair) -> None:
    await on_nats.list_models()
    await pair.beta.unload("only-v1.5")
    with pytest.raises(RequestError, match=r"only-v1\.5 is (offline|on disk)") as error:
        await on_nats.infer("x", model="only-v1.5", timeout_s=1)
    assert error.value.code == "model_not_loaded"


async def test_a_payload_over_the_brokers_limit(on_nats: Client) -> None:
    with pytest.raises(RequestError) as error:
        await on_nats.infer("x" * (9 * 2**20), model="tiny")
    assert (error.value.status, error.value.code) == (413, "too_large")


async def test_nobody_there() -> None:
    port = free_port()
    for url in (f"nats://user:secret@127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
        with pytest.raises(Unreachable) as error:
            async with Client(url) as client:
                await client.infer("x", model="m")
        assert str(port) in str(error.value)
        assert "secret" not in str(error.value)


async def test_what_is_wrong_with_the_use() -> None:
    for url in ("", "127.0.0.1:5700", "ftp://x", "unix:///x"):
        with pytest.raises(ConfigError):
            Client(url)
    with pytest.raises(ClientError, match="async with"):
        await Client("http://x").infer("x", model="m")
    with pytest.raises(ConfigError, match="ticket"):
        Client("nats://x").job("{}")
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(Unsupported, match="nats"):
            await client.submit("x", model="m")
        with pytest.raises(ConfigError, match="subject"):
            await client.infer("x", subject="a.b")
    assert Client("nats://u:p@h:1, tls://t@i:2").shown == "nats://h:1,tls://i:2"


class Queue:
    """A durable queue of two, of a model that no node has, worked on by the test."""

    def __init__(self, nc: nats.NATS) -> None:
        self._js = nc.jetstream()
        self._nc = nc

    async def open(self) -> None:
        await self._js.add_stream(
            StreamConfig(
                name="ELSEWHERE",
                subjects=["inference.queue.elsewhere"],
                retention=RetentionPolicy.WORK_QUEUE,
                discard=DiscardPolicy.NEW,
                max_msgs=2,
            )
        )

    async def depth(self) -> int:
        return int((await self._js.stream_info("ELSEWHERE")).state.messages)

    async def take(self) -> dict[str, Any]:
        subscription = await self._js.pull_subscribe("inference.queue.elsewhere", durable="w", stream="ELSEWHERE")
        (message,) = await subscription.fetch(1, timeout=5)
        await message.ack_sync()
        await subscription.unsubscribe()
        body: dict[str, Any] = json.loads(message.data)
        return body

    async def answer(self, body: dict[str, Any], text: str) -> None:
        await self._nc.publish(body["reply_to"], json.dumps(_reply(body["req_id"], text)).encode())


def _reply(req_id: str, text: str) -> dict[str, Any]:
    return {
        "req_id": req_id,
        "text": text,
        "tokens_in": 1,
        "tokens_out": 1,
        "finish_reason": "stop",
        "duration_ms": 1,
        "ms": 1,
    }


@pytest.fixture
async def queue(pair: Pair) -> AsyncIterator[Queue]:
    nc = await nats.connect(pair.url)
    queue = Queue(nc)
    await queue.open()
    yield queue
    await nc.close()


async def test_submit_confirms_and_awaits(on_nats: Client, queue: Queue) -> None:
    job = await on_nats.submit("hello", model="elsewhere", req_id="j1", max_tokens=3)
    assert (job.id, job.model) == ("j1", "elsewhere")
    assert await queue.depth() == 1
    again = await on_nats.submit("hello", model="elsewhere", req_id="j1", max_tokens=3)
    assert await queue.depth() == 1
    body = await queue.take()
    assert (body["input"], body["params"], body["reply_to"]) == ("hello", {"max_tokens": 3}, "inference.reply.j1")
    await queue.answer(body, "done")
    assert (await job.result(timeout_s=5)).text == "done"
    assert again.ticket == job.ticket


async def test_a_full_queue_refuses(on_nats: Client, queue: Queue) -> None:
    for n in range(2):
        await on_nats.submit("hello", model="elsewhere", req_id=f"{n}")
    with pytest.raises(QueueFull, match="the durable queue of elsewhere is full"):
        await on_nats.submit("hello", model="elsewhere", req_id="third")
    assert await queue.depth() == 2


async def test_a_ticket_is_awaited_elsewhere_and_asks_again(on_nats: Client, pair: Pair, queue: Queue) -> None:
    ticket = (await on_nats.submit("hello", model="elsewhere", req_id="odd id.*")).ticket
    body = await queue.take()
    asked_again = asyncio.Event()

    async def respond(message: Any) -> None:
        assert json.loads(message.data) == body
        if not asked_again.is_set():
            asked_again.set()
            refusal = {"req_id": "odd id.*", "error": "wait", "code": "queue_full", "status": 429}
            await message.respond(json.dumps(refusal).encode())

    nc = await nats.connect(pair.url)
    try:
        await nc.subscribe("inference.request.elsewhere", cb=respond)
        await nc.flush()
        async with Client(pair.url) as other:
            waiting = asyncio.create_task(other.job(ticket).result(timeout_s=10))
            await asked_again.wait()
            await queue.answer(body, "late")
            assert (await waiting).text == "late"
    finally:
        await nc.close()


async def test_no_answer_to_a_job_in_time(on_nats: Client, queue: Queue) -> None:
    job = await on_nats.submit("hello", model="elsewhere")
    with pytest.raises(NoAnswer, match="goes on all the same"):
        await job.result(timeout_s=0.2)
    body = await queue.take()
    await queue.answer(body, "in the end")
    assert (await job.result(timeout_s=5)).text == "in the end"


async def test_a_stream_over_the_public_subject_is_told_of(on_nats: Client, pair: Pair) -> None:
    nc = await nats.connect(pair.url)
    try:
        await nc.jetstream().add_stream(name="GREEDY", subjects=["shop.orders"])
        with pytest.raises(ClientError, match="the stream GREEDY stores"):
            await on_nats.infer("x", subject="shop.orders")
    finally:
        await nc.close()


async def test_embeddings_have_the_contracts_shape(on_nats: Client, pair: Pair) -> None:
    """The answer in the contract's form; computing it is another test's business."""
    nc = await nats.connect(pair.url)

    async def respond(message: Any) -> None:
        body = json.loads(message.data)
        rows = [{"object": "embedding", "index": n, "embedding": [n, 1]} for n in range(len(body["input"]))]
        answer = {"object": "list", "data": rows[::-1], "model": "v", "usage": {"prompt_tokens": 5, "total_tokens": 5}}
        await message.respond(json.dumps(answer | {"req_id": message.headers["Infsvc-Req-Id"]}).encode())

    try:
        await nc.subscribe("embedding.request.v", cb=respond)
        await nc.flush()
        told = await on_nats.embed(["a", "b"], model="v")
        assert (told.vectors, told.tokens_in, told.model) == ([[0.0, 1.0], [1.0, 1.0]], 5, "v")
    finally:
        await nc.close()


async def test_the_connection_comes_back_after_the_broker_does(on_nats: Client, pair: Pair) -> None:
    assert (await on_nats.infer("hello", model="tiny", **GREEDY)).tokens_out == 8
    broker = pair.alpha.bus._broker
    assert broker is not None
    await broker.stop(grace_s=0)
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(ClientError, RequestError):
                assert (await on_nats.infer("hello", model="tiny", timeout_s=1, **GREEDY)).tokens_out == 8
                return
            await asyncio.sleep(0.1)
