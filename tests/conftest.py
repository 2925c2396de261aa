"""What all tests share: one tiny model file a run, and a hub of their own instead of the real one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub
from tests.tiny_models import write_tiny_model

# No test, and no process that a test starts, asks the real hub for anything.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight model of two layers; tests only read it."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model.gguf")


@pytest.fixture
def make_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], FakeHub]]:
    """Starts a hub that serves these bytes; the environment points at it and holds no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with ExitStack() as exits:

        def make(content: bytes) -> FakeHub:
            hub = exits.enter_context(FakeHub(content))
            monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
            return hub

        yield make
