"""`infsvc models`, `logs` and `doctor`, as a user types them: with a node and without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import ROOT, Served
from tests.fake_hub import FILE, REPO, FakeHub
from tests.nodes import add_worker

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(long_model: Path, tmp_path: Path, environ: dict[str, str]) -> Iterator[FakeHub]:
    """A hub with the model of the worker file `remote`."""
    add_worker(tmp_path, "remote", None, MODEL_REPO=REPO, MODEL_FILE=FILE)
    with FakeHub(long_model.read_bytes()) as fake:
        environ |= {"HF_ENDPOINT": fake.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", "NO_PROXY": "*"}
        yield fake


def states(infsvc: Run) -> dict[str, str]:
    lines = infsvc("models", "list").stdout.splitlines()[1:]
    return {line.split("  ")[0].strip(): line[line.index(" ") :].strip().split("  ")[0] for line in lines}


def test_without_a_node_a_model_is_pulled_shown_and_removed(infsvc: Run, hub: FakeHub, tmp_path: Path) -> None:
    assert states(infsvc)["remote"] == "absent"
    pulled = infsvc("models", "pull", "remote")
    assert pulled.returncode == 0, pulled.stderr
    assert "remote is on disk" in pulled.stdout
    assert "remote  downloading" in pulled.stderr
    assert (tmp_path / "data/models/remote/model.gguf").read_bytes() == hub.content
    shown = infsvc("models", "show", "remote").stdout
    assert "architecture  llama" in shown
    assert f"source        {REPO} · {FILE}" in shown
    assert "(weights" in shown
    assert states(infsvc)["remote"] == "on disk"
    asked = infsvc("models", "rm", "remote", stdin="n\n")
    assert asked.returncode == 1
    assert "It can be fetched again." in asked.stdout
    assert "are free" in infsvc("models", "rm", "remote", "--yes").stdout
    assert states(infsvc)["remote"] == "absent"


def test_a_node_is_asked_where_one_runs(infsvc: Run, serve: Callable[..., Served], hub: FakeHub) -> None:
    serve("tiny").wait_for("model.loaded")
    assert states(infsvc)["tiny"] == "ready"
    pulled = infsvc("models", "pull", "remote")
    assert pulled.returncode == 0, pulled.stderr
    assert states(infsvc)["remote"] == "on disk"
    assert "unload it before" in infsvc("models", "rm", "tiny", "--yes").stderr
    assert infsvc("models", "rm", "remote", "--yes").returncode == 0
    assert infsvc("start", "remote").stdout == "remote is ready\n"
    hub.hub_status = (404, "EntryNotFound")
    infsvc("stop", "remote")
    infsvc("models", "rm", "remote", "--yes")
    failed = infsvc("models", "pull", "remote")
    assert (failed.returncode, "has no such file" in failed.stderr) == (1, True)
    assert "hf_secret" not in failed.stderr


def test_two_starts_at_once_give_one_node_with_both_models(infsvc: Run, hub: FakeHub, environ: dict[str, str]) -> None:
    starts = [
        subprocess.Popen(
            [sys.executable, "-m", "infsvc", "start", name],
            cwd=ROOT, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("tiny", "remote")
    ]  # fmt: skip
    try:
        told = [start.communicate(timeout=60) for start in starts]
        assert [out for out, _ in told] == ["tiny is ready\n", "remote is ready\n"], told
        assert {name: states(infsvc)[name] for name in ("tiny", "remote")} == {"tiny": "ready", "remote": "ready"}
    finally:
        assert infsvc("stop").stdout == "the node has ended\n"


def test_what_is_wrong_is_told_without_a_traceback(infsvc: Run, tmp_path: Path) -> None:
    add_worker(tmp_path, "nowhere", None)
    for command, told, code in (
        (("models", "pull", "nobody"), "no model 'nobody'", 2),
        (("models", "pull", "nowhere"), "names no source", 1),
        (("models", "pull", "gemma3-270m"), "HF_HUB_OFFLINE is set", 1),
        (("models", "rm", "nowhere", "--yes"), "is not there", 1),
        (("logs", "nobody"), "no model 'nobody'", 2),
    ):
        said = infsvc(*command)
        assert (said.returncode, told in said.stderr, "Traceback" in said.stderr) == (code, True, False), said.stderr


def test_logs_are_read_from_the_file_with_and_without_a_node(
    infsvc: Run, serve: Callable[..., Served], environ: dict[str, str], tmp_path: Path
) -> None:
    assert "no rows in" in infsvc("logs", "tiny").stderr
    node = serve("tiny")
    node.wait_for("model.loaded")
    ask = ("chat", "-m", "tiny", "--max-tokens", "2", "--input")
    infsvc(*ask, "first\nline")
    infsvc(*ask, "second")
    lines = infsvc("logs", "tiny").stdout.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("first line")
    assert " ok " in lines[1]
    follower = subprocess.Popen(
        [sys.executable, "-m", "infsvc", "logs", "tiny", "-n", "1", "--follow", "--json"],
        cwd=ROOT, env=os.environ | environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert follower.stdout is not None
    try:
        assert json.loads(follower.stdout.readline())["raw_input"] == "second"
        infsvc(*ask, "third")
        assert json.loads(follower.stdout.readline())["raw_input"] == "third"
    finally:
        follower.kill()
        follower.communicate()
    node.process.terminate()
    node.process.wait(30)
    assert infsvc("logs", "tiny", "-n", "1", "--status", "ok").stdout.count("third") == 1
    assert infsvc("logs", "tiny", "--status", "error").stdout == ""
    (tmp_path / "data/logs/tiny.sqlite").write_bytes(b"no database at all, but long enough to be read as one" * 100)
    assert "is no audit file" in infsvc("logs", "tiny").stderr


def test_doctor_finds_everything_well_and_says_what_is_not(infsvc: Run, tmp_path: Path) -> None:
    # The ports of the workers that ship may be those of a node that somebody uses now.
    shipped = {f"INFSVC__{path.name[7:-4].upper()}__HTTP_ADDR": ":0" for path in (ROOT / "envs").glob("worker.*.env")}
    well = infsvc("doctor", **{key.replace("-", "_").replace(".", "_"): value for key, value in shipped.items()})
    assert well.returncode == 0, well.stdout
    for what in ("Python", "CPU", "llama.cpp", "decode", "home", "disk", "broker", "worker files", "ports"):
        assert f"\nok    {what:<14} " in f"\n{well.stdout}", what
    assert "gemma3-270m: absent, fetched on first use" in well.stdout
    (tmp_path / "envs/worker.bad.env").write_text("MODEL_NAME=bad\nCTX_SIZ=4\n")
    (tmp_path / "data/models/tiny/model.gguf").write_bytes(b"GGUF")
    ill = infsvc("doctor")
    assert ill.returncode == 1
    assert "FAIL  worker file" in ill.stdout
    assert "worker.bad.env:2: CTX_SIZ: unknown key" in ill.stdout
    assert "warn  model file     tiny:" in ill.stdout
    assert infsvc("doctor", INFSVC_GATEWAY="nonsense").returncode == 1
