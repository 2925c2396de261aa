"""Downloads through a real node's door, and models that come while it runs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from infsvc.errors import ConfigError
from infsvc.settings import load_node_settings, load_workers
from tests.fake_hub import FILE, REPO, FakeHub
from tests.nodes import add_worker, build
from transports.node import Node


@pytest.fixture
def hub(make_hub: Callable[[bytes], FakeHub], tiny_model: Path) -> FakeHub:
    return make_hub(tiny_model.read_bytes())


@pytest.fixture
async def node(hub: FakeHub, home: Path) -> AsyncIterator[Node]:
    add_worker(home, "remote", None, MODEL_REPO=REPO, MODEL_FILE=FILE)
    add_worker(home, "nowhere", None)
    async with build(home, "tiny", embedded_nats="off") as started:
        yield started


async def until(http: httpx2.AsyncClient, model: str, state: str) -> dict[str, Any]:
    """Waits for a state by the events, and answers with the service document."""
    async with asyncio.timeout(20), http.stream("GET", "/api/events") as events:
        service = (await http.get(f"/api/services/{model}")).json()
        if service["state"] != state:
            async for line in events.aiter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if (event.get("model"), event.get("state")) == (model, state):
                    break
    return dict((await http.get(f"/api/services/{model}")).json())


async def test_a_pull_is_accepted_seen_on_the_way_and_done(node: Node, http: httpx2.AsyncClient, hub: FakeHub) -> None:
    hub.stall_at = 50_000
    absent = (await http.get("/api/services/remote")).json()
    assert (absent["state"], absent["file"]["size_bytes"], absent["file"]["source"]) == (
        "absent",
        None,
        f"{REPO} · {FILE}",
    )
    async with http.stream("GET", "/api/events") as events:
        answer = await http.post("/api/models/remote/pull")
        assert (answer.status_code, answer.json()) == (202, {"model": "remote", "state": "downloading"})
        async for line in events.aiter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if (event.get("type"), event.get("model")) == ("model.progress", "remote") and event["done_bytes"]:
                break
    assert event["total_bytes"] == len(hub.content)
    on_the_way = (await http.get("/api/services/remote")).json()
    assert (on_the_way["status"], on_the_way["file"]["total_bytes"]) == ("loading", len(hub.content))
    hub.release.set()
    done = await until(http, "remote", "on_disk")
    assert done["file"]["size_bytes"] == len(hub.content)
    removed = await http.delete("/api/models/remote/file")
    assert (removed.status_code, removed.json()) == (200, {"model": "remote", "freed_bytes": len(hub.content)})
    assert (await http.get("/api/services/remote")).json()["state"] == "absent"


async def test_a_load_fetches_first_and_the_models_own_port_shows_how_far(
    node: Node, http: httpx2.AsyncClient, hub: FakeHub
) -> None:
    hub.stall_at = 50_000
    assert (await http.post("/api/models/remote/load")).json()["state"] == "downloading"
    refused = await http.post("/v1/completions", json={"model": "remote", "input": "x"})
    assert (refused.status_code, refused.json()["code"]) == (503, "model_not_loaded")
    assert refused.headers["Retry-After"] == "10"
    assert await asyncio.to_thread(hub.stalled.wait, 20)
    endpoint = node.fleet.get("remote").endpoint
    async with httpx2.AsyncClient(base_url=endpoint, trust_env=False) as port, asyncio.timeout(20):
        while "progress" not in (body := (await port.get("/healthz")).json()):
            await asyncio.sleep(0.01)
    assert (body["state"], body["status"]) == ("downloading", "loading")
    stopped = await http.post("/api/models/remote/unload")
    assert stopped.json() == {"model": "remote", "state": "absent"}


async def test_what_cannot_be_fetched_or_removed_is_told(node: Node, http: httpx2.AsyncClient) -> None:
    answer = await http.post("/api/models/nowhere/pull")
    assert (answer.status_code, answer.json()["code"]) == (409, "cannot_load")
    assert "names no source" in answer.json()["error"]
    assert (await http.post("/api/models/nobody/pull")).status_code == 404
    assert (await http.post("/api/models/remote/pull", content=b'{"x": 1}')).json()["param"] == "x"
    assert (await http.post("/api/models/remote/pull?x=1")).status_code == 400
    assert (await http.delete("/api/models/tiny/file")).status_code == 409
    assert (await http.delete("/api/models/remote/file")).json()["error"].endswith("is not there")
    assert (await http.delete("/api/models/nobody/file")).status_code == 404


async def test_a_new_worker_is_written_served_and_found_again(
    node: Node, http: httpx2.AsyncClient, home: Path, hub: FakeHub
) -> None:
    values = {"MODEL_NAME": "new.one", "MODEL_URL": f"{hub.file_url}&b=#'\\", "HTTP_ADDR": ":0", "CTX_SIZE": "256"}
    worker = await node.add_worker(values)
    assert worker.state == "absent"
    await http.post("/api/models/new.one/load")
    assert (await until(http, "new.one", "ready"))["status"] == "online"
    answer = await http.post("/v1/completions", json={"model": "new.one", "input": "x", "params": {"max_tokens": 1}})
    assert answer.status_code == 200
    rows = (await http.get("/logs?model=new.one")).json()["rows"]
    assert len(rows) == 1
    again = load_workers(node.home, load_node_settings({}), {})["new.one"]
    assert again.model_url == values["MODEL_URL"]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"MODEL_NAME": "tiny"}, "MODEL_NAME"),
        ({"MODEL_NAME": "a/b"}, "MODEL_NAME"),
        ({"MODEL_NAME": "ok", "CTX_SIZE": "-1"}, "CTX_SIZE"),
        ({"MODEL_NAME": "ok", "WHAT": "1"}, "WHAT"),
        ({"MODEL_NAME": "ok", "MODEL_URL": "ftp://x"}, "MODEL_URL"),
        ({"MODEL_NAME": "ok", "MODEL_URL": "http://example.com/x"}, "MODEL_URL"),
        ({"MODEL_NAME": "ok", "MODEL_REPO": "a/b"}, "MODEL_REPO"),
        ({"MODEL_NAME": "ok", "MODEL_FILE": "b"}, "MODEL_FILE"),
        ({"MODEL_NAME": "ok", "HTTP_ADDR": ":4321"}, "HTTP_ADDR"),
        ({"MODEL_NAME": "ok", "MODEL_FILE": "a\nb"}, "MODEL_FILE"),
        ({"MODEL_NAME": "ok", "MODEL_PATH": "/nowhere/model.gguf"}, "MODEL_PATH"),
    ],
)
async def test_a_wrong_new_worker_names_its_key_and_leaves_no_file(
    node: Node, home: Path, values: dict[str, str], key: str
) -> None:
    await node.add_worker({"MODEL_NAME": "taken", "HTTP_ADDR": ":4321"})
    before = sorted((home / "envs").iterdir())
    with pytest.raises(ConfigError) as caught:
        await node.add_worker(values)
    assert caught.value.key == key
    assert ".new" not in str(caught.value)
    assert sorted((home / "envs").iterdir()) == before
