"""Two real nodes on one broker: `alpha`, whose broker it is, and `beta`. Both have `tiny`, beta also `only-v1.5`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nodes import add_worker, build, connected, free_port
from tests.tiny_models import write_tiny_model
from transports.node import Node


@dataclass
class Pair:
    """The nodes and their broker."""

    url: str
    alpha: Node
    beta: Node


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "long.gguf", n_ctx=65536)


def make_node(folder: Path, model: Path, url: str, name: str, *models: str, **settings: str) -> Node:
    """A node over a home of its own; the first of its models is loaded at the start."""
    for each in models:
        add_worker(folder, each, model, QUEUE_MAX_MSGS=16, CTX_SIZE=16384)
    return build(folder, *models, nats_url=url, node=name, **settings)


@pytest.fixture
async def pair(tmp_path: Path, long_model: Path) -> AsyncIterator[Pair]:
    url = f"nats://127.0.0.1:{free_port()}"
    alpha = make_node(tmp_path / "a", long_model, url, "alpha", "tiny")
    beta = make_node(tmp_path / "b", long_model, url, "beta", "tiny", "only-v1.5", embedded_nats="off")
    async with alpha:
        await connected(alpha.events)
        async with beta:
            await connected(beta.events)
            for node, model in ((alpha, "tiny"), (beta, "tiny"), (beta, "only-v1.5")):
                await node.fleet.settled(model)
            yield Pair(url, alpha, beta)
