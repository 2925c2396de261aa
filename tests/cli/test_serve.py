"""`infsvc serve`: its ends, clean and not, and what it says when it cannot begin."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.cli.conftest import Served
from tests.nodes import ENDLESS

Run = Callable[..., subprocess.CompletedProcess[str]]


def listens(url: str) -> bool:
    host, port = url.removeprefix("nats://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_stream_ends_it_with_a_final_event_and_exit_0(
    serve: Callable[..., Served], number: signal.Signals
) -> None:
    node = serve("tiny")
    node.wait_for("model.loaded")
    node.wait_for("broker.connected")
    body = {"input": "x", "params": ENDLESS, "stream": True}
    events: list[dict[str, Any]] = []
    with httpx2.stream("POST", f"{node.gateway}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 5:
                    node.process.send_signal(number)
    assert (events[-1]["done"], events[-1]["finish_reason"]) == (True, "cancelled")
    assert node.process.wait(5) == 0
    assert not listens(node.environ["INFSVC_NATS_URL"])


def test_kill_9_leaves_no_broker_and_the_next_start_is_clean(serve: Callable[..., Served]) -> None:
    first = serve("tiny")
    first.wait_for("broker.connected")
    first.process.kill()
    first.process.wait()
    deadline = time.monotonic() + 30
    while listens(first.environ["INFSVC_NATS_URL"]):
        assert time.monotonic() < deadline, "the broker outlived its node"
    second = serve("tiny")
    second.wait_for("broker.connected")
    second.process.terminate()
    assert second.process.wait(30) == 0


def test_the_models_of_the_last_run_are_loaded_again(serve: Callable[..., Served]) -> None:
    first = serve("tiny")
    first.wait_for("model.loaded")
    first.process.terminate()
    first.process.wait(30)
    assert serve().wait_for("model.loaded")["model"] == "tiny"


def test_a_second_node_says_which_is_running(serve: Callable[..., Served], infsvc: Run) -> None:
    serve("tiny").wait_for("server.ready")
    refused = infsvc("serve", "tiny")
    assert refused.returncode == 1
    assert "a node already runs" in refused.stderr
    assert "node alpha" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_an_unknown_model_is_wrong_usage(infsvc: Run) -> None:
    refused = infsvc("serve", "nobody")
    assert refused.returncode == 2
    assert "no model 'nobody'; there are: demo" in refused.stderr


def test_a_wrong_worker_file_names_file_line_and_key(infsvc: Run, environ: dict[str, str]) -> None:
    path = Path(environ["INFSVC_HOME"]) / "envs/worker.wrong.env"
    path.write_text("MODEL_NAME=wrong\n\nCTX_SIZ=4\n")
    refused = infsvc("serve")
    assert refused.returncode == 1
    assert f"{path}:3: CTX_SIZ: unknown key" in refused.stderr


def test_a_taken_port_says_what_to_do(infsvc: Run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        refused = infsvc("serve", "tiny", INFSVC_GATEWAY=f":{port}")
    assert refused.returncode == 1
    assert str(port) in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_home_that_cannot_be_written_says_so(infsvc: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = infsvc("serve", INFSVC_HOME=str(tmp_path / "file"))
    assert refused.returncode == 1
    assert "cannot be written" in refused.stderr
    assert "INFSVC_HOME" in refused.stderr


def test_the_log_is_json_and_holds_native_lines(serve: Callable[..., Served]) -> None:
    node = serve("tiny")
    node.wait_for("llama")
    node.process.terminate()
    node.process.wait(30)
    log = Path(node.environ["INFSVC_HOME"]) / "data/logs/node.jsonl"
    codes = {json.loads(line)["code"] for line in log.read_text().splitlines()}
    assert {"startup", "server.ready", "model.loaded", "llama", "shutdown"} <= codes
    assert log.with_name("native.log").stat().st_size > 0


def test_a_model_in_its_own_process_logs_here_and_leaves_with_the_node(serve: Callable[..., Served]) -> None:
    node = serve("tiny", INFSVC__TINY__ENGINE_ISOLATION="process")
    node.wait_for("model.loaded")
    [child] = [each for each in psutil.Process(node.process.pid).children() if "engine.child" in each.cmdline()]
    body = {"input": "x", "params": ENDLESS, "stream": True}
    with httpx2.stream("POST", f"{node.gateway}/v1/completions", json=body, timeout=30) as response:
        events = [json.loads(line.removeprefix("data: ")) for line in ended_by(node, response)]
    assert (events[-1]["done"], events[-1]["finish_reason"]) == (True, "cancelled")
    assert node.process.wait(5) == 0
    assert not child.is_running()
    node.wait_for("llama")  # a line that only the child can have written


def ended_by(node: Served, response: httpx2.Response) -> Iterator[str]:
    """A stream's lines; the node is asked to end after the fifth."""
    lines = (line for line in response.iter_lines() if line)
    for n, line in enumerate(lines, start=1):
        if n == 5:
            node.process.terminate()
        yield line
