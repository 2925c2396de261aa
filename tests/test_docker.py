"""The container files name what there is: settings, paths, versions. Nothing is built here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from infsvc.settings import NodeSettings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = [ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.cuda"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_without_root_is_probed_and_builds_the_engine_that_the_project_pins(path: Path) -> None:
    text = path.read_text()
    last = text[text.rindex("\nFROM ") :]
    assert "\nUSER infsvc" in last
    assert "/healthz" in last
    assert last.index("USER infsvc") < last.index("ENTRYPOINT")
    pinned = re.search(r"llama-cpp-python==([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert pinned is not None
    assert f"LLAMA_VERSION={pinned[1]}\n" in text
    assert set(re.findall(r"\bINFSVC_[A-Z_]+", text)) <= NodeSettings.names


def test_the_two_nodes_share_a_broker_and_ask_for_a_key() -> None:
    compose: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    nodes = [service for name, service in compose["services"].items() if name.startswith("node-")]
    assert len(nodes) == 2
    for service in nodes:
        build = service["build"]
        assert (ROOT / "docker" / build["context"] / build["dockerfile"]).is_file()
        settings = service["environment"]
        assert {name for name in settings if name.startswith("INFSVC_")} <= NodeSettings.names
        assert settings["INFSVC_API_KEYS"].startswith("${INFSVC_API_KEYS:?")
        assert settings["INFSVC_NATS_URL"] == "nats://nats:4222"
        assert (ROOT / f"envs/worker.{service['command'][1]}.env").is_file()
    assert len({node["environment"]["INFSVC_NODE"] for node in nodes}) == 2
    assert len({node["volumes"][0] for node in nodes}) == 2
