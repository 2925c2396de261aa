"""A step that does not end is noticed: the model fails with a reason, its requests end, and nothing is told twice."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.embedding import EmbeddingRequest
from engine.llama import EmbeddingContext, LlamaContext
from engine.service import InferenceRequest
from infsvc.errors import EngineFailed, ModelNotLoaded
from infsvc.types import Params
from tests.engine.parts import Heard, run, running_engine, running_node, sequence, worker_settings


class ForcedHang:
    """Lets decodes hang, once asked to, until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.armed, self.hangs, self.release = threading.Event(), threading.Event(), threading.Event()
        for kind, step in ((LlamaContext, "decode"), (EmbeddingContext, "embed")):
            monkeypatch.setattr(kind, step, self._hanging(getattr(kind, step)))

    def _hanging(self, step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def hanging(context: Any, work: Any) -> Any:
            if self.armed.is_set():
                self.hangs.set()
                assert self.release.wait(60)
            return step(context, work)

        return hanging


@pytest.fixture
def hang(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForcedHang]:
    monkeypatch.setattr("engine.step_watch.HUNG_AFTER_S", 0.5)
    forced = ForcedHang(monkeypatch)
    yield forced
    forced.release.set()


async def test_everyone_hears_of_a_hang_once(tiny_model: Path, hang: ForcedHang) -> None:
    died: list[str] = []
    heard = asyncio.Event()

    def on_died(reason: str) -> None:
        died.append(reason)
        heard.set()

    async with running_engine(tiny_model, n_slots=1, on_died=on_died) as engine:
        assert (await (await run(engine, sequence())).finished()).error is None
        hang.armed.set()
        both = [sequence(), sequence()]  # one runs, one waits
        for each in both:
            engine.submit(each)
        await heard.wait()
        for each in both:
            assert isinstance(each.listener, Heard)
            end = await each.listener.finished()
            assert end.reason == "error"
            assert "has not ended in 0 s" in (end.error or "")
        late = await (await run(engine, sequence())).finished()
        assert late.reason == "error"
        hang.release.set()
        assert await asyncio.to_thread(engine.join, 20.0)
        # What the thread had to say when it came back was dropped.
        await asyncio.sleep(0)
        for each in both:
            await each.listener.finished()  # type: ignore[attr-defined]
    assert len(died) == 1


async def test_a_busy_or_idle_engine_is_no_hung_one(tiny_model: Path, hang: ForcedHang) -> None:
    died: list[str] = []
    async with running_engine(tiny_model, n_slots=1, on_died=died.append) as engine:
        engine.submit(sequence(max_tokens=200))
        # Longer than a step may take, with one running and then none.
        await asyncio.sleep(0.7)
        assert (await (await run(engine, sequence())).finished()).error is None
    assert died == []


async def test_the_model_fails_with_the_reason_and_loads_again(
    tmp_path: Path, tiny_model: Path, hang: ForcedHang
) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(tiny_model.read_bytes())
    request = InferenceRequest(model="a", input="hi", raw=True, params=Params(max_tokens=3, ignore_eos=True))
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        hang.armed.set()
        with pytest.raises(EngineFailed, match="has not ended"):
            await node.service.complete(request)
        worker = node.fleet.get("a")
        assert worker.state == "failed"
        assert "has not ended" in (worker.reason or "")
        with pytest.raises(ModelNotLoaded):
            await node.service.submit(request)
        assert node.sinks["a"].rows[0].status == "error"
        hang.armed.clear()
        hang.release.set()
        await node.loaded("a")
        assert (await node.service.complete(request)).finish_reason == "length"


async def test_a_hung_embedder_ends_its_requests_once_and_the_next_gets_another(
    tmp_path: Path, tiny_model: Path, hang: ForcedHang
) -> None:
    target = tmp_path / "data/models/a/model.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(tiny_model.read_bytes())
    request = EmbeddingRequest(model="a", input=["one", "two"])
    async with running_node(tmp_path, worker_settings("a")) as node:
        await node.loaded("a")
        before = (await (await node.service.embed(request)).result()).vectors
        hung = node.fleet.get("a").embedder
        hang.armed.set()
        both = [await node.service.embed(request) for _ in range(2)]
        for each in both:
            with pytest.raises(EngineFailed, match="embedder has not ended"):
                await each.result()
        assert node.fleet.get("a").state == "ready"
        hang.armed.clear()
        assert ((await (await node.service.embed(request)).result()).vectors == before).all()
        hang.release.set()
        assert hung is not None
        assert await asyncio.to_thread(hung.join, 20.0)
        assert [row.status for row in node.sinks["a"].rows] == ["ok", "error", "error", "ok"]
