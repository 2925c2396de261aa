"""A started node with one ready model, `tiny`, that has 4 slots and a queue of 16."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from tests.nodes import add_worker, build
from tests.tiny_models import write_tiny_model
from transports.node import Node


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a context long enough for answers that do not end by themselves."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "long.gguf", n_ctx=65536)


@pytest.fixture
def home(tmp_path: Path, long_model: Path) -> Path:
    add_worker(tmp_path, "tiny", long_model, QUEUE_MAX_MSGS=16, CTX_SIZE=16384)
    return tmp_path


@pytest.fixture
async def node(home: Path) -> AsyncIterator[Node]:
    async with build(home, "tiny", embedded_nats="off") as started:
        await started.fleet.settled("tiny")
        yield started


@pytest.fixture
async def http(node: Node) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the gateway."""
    async with httpx2.AsyncClient(base_url=node.gateway_url, timeout=30, trust_env=False) as client:
        yield client
