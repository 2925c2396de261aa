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


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_built_from_what_is_named_and_keeps_no_more(path: Path) -> None:
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    stages, arguments = set(), dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.M))
    for base, stage in re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.M):
        _, _, tag = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base).partition(":")
        assert re.match(r"\d+\.\d+", tag), f"{base} is no fixed version"
        stages.add(stage)
    assert set(re.findall(r"--from=(\w+)", text)) <= stages
    for line in re.findall(r"^RUN .*apt-get install.*$", text, re.M):
        assert "--no-install-recommends" in line
        assert "rm -rf /var/lib/apt/lists/*" in line
    for line in re.findall(r"^RUN .*pip (?:install|wheel).*$", text, re.M):
        assert "--no-cache-dir" in line
    # Words in lists run without a shell, so that a stop's signal reaches the node itself.
    for name in ("ENTRYPOINT", "CMD"):
        (words,) = re.findall(rf"^{name} (\[.*\])$", text, re.M)
        assert all(isinstance(word, str) for word in yaml.safe_load(words))
    (words,) = re.findall(r"^HEALTHCHECK .*? CMD (\[.*\])$", text, re.M)
    *_, code = yaml.safe_load(words)
    compile(code, path.name, "exec")
    assert {"INFSVC_TLS_CERT", "5780/healthz"} <= set(re.findall(r"INFSVC_TLS_CERT|5780/healthz", code))
    assert int(re.search(r"useradd --uid (\d+)", text)[1]) > 1000  # type: ignore[index]


def test_what_a_checkout_holds_besides_stays_out_of_an_image() -> None:
    kept_out = (ROOT / ".dockerignore").read_text().split()
    for name in (".git", ".venv", ".build", "data/logs", "data/nats", "data/run", "dist"):
        assert name in kept_out, name


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
        assert set(service["depends_on"]) <= set(compose["services"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
    assert all(re.search(r":\d", each["image"]) or "build" in each for each in compose["services"].values())
    assert "healthcheck" in compose["services"]["nats"]
    assert len({node["environment"]["INFSVC_NODE"] for node in nodes}) == 2
    assert len({node["volumes"][0] for node in nodes}) == 2
