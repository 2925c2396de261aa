"""A model in a process of its own: it answers as a thread does, and what ends it ends nobody else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from engine import model_process, restarts
from engine.embedding import EmbeddingRequest
from engine.embedding_job import EmbeddingJob
from engine.generation import Generation
from engine.isolated import JOB_SENT, SENT, IsolatedEngine
from engine.restarts import Restarts
from engine.sequence import Sequence
from engine.service import InferenceRequest
from engine.worker import Worker
from infsvc.errors import BadRequest, EngineLost, GrammarInvalid, ModelNotLoaded, SchemaInvalid
from infsvc.events import LogLine
from infsvc.settings import WorkerSettings
from infsvc.types import Message, ModelState, Params
from tests.bert_files import random_bert, write_bert
from tests.engine.faulty_child import ABORTS, HANGS
from tests.engine.gguf_files import rewrite
from tests.engine.parts import Node, running_node, worker_settings

ROOT = Path(__file__).parents[2]
SHORT: dict[str, Any] = {"max_tokens": 12, "ignore_eos": True, "temperature": 0}
LONG: dict[str, Any] = SHORT | {"max_tokens": 1500}


def isolated(name: str, **keys: Any) -> WorkerSettings:
    return worker_settings(name, **{"engine_isolation": "process", "ctx_size": 2048} | keys)


def put(root: Path, model: Path, *names: str) -> None:
    for name in names:
        target = root / f"data/models/{name}/model.gguf"
        target.parent.mkdir(parents=True)
        target.symlink_to(model)


def ask(model: str, text: str = "hi there", *, params: dict[str, Any] = SHORT, **more: Any) -> InferenceRequest:
    return InferenceRequest(model=model, **{"input": text, "raw": True, "params": Params(**params)} | more)


def pid_of(worker: Worker) -> int:
    running = worker.engine or worker.embedder
    assert running is not None
    pid = running.process.pid  # type: ignore[union-attr]
    assert pid is not None
    return pid


async def streaming(node: Node, model: str) -> Generation:
    """A long answer that has begun."""
    generation = await node.service.submit(ask(model, params=LONG))
    async for _ in generation:
        break
    return generation


async def state(node: Node, model: str, wanted: ModelState) -> None:
    """Waits for a state that the model reaches by itself."""
    while (await node.fleet.settled(model)).state is not wanted:
        await asyncio.sleep(0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts after a loss come at once."""
    monkeypatch.setattr(restarts, "_FIRST_S", 0.01)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """Processes in which certain prompts force a fault."""
    monkeypatch.setattr(model_process, "COMMAND", (sys.executable, "-m", "tests.engine.faulty_child"))


@asynccontextmanager
async def loaded(root: Path, model: Path, *settings: WorkerSettings) -> AsyncIterator[Node]:
    put(root, model, *(each.model_name for each in settings))
    async with running_node(root, *settings) as node:
        for each in settings:
            node.fleet.load(each.model_name)
        for each in settings:
            await node.loaded(each.model_name)
        yield node


async def test_it_answers_as_a_thread_does(tmp_path: Path, tiny_model: Path) -> None:
    thread = worker_settings("t", ctx_size=2048)
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}}, "required": ["a"]}
    messages = {"raw": False, "input": None, "messages": (Message(role="user", content="hello"),)}
    async with loaded(tmp_path, tiny_model, thread, isolated("p")) as node:

        async def both(**given: Any) -> tuple[Generation, Generation]:
            generations = [await node.service.submit(ask(model, **given)) for model in ("t", "p")]
            for generation in generations:
                await generation.result()
            return generations[0], generations[1]

        for given in (
            {},
            {"params": SHORT | {"temperature": 1.2, "seed": 7, "top_k": 20, "repeat_penalty": 1.3}},
            {"params": SHORT | {"logit_bias": {66: 50.0}, "stop": ["BBB"]}},
            {"params": SHORT | {"draft_max": 4}, "text": "xy " * 30},
            {"params": {"max_tokens": 40, "grammar": 'root ::= "yes" | "no"'}},
            {"params": {"max_tokens": 40, "temperature": 0, "json_schema": schema}},
            {"n_logprobs": 3, "priority": 5},
            messages,
        ):
            here, there = await both(**given)
            assert here.reply is not None
            assert there.reply is not None
            told = {"text", "tokens_in", "tokens_out", "tokens_cached", "finish_reason", "reasoning"}
            assert there.reply.model_dump(include=told) == here.reply.model_dump(include=told)
            assert [each.drawn.token for each in there.logprobs] == [each.drawn.token for each in here.logprobs]
            assert there.formatted == here.formatted
            assert there.ttft_ms is not None
        assert [len(each.top) for each in (await both(n_logprobs=3))[1].logprobs] == [3] * 12

        vectors = [
            (await (await node.service.embed(EmbeddingRequest(model=model, input=["one", "and two"]))).result()).vectors
            for model in ("t", "p")
        ]
        np.testing.assert_array_equal(*vectors)
        for error, given in (
            (GrammarInvalid, {"params": {"grammar": "root ::= nothing"}}),
            (SchemaInvalid, {"params": {"json_schema": {"type": "of_tea"}}}),
            (BadRequest, {"params": SHORT | {"logit_bias": {9999: 1.0}}}),
        ):
            for model in ("t", "p"):
                with pytest.raises(error) as refused:
                    await node.service.submit(ask(model, **given))
            assert refused.value.param
        here, there = (node.fleet.get(name) for name in ("t", "p"))
        assert there.counters.n_decode_tokens == here.counters.n_decode_tokens > 0
        assert there.counters.prefix_reuse == here.counters.prefix_reuse
        assert there.n_ctx == here.n_ctx
        assert there.n_process_bytes > 2**20
        assert here.n_process_bytes == 0
        running = await streaming(node, "p")
        running.cancel()
        assert (await running.result()).finish_reason == "cancelled"
        pid = pid_of(there)
        running = await streaming(node, "p")
        await node.fleet.unload("p", grace_s=0)
        assert (await running.result()).finish_reason == "cancelled"
        assert there.state is ModelState.ON_DISK
        assert not psutil.pid_exists(pid)


async def test_an_embedding_model_has_its_process_too(tmp_path: Path, quick: None) -> None:
    model = write_bert(tmp_path / "m.gguf", random_bert())
    settings = isolated("e", model_format="embedding", ctx_size=64)
    request = EmbeddingRequest(model="e", input=[[5, 6, 7], [8, 9]])
    async with loaded(tmp_path, model, settings) as node:
        before = (await (await node.service.embed(request)).result()).vectors
        os.kill(pid_of(node.fleet.get("e")), signal.SIGSTOP)
        held = await node.service.embed(request)
        os.kill(pid_of(node.fleet.get("e")), signal.SIGKILL)
        with pytest.raises(EngineLost, match="SIGKILL"):
            await held.result()
        await state(node, "e", ModelState.READY)
        np.testing.assert_array_equal((await (await node.service.embed(request)).result()).vectors, before)


async def test_what_ends_one_model_leaves_the_rest_alone(tmp_path: Path, tiny_model: Path, quick: None) -> None:
    async with loaded(tmp_path, tiny_model, isolated("a"), isolated("b")) as node:
        a = node.fleet.get("a")
        whole = await node.service.complete(ask("b", params=LONG))
        for n, number in enumerate((signal.SIGABRT, signal.SIGSEGV), start=1):
            beside = await streaming(node, "b")
            of_a = [await streaming(node, "a") for _ in range(2)]
            of_a += [await node.service.submit(ask("a")) for _ in range(3)]  # two slots: they wait
            os.kill(pid_of(a), number)
            for each in of_a:
                with pytest.raises(EngineLost, match=number.name) as lost:
                    await each.result()
                assert (lost.value.status, lost.value.code, lost.value.headers) == (
                    503,
                    "engine_lost",
                    {"Retry-After": "2"},
                )
            assert a.requests == {}
            with pytest.raises(ModelNotLoaded, match="loading"):
                await node.service.submit(ask("a"))
            await state(node, "a", ModelState.READY)
            assert a.restarts.n == n
            assert (await node.service.complete(ask("a"))).finish_reason == "length"
            assert (await beside.result()).text == whole.text
        assert node.states("a") == ["loading", "ready"] * 3
        assert node.states("b") == ["loading", "ready"]
        told = [event for event in node.events if isinstance(event, LogLine) and event.code == "model.lost"]
        assert [event.level for event in told] == ["error", "error"]
        assert "SIGABRT" in told[0].msg
        rows = [row for row in node.sinks["a"].rows if row.status == "error"]
        assert len(rows) == 10
        assert "SIGABRT" in (rows[0].error or "")


async def test_a_request_that_aborts_llama_cpp_every_time_ends_with_a_failed_model(
    tmp_path: Path, tiny_model: Path, faulty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "N_MAX", 1)
    async with loaded(tmp_path, tiny_model, isolated("a")) as node:
        with pytest.raises(EngineLost, match="SIGABRT"):
            await node.service.complete(ask("a", f"this {chr(ABORTS)}"))
        await state(node, "a", ModelState.READY)
        with pytest.raises(EngineLost, match="SIGABRT"):
            await node.service.complete(ask("a", f"this {chr(ABORTS)}"))
        worker = node.fleet.get("a")
        assert worker.state is ModelState.FAILED
        assert "lost 2 times" in (worker.reason or "")
        assert "SIGABRT" in (worker.reason or "")
        with pytest.raises(ModelNotLoaded, match="failed"):
            await node.service.submit(ask("a"))
        await node.loaded("a")  # somebody wants it all the same
        assert (await node.service.complete(ask("a"))).finish_reason == "length"
        assert (worker.restarts.n, worker.restarts.n_ever) == (0, 2)


async def test_a_hung_step_is_noticed_and_its_process_replaced(tmp_path: Path, tiny_model: Path, faulty: None) -> None:
    async with loaded(tmp_path, tiny_model, isolated("a")) as node:
        before = pid_of(node.fleet.get("a"))
        with pytest.raises(EngineLost, match="has not ended in"):
            await node.service.complete(ask("a", f"this {chr(HANGS)}"))
        await state(node, "a", ModelState.READY)
        assert pid_of(node.fleet.get("a")) != before
        assert not psutil.pid_exists(before)
        assert (await node.service.complete(ask("a"))).finish_reason == "length"


async def test_a_process_that_says_nothing_is_ended_and_so_is_one_that_does_not_leave(
    tmp_path: Path, tiny_model: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_process, "SILENT_AFTER_S", 1.0)
    monkeypatch.setattr(model_process, "_CLOSE_S", 0.05)
    async with loaded(tmp_path, tiny_model, isolated("a")) as node:
        os.kill(pid_of(node.fleet.get("a")), signal.SIGSTOP)
        # Its prompt cannot even be tokenised.
        with pytest.raises(EngineLost, match="said nothing for 1 s"):
            await node.service.submit(ask("a"))
        await state(node, "a", ModelState.READY)
        monkeypatch.setattr(model_process, "SILENT_AFTER_S", 60.0)
        pid = pid_of(node.fleet.get("a"))
        os.kill(pid, signal.SIGSTOP)
        await node.fleet.unload("a", grace_s=0)
        assert node.fleet.get("a").state is ModelState.ON_DISK
        assert not psutil.pid_exists(pid)


async def test_an_unload_ends_the_wait_for_the_next_start(tmp_path: Path, tiny_model: Path) -> None:
    async with loaded(tmp_path, tiny_model, isolated("a")) as node:
        restarts_of = node.fleet.get("a").restarts
        for _ in range(4):
            restarts_of.lost()  # the next pause is 8 s
        os.kill(pid_of(node.fleet.get("a")), signal.SIGKILL)
        while node.fleet.get("a").state is ModelState.READY:
            await asyncio.sleep(0)
        await node.fleet.unload("a")
        assert node.fleet.get("a").state is ModelState.ON_DISK
        assert node.states("a")[-2:] == ["loading", "on_disk"]


async def test_a_process_that_dies_while_it_loads_fails_the_model(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_process, "COMMAND", (sys.executable, "-c", "import os; os.abort()"))
    put(tmp_path, tiny_model, "a")
    put(tmp_path, rewrite(tiny_model, tmp_path / "bad.gguf", drop=("tokenizer.ggml.merges",)), "bad")
    async with running_node(tmp_path, isolated("a"), isolated("bad")) as node:
        node.fleet.load("a")
        assert (await node.fleet.settled("a")).state is ModelState.FAILED
        assert "SIGABRT" in (node.fleet.get("a").reason or "")
        monkeypatch.undo()
        node.fleet.load("bad")
        assert (await node.fleet.settled("bad")).state is ModelState.FAILED
        assert "cannot load" in (node.fleet.get("bad").reason or "")


PARENT = """
import asyncio, sys
from pathlib import Path
from engine.isolated import IsolatedEngine
from engine.options import EngineOptions

async def main():
    options = EngineOptions(path=Path(sys.argv[1]), n_ctx=256, n_slots=1, n_threads=1)
    engine = IsolatedEngine("m", options, asyncio.get_running_loop())
    engine.start()
    await asyncio.wrap_future(engine.loaded)
    print(engine.process.pid, "llama_cpp" in sys.modules, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_it_dies_with_a_killed_node_which_has_not_imported_llama_cpp(tiny_model: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT, str(tiny_model)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
    )
    assert parent.stdout is not None
    pid, imported = (await parent.stdout.readline()).split()
    assert imported == b"False"
    child = psutil.Process(int(pid))
    child.suspend()  # it cannot see for itself that nobody is there any more
    parent.kill()
    await parent.wait()
    assert await asyncio.to_thread(psutil.wait_procs, [child], 20) == ([child], [])
    await parent.stdout.read()


def test_every_field_of_a_sequence_and_a_job_is_sent_or_the_engines_own() -> None:
    own = {
        "listener", "constraint", "cancelled", "state", "slot", "n_past", "n_drawn", "n_cached", "last_token", "leader",
        "fork", "plan", "marks", "lookup", "n_drafted", "n_accepted", "arrival", "submitted_s", "assembler", "ids",
        "chain", "penalties", "bias", "filed", "n_fetches",
    }  # fmt: skip
    assert {each.name for each in fields(Sequence)} == own | set(SENT)
    assert own.isdisjoint(SENT)
    own = {"listener", "cancelled", "vectors", "n_taken", "n_done", "last_pack", "arrival"}
    assert {each.name for each in fields(EmbeddingJob)} == own | set(JOB_SENT)


def test_pauses_double_until_a_model_is_given_up_and_a_calm_forgets() -> None:
    now = 1000.0
    losses = Restarts(lambda: now)
    assert [losses.lost() for _ in range(6)] == [0.5, 1, 2, 4, 8, None]
    now += 601
    assert losses.lost() == 0.5
    losses.forget()
    assert losses.lost() == 0.5
    assert losses.n_ever == 8


def test_the_interface_is_that_of_a_thread() -> None:
    from engine.embedder import Embedder
    from engine.engine import Engine
    from engine.isolated import IsolatedEmbedder

    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(Engine) - public(IsolatedEngine) == {"attach"}
    assert public(Embedder) <= public(IsolatedEmbedder)
