"""Each example runs, as its first lines say, against a node with two models."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from starlette.testclient import TestClient

from tests.nodes import add_worker, build
from transports.node import Node

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "data/models/demo/model.gguf"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    for name in ("demo", "second"):
        add_worker(tmp_path, name, DEMO, WORKER_CONCURRENCY=4)
    async with build(tmp_path, "demo", "second", embedded_nats="auto") as started:
        for name in ("demo", "second"):
            assert (await started.fleet.settled(name)).state == "ready"
        for _ in range(1000):
            if started.bus.state.status == "connected":
                break
            await asyncio.sleep(0.02)
        assert started.bus.state.status == "connected", started.bus.state
        yield started


async def run(node: Node, *command: str) -> str:
    environ = os.environ | {"INFSVC_URL": node.gateway_url}
    child = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(child.communicate(), 60)
    assert child.returncode == 0, said.decode()
    assert "Traceback" not in said.decode(), said.decode()
    return said.decode()


async def test_the_endpoints(node: Node) -> None:
    said = await run(node, "bash", "examples/inference_endpoints.sh")
    assert said.rstrip().endswith("all endpoints answered")
    assert "max_tokens" in said.split("an error says what is wrong")[1]


async def test_a_grammars_life(node: Node) -> None:
    said = await run(node, "bash", "examples/grammar_crud.sh")
    assert "line 2" in said.split("a broken one is refused")[1]
    async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False) as http:
        assert (await http.get("/grammars/example-colour")).status_code == 404


async def test_requests_and_models_side_by_side(node: Node) -> None:
    said = await run(node, sys.executable, "examples/parallel.py", "--url", node.gateway_url, "--tokens", "8")
    assert "all models at once" in said
    assert " 16 at once" in said
    said = await run(node, sys.executable, "examples/compare_models.py", "--url", node.gateway_url, "What is a worker?")
    assert "demo  (" in said
    assert "second  (" in said


async def test_an_agent_on_the_bus(node: Node) -> None:
    said = await run(
        node, sys.executable, "examples/agent.py", "--nats", node.settings.nats_url, "--url", node.gateway_url,
        "What is the weather in Oslo?",
    )  # fmt: skip
    assert "tool-calling" in said
    assert "it calls get_weather({'city': 'Oslo'})" in said


async def test_retrieval(node: Node) -> None:
    said = await run(
        node, sys.executable, "examples/rag.py", "--url", node.gateway_url, "--embedder", "demo",
        "What is backpressure?", "docs/decisions/2026-11-23-queue-depth.md",
    )  # fmt: skip
    assert said.startswith("* ")


async def test_the_web_chat(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import web_chat  # type: ignore[import-not-found]

    def talk() -> tuple[str, str]:
        with TestClient(web_chat.app(node.gateway_url, "demo")) as client:
            page = client.get("/").text
            return page, client.post("/chat", json=[{"role": "user", "content": "hello"}]).text

    page, stream = await asyncio.to_thread(talk)
    assert "<form>" in page
    assert '"content":"Hello' in stream
    assert stream.rstrip().endswith("data: [DONE]")
