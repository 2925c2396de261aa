"""The commands of the bus, as a user types them, beside a served node; and what they say when nobody is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.cli.conftest import ROOT, Served
from tests.nodes import add_worker, free_port, node_environ

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, long_model: Path) -> Iterator[Served]:
    """One node for all tests here; the last one ends it."""
    home = tmp_path_factory.mktemp("home")
    add_worker(home, "tiny", long_model, CTX_SIZE=16384)
    served = Served("tiny", environ=node_environ(home, gateway=f":{free_port()}"))
    try:
        served.wait_for("model.loaded")
        served.wait_for("broker.connected")
        yield served
    finally:
        if not served.process.stdout.closed:  # type: ignore[union-attr]
            served.close()


@pytest.fixture
def on_node(infsvc: Run, node: Served) -> Run:
    """Runs a command on the node's home."""
    return lambda *arguments, **options: infsvc(*arguments, **(node.environ | options))


@contextmanager
def started(environ: dict[str, str], *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "infsvc", *arguments],
        cwd=ROOT,
        env=os.environ | environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def first_line(stream: object, containing: str) -> str:
    for line in stream:  # type: ignore[attr-defined]
        if containing in line:
            return str(line)
    raise AssertionError(f"it ended without {containing}")


BODY = '{"req_id": "q1", "input": "hello", "params": {"max_tokens": 3, "temperature": 0, "ignore_eos": true}}'


def test_req_pub_and_sub(on_node: Run, node: Served) -> None:
    environ, server = node.environ, node.environ["INFSVC_NATS_URL"]
    told = on_node("req", "inference.request.tiny", BODY)
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["tokens_out"] == 3
    again = on_node("req", "--server", server, "models.tiny.health", "-", stdin="")
    assert json.loads(again.stdout)["status"] == "online"
    streamed = on_node("req", "inference.request.tiny", "--replies", "0", "--timeout", "0.5",
                      stdin=BODY.replace('"req_id": "q1"', '"stream": true'))  # fmt: skip
    assert json.loads(streamed.stdout.splitlines()[-1])["done"] is True
    with started(environ, "sub", "inference.reply.>", "--count", "1", "--timeout", "20") as listening:
        first_line(listening.stderr, "listening on inference.reply.>")
        published = on_node("pub", "inference.request.tiny", BODY.replace("q1", "q2"))
        assert published.stdout == f"published {len(BODY)} bytes on inference.request.tiny\n", published.stderr
        line = first_line(listening.stdout, "[inference.reply.q2]")
        assert json.loads(line.partition("] ")[2])["req_id"] == "q2"
        assert listening.wait(10) == 0


def test_what_they_say_is_wrong(on_node: Run) -> None:
    for arguments, code, sentence in (
        (("req", "nobody.here", "x"), 1, "nobody listens on nobody.here"),
        (("req", "bad subject", "x"), 1, "bad subject"),
        (("req", "models.tiny.heartbeat", "x", "--timeout", "0.2"), 1, "no reply on models.tiny.heartbeat within"),
        (("req", "a.b", "x", "-H", "nocolon"), 2, "is no header"),
        (("sub", "nothing.comes", "--timeout", "0.2"), 1, "nothing came on nothing.comes"),
        (("pub", "no.stream", "x", "-J"), 1, "no stream takes no.stream"),
        (("pub", "a.b", "x", "-J", "--reply", "c"), 2, "exclude each other"),
        (("monitor",), 1, "the monitor needs a terminal"),
    ):
        told = on_node(*arguments)
        assert (told.returncode, sentence in told.stderr) == (code, True), told.stderr
        assert "Traceback" not in told.stderr


def test_without_a_broker_each_says_so(infsvc: Run) -> None:
    for arguments in (("req", "a", "b"), ("pub", "a", "b"), ("sub", "a"), ("chat", "-s", "a.b", "--input", "x")):
        told = infsvc(*arguments)
        assert (told.returncode, "no broker answers at nats://127.0.0.1" in told.stderr) == (1, True), told.stderr
        assert "Traceback" not in told.stderr


def test_status_asks_the_bus_where_no_gateway_answers(on_node: Run, node: Served) -> None:
    server = node.environ["INFSVC_NATS_URL"]
    elsewhere = {"INFSVC_HOME": node.environ["INFSVC_HOME"] + "/other", "INFSVC_GATEWAY": ":1"}
    for arguments in (("status",), ("status", "--url", server)):
        told = on_node(*arguments, **elsewhere)
        assert told.returncode == 0, told.stderr
        assert any(line.split()[:3] == ["tiny", "alpha", "online"] for line in told.stdout.splitlines())
    (service,) = json.loads(on_node("status", "--json", **elsewhere).stdout)
    assert (service["model_name"], service["local"]) == ("tiny", False)


def test_the_plain_monitor_prints_the_table(node: Served) -> None:
    with started(node.environ | {"COLUMNS": "120"}, "monitor", "--plain") as watching:
        line = first_line(watching.stdout, "tiny")
        assert re.match(r"tiny +alpha +● online +llama ", line)


def test_every_command_has_help(infsvc: Run) -> None:
    for command in ("req", "pub", "sub", "monitor", "dashboard", "status"):
        told = infsvc(command, "--help")
        assert (told.returncode, f"Usage: infsvc {command}" in told.stdout) == (0, True)


def test_the_dashboard_passes_on_what_the_page_reads(node: Served) -> None:
    with started(node.environ, "dashboard", "--port", "0") as serving:
        line = first_line(serving.stdout, "the dashboard of")
        where = re.findall(r"at (http://127\.0\.0\.1:\d+)/", line)[0]
        with httpx2.Client(base_url=where, trust_env=False, timeout=20) as http:
            page = http.get("/")
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "/dashboard/dashboard.js" in page.text
            assert http.get("/api/services/tiny").json()["status"] == "online"
            assert http.post("/api/models/tiny/unload").status_code == 404
            assert http.post("/api/services").status_code == 405
            assert http.get("/", headers={"Host": "evil.example"}).status_code == 403
            with http.stream("GET", "/api/events") as events:
                assert events.headers["content-type"].startswith("text/event-stream")
                with httpx2.Client(base_url=node.gateway, trust_env=False, timeout=20) as gateway:
                    gateway.post("/v1/completions", json=json.loads(BODY) | {"req_id": "passed-on"})
                assert any("passed-on" in line for line in events.iter_lines())
            node.close()
            away = http.get("/api/services")
            assert (away.status_code, away.json()["code"]) == (502, "gateway_unreachable")
        serving.terminate()
        assert serving.wait(10) == 0
