"""The lifecycle of all models: each change is one event, and one that cannot load fails alone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from engine.engine import Engine
from engine.llama import LlamaContext
from engine.prompt import TEMPLATE_FILE
from engine.service import InferenceRequest
from infsvc.errors import UnknownModel
from infsvc.events import LogLine, ModelProgress, ModelStateChanged
from infsvc.types import Params
from tests.engine.parts import Node, running_node, worker_settings
from tests.tiny_models import write_tiny_model


@pytest.fixture
def home(tmp_path: Path, tiny_model: Path) -> Path:
    """A home folder with the model `a`."""
    put(tmp_path, "a", tiny_model.read_bytes())
    return tmp_path


def put(home: Path, name: str, content: bytes) -> Path:
    path = home / "data/models" / name / "model.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def endless(model: str = "a", **fields: Any) -> InferenceRequest:
    """A request that runs until its context is full."""
    params = Params(max_tokens=10**6, temperature=0, ignore_eos=True)
    return InferenceRequest(model=model, input="x", raw=True, params=params, **fields)


async def first_token(node: Node, request: InferenceRequest) -> Any:
    generation = await node.service.submit(request)
    async for _ in generation:
        break
    return generation


class Gate:
    """Holds every decode until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        decode, self.opened, self.reached = LlamaContext.decode, threading.Event(), threading.Event()

        def held(context: LlamaContext, batch: Any) -> int:
            self.reached.set()
            assert self.opened.wait(60)
            return decode(context, batch)

        monkeypatch.setattr(LlamaContext, "decode", held)

    def open(self) -> None:
        self.opened.set()

    async def someone(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)


async def test_a_load_goes_through_its_states_as_events(home: Path) -> None:
    async with running_node(home, worker_settings("a")) as node:
        worker = node.fleet.get("a")
        assert worker.state == "on_disk"
        assert node.fleet.load("a") is worker
        assert worker.state == "loading"
        await node.fleet.settled("a")
        assert worker.state == "ready"
        assert node.states("a") == ["loading", "ready"]
        assert worker.info is not None
        assert worker.info.name == "tiny"
        assert worker.health().status == "online"
        assert [row.code for row in node.sinks["a"].events] == ["model.loading", "model.loaded"]
        progress = [event for event in node.events if isinstance(event, ModelProgress)]
        assert progress[-1].done_bytes == progress[-1].total_bytes == worker.info.file_bytes
        await node.fleet.unload("a")
        assert node.states("a") == ["loading", "ready", "draining", "on_disk"]
        assert (worker.engine, worker.format) == (None, None)
    assert all(event.node == "here" for event in node.events)


async def test_load_of_what_is_loading_or_ready_does_nothing(home: Path) -> None:
    async with running_node(home, worker_settings("a")) as node:
        node.fleet.load("a")
        node.fleet.load("a")
        worker = await node.fleet.settled("a")
        engine = worker.engine
        node.fleet.load("a")
        await node.fleet.settled("a")
        assert worker.engine is engine
        assert node.states("a") == ["loading", "ready"]


async def test_one_that_cannot_load_fails_with_its_reason_and_the_others_go_on(home: Path, tiny_model: Path) -> None:
    data = tiny_model.read_bytes()
    put(home, "truncated", data[:-500])
    put(home, "garbage", b"<html>not found</html>")
    put(home, "empty", b"")
    (home / "data/models/folder/model.gguf").mkdir(parents=True)
    put(home, "broken-template", write_tiny_model(home / "t.gguf", chat_template="{% if %}").read_bytes())
    put(home, "broken-override", data).with_name(TEMPLATE_FILE).write_text("{")
    put(home, "ranks", write_tiny_model(home / "r.gguf", pooling=4).read_bytes())
    reasons = {
        "missing": "is missing",
        "truncated": "bytes are missing",
        "garbage": "not a GGUF",
        "empty": "is empty",
        "folder": "is a folder",
        "broken-template": "does not compile",
        "broken-override": TEMPLATE_FILE,
        "ranks": "a reranker",
    }
    async with running_node(home, *(worker_settings(name) for name in (*reasons, "a"))) as node:
        for name in (*reasons, "a"):
            node.fleet.load(name)
        for name, reason in reasons.items():
            worker = await node.fleet.settled(name)
            assert worker.state == "failed", name
            assert reason in (worker.reason or "")
            assert node.states(name) == ["loading", "failed"]
            assert worker.engine is None
            assert worker.health().reason == worker.reason
            assert node.sinks[name].events[-1].level == "error"
        assert (await node.fleet.settled("a")).state == "ready"
        assert (await node.service.complete(InferenceRequest(model="a", input="hi", params=Params(max_tokens=2)))).text
        failed = [event for event in node.events if isinstance(event, ModelStateChanged) and event.state == "failed"]
        assert {event.model for event in failed} == set(reasons)


async def test_too_large_for_the_limit_fails_with_figures_and_loads_with_force(home: Path) -> None:
    async with running_node(home, worker_settings("a"), memory_limit_bytes=2**20) as node:
        node.fleet.load("a")
        worker = await node.fleet.settled("a")
        assert worker.state == "failed"
        assert "GiB are free" in (worker.reason or "")
        node.fleet.load("a", force=True)
        assert (await node.fleet.settled("a")).state == "ready"


async def test_what_a_model_held_is_free_again_after_it(home: Path, tiny_model: Path) -> None:
    put(home, "b", tiny_model.read_bytes())
    # One of them takes some 18 MiB by the estimate.
    async with running_node(home, worker_settings("a"), worker_settings("b"), memory_limit_bytes=28 * 2**20) as node:
        await node.loaded("a")
        node.fleet.load("b")
        assert (await node.fleet.settled("b")).state == "failed"
        await node.fleet.unload("a")
        await node.loaded("b")


async def test_after_a_failure_it_can_be_loaded_again(home: Path, tiny_model: Path) -> None:
    async with running_node(home, worker_settings("late")) as node:
        worker = node.fleet.load("late")
        await node.fleet.settled("late")
        assert worker.state == "failed"
        put(home, "late", tiny_model.read_bytes())
        await node.loaded("late")
        assert worker.reason is None
        assert node.states("late") == ["loading", "failed", "loading", "ready"]


async def test_unload_of_a_failed_model_clears_it(home: Path) -> None:
    async with running_node(home, worker_settings("missing")) as node:
        worker = node.fleet.load("missing")
        await node.fleet.settled("missing")
        await node.fleet.unload("missing")
        assert (worker.state, worker.reason, worker.asked) == ("absent", None, False)


async def test_unload_lets_running_work_end(home: Path) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        generation = await first_token(node, endless())
        await node.fleet.unload("a", grace_s=60)
        reply = await generation.result()
        assert reply.finish_reason == "length"
        assert node.states("a")[-2:] == ["draining", "on_disk"]


async def test_unload_without_grace_cancels(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        gate = Gate(monkeypatch)
        generation = await node.service.submit(endless())
        await gate.someone()
        unloading = asyncio.create_task(node.fleet.unload("a", grace_s=0))
        while node.fleet.get("a").state == "ready":
            await asyncio.sleep(0)
        gate.open()
        await unloading
        assert (await generation.result()).finish_reason == "cancelled"
        assert node.sinks["a"].rows[-1].status == "cancelled"
        assert list(node.service.live()) == []


async def test_a_second_unload_ends_the_first_at_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        gate = Gate(monkeypatch)
        generation = await node.service.submit(endless())
        await gate.someone()
        first = asyncio.create_task(node.fleet.unload("a", grace_s=3600))
        while node.fleet.get("a").state != "draining":
            await asyncio.sleep(0)
        second = asyncio.create_task(node.fleet.unload("a"))
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, second)
        assert (await generation.result()).finish_reason == "cancelled"
        assert node.states("a") == ["loading", "ready", "draining", "on_disk"]


class SlowLoad:
    """Holds every engine's load until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        load, self.go, self.reached = Engine._load, threading.Event(), threading.Event()

        def held(engine: Engine) -> Any:
            self.reached.set()
            assert self.go.wait(60)
            return load(engine)

        monkeypatch.setattr(Engine, "_load", held)

    async def begun(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)


async def test_unload_while_loading_stops_the_load_and_is_no_failure(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_node(home, worker_settings("a")) as node:
        slow = SlowLoad(monkeypatch)
        node.fleet.load("a")
        await slow.begun()
        unloading = asyncio.create_task(node.fleet.unload("a"))
        await asyncio.sleep(0)
        slow.go.set()
        await unloading
        worker = node.fleet.get("a")
        assert (worker.state, worker.engine, worker.asked) == ("on_disk", None, False)
        assert node.states("a") == ["loading", "on_disk"]
        await node.loaded("a")


async def test_unload_of_what_is_loaded_and_not_yet_ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        reached.set()
        assert go.wait(60)

    async with running_node(home, worker_settings("a")) as node:
        monkeypatch.setattr("engine.fleet.load_prompt_format", slow)
        node.fleet.load("a")
        assert await asyncio.to_thread(reached.wait, 60)
        unloading = asyncio.create_task(node.fleet.unload("a"))
        await asyncio.sleep(0)
        go.set()
        await unloading
        assert node.states("a") == ["loading", "on_disk"]
        assert not [thread for thread in threading.enumerate() if thread.name == "engine-a"]


async def test_unload_before_the_header_is_read_stops_the_load(home: Path) -> None:
    async with running_node(home, worker_settings("a")) as node:
        node.fleet.load("a")
        await node.fleet.unload("a")
        assert node.states("a") == ["loading", "on_disk"]


async def test_load_while_a_load_is_being_stopped_ends_loaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_node(home, worker_settings("a")) as node:
        slow = SlowLoad(monkeypatch)
        node.fleet.load("a")
        await slow.begun()
        unloading = asyncio.create_task(node.fleet.unload("a"))
        await asyncio.sleep(0)
        node.fleet.load("a")
        slow.go.set()
        worker = await node.fleet.settled("a")
        await unloading
        assert worker.state == "ready"
        assert node.states("a") == ["loading", "on_disk", "loading", "ready"]


async def test_load_while_draining_ends_loaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        gate = Gate(monkeypatch)
        generation = await node.service.submit(endless())
        await gate.someone()
        unloading = asyncio.create_task(node.fleet.unload("a", grace_s=3600))
        while node.fleet.get("a").state != "draining":
            await asyncio.sleep(0)
        worker = node.fleet.load("a")
        node.fleet.load("a")
        assert worker.state == "draining"
        gate.open()
        assert (await generation.result()).finish_reason == "length"
        await node.fleet.settled("a")
        await unloading
        assert worker.state == "ready"
        assert node.states("a") == ["loading", "ready", "draining", "on_disk", "loading", "ready"]


async def test_the_last_word_counts_while_draining(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        gate = Gate(monkeypatch)
        await node.service.submit(endless())
        await gate.someone()
        first = asyncio.create_task(node.fleet.unload("a", grace_s=3600))
        while node.fleet.get("a").state != "draining":
            await asyncio.sleep(0)
        node.fleet.load("a")
        last = asyncio.create_task(node.fleet.unload("a"))
        await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(first, last)
        await node.fleet.settled("a")
        assert node.states("a") == ["loading", "ready", "draining", "on_disk"]


class ForcedFault(Exception):
    """A fault that no model gives on request."""


async def test_an_engine_that_dies_is_a_failed_model_that_loads_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_node(home, worker_settings("a")) as node:
        await node.loaded("a")
        worker = node.fleet.get("a")
        failed = asyncio.Event()

        def watch(event: object) -> None:
            if isinstance(event, ModelStateChanged) and event.state == "failed":
                failed.set()

        worker._events.listen(watch)

        def fail(*_: object) -> int:
            raise ForcedFault("forced")

        with monkeypatch.context() as patch:
            patch.setattr(LlamaContext, "decode", fail)
            generation = await node.service.submit(endless())
            await generation.ended()
            await failed.wait()
        assert worker.state == "failed"
        assert "forced" in (worker.reason or "")
        assert node.sinks["a"].rows[-1].status == "error"
        await node.loaded("a")


async def test_a_fault_outside_the_known_ones_frees_the_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ForcedFault("forced")

    async with running_node(home, worker_settings("a")) as node:
        monkeypatch.setattr("engine.fleet.load_prompt_format", fail)
        node.fleet.load("a")
        worker = await node.fleet.settled("a")
        assert worker.state == "failed"
        assert "forced" in (worker.reason or "")
        assert not [thread for thread in threading.enumerate() if thread.name == "engine-a"]


async def test_scan_learns_what_is_on_disk_without_loading(home: Path) -> None:
    put(home, "garbage", b"no")
    async with running_node(home, worker_settings("a"), worker_settings("garbage"), worker_settings("missing")) as node:
        node.fleet.scan()
        for name in ("a", "garbage", "missing"):
            await node.fleet.settled(name)
        info = node.fleet.get("a").info
        assert info is not None
        assert info.n_params > 0
        assert node.fleet.get("a").health().capabilities == ["text-generation", "embeddings", "grammar-constrained"]
        assert node.fleet.get("garbage").state == "on_disk"
        assert [event.code for event in node.events if isinstance(event, LogLine)] == ["model.unreadable"]
        await node.loaded("a")


async def test_an_unknown_model_names_the_known_ones(home: Path) -> None:
    async with running_node(home, worker_settings("a")) as node:
        for call in (node.fleet.get, node.fleet.load):
            with pytest.raises(UnknownModel, match="'b'; there are: a"):
                call("b")
        with pytest.raises(UnknownModel):
            await node.fleet.unload("b")


async def test_close_ends_everything(home: Path, tiny_model: Path) -> None:
    put(home, "b", tiny_model.read_bytes())
    async with running_node(home, worker_settings("a"), worker_settings("b")) as node:
        await node.loaded("a")
        generation = await first_token(node, endless())
        node.fleet.load("b")
        await node.fleet.close()
        assert generation.finished
        assert {worker.state.value for worker in node.fleet.workers.values()} == {"on_disk"}
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine-")]
