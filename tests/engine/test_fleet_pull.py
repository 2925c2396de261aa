"""A fleet fetches what it misses: on first use, when asked, stopped and gone on with, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infsvc.errors import LoadError, NoSource, UnknownModel
from infsvc.events import ModelProgress
from infsvc.settings import WorkerSettings
from tests.engine.parts import Node, running_node, worker_settings
from tests.fake_hub import FILE, REPO, FakeHub
from tests.tiny_models import write_tiny_model


@pytest.fixture
def hub(make_hub: Callable[[bytes], FakeHub], tmp_path_factory: pytest.TempPathFactory) -> FakeHub:
    """Serves a model large enough to be stopped in its middle."""
    folder = tmp_path_factory.mktemp("served")
    return make_hub(write_tiny_model(folder / "model.gguf", n_vocab=8000).read_bytes())


def from_hub(name: str, **keys: Any) -> WorkerSettings:
    return worker_settings(name, model_repo=REPO, model_file=FILE, **keys)


def file_of(home: Path, name: str) -> Path:
    return home / f"data/models/{name}/model.gguf"


async def stalled(hub: FakeHub) -> None:
    assert await asyncio.to_thread(hub.stalled.wait, 20)


async def moving(node: Node) -> None:
    """Waits for the first progress of a download."""
    while not any(isinstance(event, ModelProgress) and event.done_bytes for event in node.events):
        await asyncio.sleep(0.01)


async def test_a_missing_file_is_fetched_on_first_use(hub: FakeHub, tmp_path: Path) -> None:
    async with running_node(tmp_path, from_hub("a")) as node:
        worker = node.fleet.load("a")
        assert worker.state == "downloading"
        assert worker.health().status == "loading"
        await node.fleet.settled("a")
        assert worker.state == "ready", worker.reason
        assert node.states("a") == ["downloading", "verifying", "on_disk", "loading", "ready"]
        progress = [event for event in node.events if isinstance(event, ModelProgress)]
        assert {event.total_bytes for event in progress} == {len(hub.content)}
        assert worker.pull is None
        codes = [row.code for row in node.sinks["a"].events]
        assert codes == [
            "model.downloading", "model.download", "model.verifying", "model.fetched", "model.on_disk",
            "model.loading", "model.loaded",
        ]  # fmt: skip
    assert file_of(tmp_path, "a").read_bytes() == hub.content


async def test_a_pull_only_fetches_and_tells_what_the_file_is(hub: FakeHub, tmp_path: Path) -> None:
    async with running_node(tmp_path, from_hub("a")) as node:
        assert node.fleet.pull("a").state == "downloading"
        assert node.fleet.pull("a").state == "downloading"
        worker = await node.fleet.settled("a")
        assert node.states("a") == ["downloading", "verifying", "on_disk"]
        assert worker.info is not None
        assert worker.claims
        assert not worker.asked
        assert node.fleet.pull("a").state == "on_disk"
        assert len(hub.bodies) == 1


async def test_a_load_during_a_pull_goes_on_to_load(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_at = 100_000
    async with running_node(tmp_path, from_hub("a"), memory_limit_bytes=2**20) as node:
        node.fleet.pull("a")
        await stalled(hub)
        assert node.fleet.load("a", force=True).state == "downloading"
        hub.release.set()
        worker = await node.fleet.settled("a")
        assert worker.state == "ready", worker.reason
    assert len(hub.bodies) == 1


async def test_an_unload_stops_a_download_and_the_next_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_at = 200_000
    async with running_node(tmp_path, from_hub("a")) as node:
        worker = node.fleet.load("a")
        await stalled(hub)
        await moving(node)
        await node.fleet.unload("a")
        assert (worker.state, worker.asked, worker.reason) == ("absent", False, None)
        await node.loaded("a")
    assert hub.bodies[-1].range is not None


async def test_a_download_that_fails_says_why_and_can_be_tried_again(hub: FakeHub, tmp_path: Path) -> None:
    hub.hub_status = (401, "GatedRepo")
    async with running_node(tmp_path, from_hub("a")) as node:
        node.fleet.load("a")
        worker = await node.fleet.settled("a")
        assert worker.state == "failed"
        assert "HF_TOKEN" in (worker.reason or "")
        assert node.states("a") == ["downloading", "failed"]
        hub.hub_status = None
        node.fleet.pull("a")
        await node.fleet.settled("a")
        assert worker.state == "on_disk"


async def test_a_close_stops_downloads_at_once(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_at = 100_000
    async with running_node(tmp_path, from_hub("a")) as node:
        node.fleet.load("a")
        await stalled(hub)
        async with asyncio.timeout(5):
            await node.fleet.close()


async def test_two_workers_of_one_file_fetch_it_once(hub: FakeHub, tmp_path: Path) -> None:
    path = "data/models/shared.gguf"
    async with running_node(tmp_path, from_hub("a", model_path=path), from_hub("b", model_path=path)) as node:
        node.fleet.pull("a")
        node.fleet.pull("b")
        assert [(await node.fleet.settled(name)).state for name in ("a", "b")] == ["on_disk", "on_disk"]
    assert len(hub.bodies) == 1


async def test_no_source_is_told_and_an_unknown_model_too(tmp_path: Path) -> None:
    async with running_node(tmp_path, worker_settings("a")) as node:
        with pytest.raises(NoSource, match="MODEL_REPO"):
            node.fleet.pull("a")
        with pytest.raises(UnknownModel):
            node.fleet.pull("b")
        node.fleet.load("a")
        worker = await node.fleet.settled("a")
        assert (worker.state, "names no source" in (worker.reason or "")) == ("failed", True)


async def test_a_file_is_removed_unless_it_is_in_use_or_not_ours(
    hub: FakeHub, tmp_path: Path, tiny_model: Path
) -> None:
    own = worker_settings("own", model_path=str(tiny_model))
    async with running_node(tmp_path, from_hub("a"), own) as node:
        await node.loaded("a")
        with pytest.raises(LoadError, match="unload it"):
            node.fleet.remove_file("a")
        await node.fleet.unload("a")
        assert node.fleet.remove_file("a") == len(hub.content)
        assert node.fleet.get("a").state == "absent"
        assert node.fleet.get("a").info is None
        with pytest.raises(LoadError, match="not there"):
            node.fleet.remove_file("a")
        with pytest.raises(LoadError, match="remove it yourself"):
            node.fleet.remove_file("own")
        assert tiny_model.is_file()


async def test_a_file_that_another_model_fetches_is_not_removed(hub: FakeHub, tmp_path: Path) -> None:
    hub.stall_at = 100_000
    path = "data/models/shared.gguf"
    async with running_node(tmp_path, from_hub("a", model_path=path), from_hub("b", model_path=path)) as node:
        node.fleet.pull("a")
        await stalled(hub)
        await moving(node)
        with pytest.raises(LoadError, match="being fetched"):
            node.fleet.remove_file("b")
        hub.release.set()
        assert (await node.fleet.settled("a")).state == "on_disk"


async def test_a_worker_that_is_added_is_looked_at_and_loads(hub: FakeHub, tmp_path: Path, tiny_model: Path) -> None:
    async with running_node(tmp_path, from_hub("a")) as node:
        node.sinks["late"] = node.sinks["a"]
        worker = node.fleet.add(worker_settings("late", model_path=str(tiny_model)))
        await node.fleet.settled("late")
        assert worker.info is not None
        await node.loaded("late")
