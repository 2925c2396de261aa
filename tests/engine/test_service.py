"""The one path of every request: who is admitted, who is refused and why, and a row for each."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.llama import LlamaContext
from engine.service import InferenceRequest
from engine.worker import Worker
from infsvc.errors import (
    AuditUnavailable,
    BadRequest,
    ContextLengthExceeded,
    Draining,
    EngineFailed,
    ModelNotLoaded,
    QueueFull,
    UnknownModel,
)
from infsvc.events import RequestFinished, RequestStarted
from infsvc.types import CompletionRequest, Message, Params
from tests.engine.parts import Node, running_node, worker_settings
from tests.engine.test_fleet import ForcedFault, Gate, put
from tests.tiny_models import CHATML, write_tiny_model


@pytest.fixture
async def node(tmp_path: Path, tiny_model: Path) -> AsyncIterator[Node]:
    """A node with the model `a` loaded: two slots, two places in the queue."""
    put(tmp_path, "a", tiny_model.read_bytes())
    put(tmp_path, "b", tiny_model.read_bytes())
    settings = worker_settings("a", queue_max_msgs=2)
    async with running_node(tmp_path, settings, worker_settings("b")) as node:
        await node.loaded("a")
        yield node


def ask(text: str | None = "hello", *, model: str = "a", **fields: Any) -> InferenceRequest:
    """A request; greedy and short unless its params say otherwise."""
    params = Params(**{"temperature": 0, "max_tokens": 4, "ignore_eos": True} | fields.pop("params", {}))
    return InferenceRequest(model=model, input=text, params=params, **fields)


LONG = {"max_tokens": 10**6}


async def test_a_reply_and_its_row(node: Node) -> None:
    request = ask(req_id="r1", trace_id="t1", source="nats", reply_to="inbox.1", params={"max_tokens": 6, "top_k": 7})
    reply = await node.service.complete(request)
    assert (reply.req_id, reply.finish_reason, reply.tokens_out) == ("r1", "length", 6)
    assert reply.text
    assert reply.ms == reply.duration_ms >= 0
    assert (reply.reasoning, reply.tool_calls, reply.error) == (None, None, None)
    (row,) = node.sinks["a"].rows
    formatted = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (row.req_id, row.trace_id, row.source, row.reply_to) == ("r1", "t1", "nats", "inbox.1")
    assert (row.raw_input, row.input_len, row.formatted_input) == ("hello", 5, formatted)
    assert (row.response_text, row.tokens_in, row.tokens_out) == (reply.text, reply.tokens_in, 6)
    assert (row.status, row.error, row.finish_reason) == ("ok", None, "length")
    assert json.loads(row.params_json) == {"temperature": 0.0, "max_tokens": 6, "top_k": 7, "ignore_eos": True}
    assert row.worker_id == "here-0"
    assert 0 <= (row.ttft_ms or -1) <= row.dur_ms
    started, finished = (event for event in node.events if isinstance(event, RequestStarted | RequestFinished))
    assert (started.req_id, started.source, started.tokens_in) == ("r1", "nats", reply.tokens_in)  # type: ignore[union-attr]
    assert (finished.finish_reason, finished.tokens_out) == ("length", 6)  # type: ignore[union-attr]


async def test_a_request_of_one_token_names_its_slot_too(node: Node) -> None:
    """It has given its slot back before the loop hears that it got one."""
    await node.service.complete(ask(params={"max_tokens": 1}))
    assert node.sinks["a"].rows[0].worker_id == "here-0"


async def test_the_chunks_are_the_reply(node: Node) -> None:
    generation = await node.service.submit(ask(params={"max_tokens": 30}))
    chunks = [chunk async for chunk in generation]
    reply = await generation.result()
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert len(chunks) > 1
    assert all(chunk.text or chunk.reasoning for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks) == reply.text


async def test_messages_are_rendered_and_kept_as_json(node: Node) -> None:
    talk = (Message(role="system", content="be kind"), Message(role="user", content="é"))
    await node.service.complete(ask(None, messages=talk))
    row = node.sinks["a"].rows[0]
    assert json.loads(row.raw_input) == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "é"}]
    assert (
        row.formatted_input
        == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_raw_reaches_the_model_as_it_is(node: Node) -> None:
    reply = await node.service.complete(ask("<|im_start|>x", raw=True))
    assert reply.tokens_in == 2
    assert node.sinks["a"].rows[0].formatted_input == "<|im_start|>x"


async def test_raw_without_a_text_is_refused(node: Node) -> None:
    with pytest.raises(BadRequest, match="input"):
        await node.service.submit(ask(None, messages=(Message(role="user", content="x"),), raw=True))


@pytest.mark.parametrize("answer", ["plain", "raw"])
async def test_reasoning_is_told_apart_save_in_raw_mode(tmp_path: Path, answer: str) -> None:
    template = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    path = write_tiny_model(tmp_path / "m.gguf", chat_template=template, special=("<think>", "</think>"))
    put(tmp_path, "a", path.read_bytes())
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        generation = await node.service.submit(ask(raw=answer == "raw"))
        chunks = [chunk async for chunk in generation]
        reply = await generation.result()
        text, reasoning = (reply.text, None) if answer == "raw" else ("", reply.reasoning)
        assert (reply.text, reply.reasoning) == (text, reasoning)
        assert text or reasoning
        assert "".join(chunk.reasoning for chunk in chunks) == (reasoning or "")
        assert node.sinks["a"].rows[0].reasoning == reasoning


async def test_a_repeats_row_keeps_the_calls_of_the_answer(node: Node) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"city": "Åre"}'}}]
    node.service.answered_again(ask(), {"text": "I look.", "tool_calls": calls, "tokens_out": 3})
    node.service.answered_again(ask(), {"text": "", "tool_calls": calls})
    node.service.answered_again(ask(), {"text": "plain"})
    first, second, third = (row.response_text or "" for row in node.sinks["a"].rows)
    text, _, told = first.partition("\n")
    assert (text, json.loads(told), json.loads(second), third) == ("I look.", calls, calls, "plain")
    assert "Åre" in first


async def test_without_a_template_only_raw_is_served(tmp_path: Path) -> None:
    put(tmp_path, "a", write_tiny_model(tmp_path / "m.gguf", chat_template=None).read_bytes())
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        with pytest.raises(BadRequest, match=r"no chat template.*prompt_template\.json"):
            await node.service.submit(ask())
        assert (await node.service.complete(ask(raw=True))).tokens_out == 4


# -- refused -------------------------------------------------------------------------------------------------------


def rejected(node: Node, model: str = "a") -> tuple[str, str | None]:
    (row,) = node.sinks[model].rows
    assert (row.response_text, row.formatted_input, row.tokens_out, row.worker_id) == (None, None, 0, "here")
    assert row.raw_input == "hello"
    return row.status, row.error


async def test_an_unknown_model(node: Node) -> None:
    with pytest.raises(UnknownModel):
        await node.service.submit(ask(model="nobody"))
    assert node.sinks["a"].rows == []


async def test_a_model_that_is_not_loaded(node: Node) -> None:
    with pytest.raises(ModelNotLoaded, match="b is on disk: load it") as caught:
        await node.service.submit(ask(model="b"))
    assert (caught.value.status, caught.value.code) == (503, "model_not_loaded")
    status, error = rejected(node, "b")
    assert status == "rejected"
    assert (error or "").startswith("model_not_loaded: b is on disk")


async def test_a_node_and_a_model_on_their_way_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    running = await node.service.submit(ask())
    await gate.someone()
    unloading = asyncio.create_task(node.fleet.unload("a", grace_s=60))
    while node.fleet.get("a").state == "ready":
        await asyncio.sleep(0)
    with pytest.raises(Draining, match="a is being unloaded"):
        await node.service.submit(ask())
    assert rejected(node)[0] == "rejected"
    gate.open()
    await unloading
    assert (await running.result()).finish_reason == "length"
    node.service.draining = True
    with pytest.raises(Draining, match="shutting down"):
        await node.service.submit(ask(model="b"))


async def test_the_queue_is_full_with_figures(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    taken = [await node.service.submit(ask()) for _ in range(4)]
    worker = node.fleet.get("a")
    assert (worker.n_active, worker.n_waiting, worker.level) == (2, 2, "critical")
    with pytest.raises(QueueFull, match="a has 2 requests waiting and room for 2: try again in") as caught:
        await node.service.submit(ask())
    assert (caught.value.n_waiting, caught.value.capacity) == (2, 2)
    assert 1 <= caught.value.retry_after_s <= 60
    assert rejected(node)[0] == "rejected"
    gate.open()
    for each in taken:
        await each.result()
    assert (await node.service.complete(ask())).finish_reason == "length"
    assert worker.level == "healthy"


async def test_those_whose_prompt_is_being_read_count_too(node: Node) -> None:
    """Ten at once find four places, whatever the order in which their prompts are rendered."""
    answers = await asyncio.gather(*(node.service.complete(ask()) for _ in range(10)), return_exceptions=True)
    assert sum(isinstance(each, QueueFull) for each in answers) == 6
    assert node.fleet.get("a").n_in_flight == 0


async def test_a_prompt_longer_than_the_context_names_both_counts(node: Node) -> None:
    with pytest.raises(
        ContextLengthExceeded, match="the prompt has 256 tokens and the context of one sequence is 256"
    ) as caught:
        await node.service.submit(ask("x" * 256, raw=True))
    assert (caught.value.n_prompt_tokens, caught.value.n_ctx) == (256, 256)
    row = node.sinks["a"].rows[0]
    assert (row.status, row.tokens_in) == ("rejected", 256)
    assert (await node.service.complete(ask("x" * 255, raw=True))).tokens_out == 1


async def test_nothing_to_read(node: Node) -> None:
    with pytest.raises(BadRequest, match="no tokens") as caught:
        await node.service.submit(ask("", raw=True))
    assert caught.value.param == "input"


async def test_an_audit_log_that_takes_no_more(node: Node) -> None:
    node.sinks["a"].unavailable = "the disk is full"
    with pytest.raises(AuditUnavailable, match="the disk is full"):
        await node.service.submit(ask())
    node.sinks["a"].unavailable = None
    assert (await node.service.complete(ask())).text


async def test_a_fault_while_the_prompt_is_read_leaves_a_row(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ForcedFault("forced")

    monkeypatch.setattr(Worker, "prompt", fail)
    with pytest.raises(ForcedFault):
        await node.service.submit(ask())
    status, error = rejected(node)
    assert status == "error"
    assert "forced" in (error or "")
    assert node.fleet.get("a").n_in_flight == 0


async def test_an_engine_that_ended_under_the_prompt_is_an_engine_failure(node: Node) -> None:
    engine = node.fleet.get("a").engine
    assert engine is not None
    engine.close()
    assert await asyncio.to_thread(engine.join, 20.0)
    with pytest.raises(EngineFailed, match="closed"):
        await node.service.submit(ask())
    assert rejected(node)[0] == "error"


async def test_a_client_that_leaves_while_its_prompt_is_read_leaves_a_row(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, reached, go = Worker.prompt, threading.Event(), threading.Event()

    def slow(worker: Worker, **what: Any) -> Any:
        reached.set()
        assert go.wait(60)
        return prompt(worker, **what)

    monkeypatch.setattr(Worker, "prompt", slow)
    submitting = asyncio.create_task(node.service.submit(ask()))
    await asyncio.to_thread(reached.wait, 60)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    go.set()
    assert rejected(node)[0] == "cancelled"
    assert node.fleet.get("a").n_in_flight == 0
    assert list(node.service.live()) == []


# -- cancel, errors, drain -----------------------------------------------------------------------------------------


async def test_leaving_the_block_cancels(node: Node) -> None:
    async with await node.service.submit(ask(params=LONG)) as generation:
        async for _ in generation:
            break
    reply = await generation.result()
    assert reply.finish_reason == "cancelled"
    (row,) = node.sinks["a"].rows
    assert (row.status, row.finish_reason, row.response_text) == ("cancelled", "cancelled", reply.text)
    assert row.tokens_out == reply.tokens_out >= 1
    generation.cancel()


async def test_a_task_that_is_cancelled_stops_its_own_generation_and_no_other(node: Node) -> None:
    leaving = asyncio.create_task(node.service.complete(ask(req_id="leaving", params=LONG)))
    other = asyncio.create_task(node.service.complete(ask(req_id="other", params={"max_tokens": 200})))
    while len(list(node.service.live())) < 2:
        await asyncio.sleep(0)
    found = node.service.find("leaving")
    assert found is not None
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await found.ended()
    reply = await other
    assert reply.finish_reason == "length"
    assert {row.req_id: row.status for row in node.sinks["a"].rows} == {"leaving": "cancelled", "other": "ok"}


async def test_live_and_find(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    generations = [await node.service.submit(ask(req_id=f"r{n}")) for n in range(3)]
    assert list(node.service.live()) == generations
    assert node.service.find("r1") is generations[1]
    assert node.service.find("nobody") is None
    facts = generations[2].facts()
    assert (facts["req_id"], facts["state"], facts["model"]) == ("r2", "waiting", "a")
    gate.open()
    for each in generations:
        await each.result()
    assert list(node.service.live()) == []
    assert node.service.find("r1") is None


async def test_one_id_twice_is_two_requests(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    both = [await node.service.submit(ask(req_id="same")) for _ in range(2)]
    assert list(node.service.live()) == both
    assert node.service.find("same") is both[0]
    gate.open()
    replies = [await each.result() for each in both]
    assert [reply.req_id for reply in replies] == ["same", "same"]
    assert [row.req_id for row in node.sinks["a"].rows] == ["same", "same"]


async def test_an_engine_that_dies_is_told_to_all_and_leaves_rows(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()

    def fail(*_: object) -> int:
        assert go.wait(60)
        raise ForcedFault("forced")

    monkeypatch.setattr(LlamaContext, "decode", fail)
    generations = [await node.service.submit(ask()) for _ in range(3)]
    go.set()
    with pytest.raises(EngineFailed, match="forced"):
        await generations[0].result()
    with pytest.raises(EngineFailed, match="forced"):
        _ = [chunk async for chunk in generations[1]]
    await generations[2].ended()
    assert [(row.status, row.finish_reason) for row in node.sinks["a"].rows] == [("error", "error")] * 3
    assert all("forced" in (row.error or "") for row in node.sinks["a"].rows)


async def test_a_row_that_cannot_be_taken_does_not_hold_the_reader(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ForcedFault("forced")

    monkeypatch.setattr(node.sinks["a"], "record", fail)
    generation = await node.service.submit(ask())
    assert [chunk async for chunk in generation]
    assert (await generation.result()).finish_reason == "length"


async def test_drain_lets_what_runs_end_and_refuses_the_rest(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    generation = await node.service.submit(ask(params={"max_tokens": 20}))
    draining = asyncio.create_task(node.service.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await node.service.submit(ask())
    gate.open()
    await draining
    assert (await generation.result()).finish_reason == "length"


async def test_drain_without_grace_cancels(node: Node) -> None:
    generation = await node.service.submit(ask(params=LONG))
    async for _ in generation:
        break
    await node.service.drain(0)
    assert generation.finished
    assert (await generation.result()).finish_reason == "cancelled"
    await node.service.drain(0)


# -- which model, which fields -------------------------------------------------------------------------------------


async def test_the_only_ready_model_needs_no_name(node: Node) -> None:
    assert node.service.resolve(None).name == "a"
    assert node.service.resolve("b").name == "b"
    with pytest.raises(UnknownModel):
        node.service.resolve("nobody")
    await node.loaded("b")
    with pytest.raises(BadRequest, match="a, b") as caught:
        node.service.resolve(None)
    assert caught.value.param == "model"


def test_from_the_wire() -> None:
    body = CompletionRequest(input="hi", raw=True, priority=3, reply_to="x", req_id="r", params=Params(seed=5))
    request = InferenceRequest.from_wire(body, model="a", source="nats", trace_id="header")
    assert (request.input, request.raw, request.priority, request.reply_to) == ("hi", True, 3, "x")
    assert (request.req_id, request.trace_id, request.model, request.source) == ("r", "header", "a", "nats")
    assert request.params.seed == 5
    named = CompletionRequest(input="hi", trace_id="body")
    request = InferenceRequest.from_wire(named, model="a", source="http", trace_id="header")
    assert request.trace_id == "body"
    assert len(request.req_id) == 16


async def test_the_documents_of_a_loaded_model(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    await node.service.complete(ask())
    worker = node.fleet.get("a")
    gate = Gate(monkeypatch)
    waiting = [await node.service.submit(ask()) for _ in range(3)]
    health = worker.health()
    assert (health.model_name, health.status, health.node, health.endpoint) == (
        "a",
        "online",
        "here",
        "http://127.0.0.1/a",
    )
    assert health.nats_topic == "inference.request.a"
    assert health.capabilities == ["text-generation", "embeddings", "grammar-constrained"]
    assert health.model_info is not None
    assert health.model_info.model_dump() == {
        "architecture": "llama",
        "modalities": ["text", "embeddings"],
        "parameter_count": "91K",
        "context_size": 256,
        "embedding_size": 64,
        "quantization": "Q8_0",
        "model_family": "llama",
    }
    metrics = health.queue_metrics
    assert (metrics.pending_messages, metrics.active_processing, metrics.total_processed) == (1, 2, 1)
    assert metrics.queue_capacity == 2
    assert (metrics.last_processed_time or "").endswith("Z")
    assert health.backpressure_status.model_dump() == {"level": "healthy", "utilization": 0.5, "threshold": 5}
    report = worker.report()
    assert (report.pending_messages, report.active_processing, report.worker_count, report.status) == (
        1,
        2,
        2,
        "healthy",
    )
    gate.open()
    for each in waiting:
        await each.result()
