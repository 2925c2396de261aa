"""What all tests share: one tiny model file a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight model of two layers; tests only read it."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model.gguf")
